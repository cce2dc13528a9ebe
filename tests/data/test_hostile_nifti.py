"""Broken and hostile NIfTI, compressed and not: refused in one line, or read right."""

import bz2
import gzip
import itertools
import lzma
import os
import struct
import zlib
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
from hostile import Probe, Rows, check, other
from hostile_probe import digest
from volumes import Array, oblique_affine, smooth_ct

VOXELS = smooth_ct((9, 8, 7))
AFFINE = oblique_affine((0.8, 1.1, 2.5), 25)
STORED = AFFINE.astype(np.float32)
DTYPES = ["i1", "u1", "i2", "u2", "i4", "u4", "i8", "u8", "f4", "f8"]
ROWS = Rows("nifti", ".nii.gz", "UserError")
GZIP = Rows("nifti", ".nii.gz", "UserError")
LABELS = Rows("label", ".nii.gz", "UserError")


def nifti(array: Array = VOXELS, kind: Any = nib.Nifti1Image, affine: Any = AFFINE, **fields: Any) -> bytes:
    """A .nii whose header fields were changed without nibabel's consent; a mapping changes single places."""
    content: bytes = kind(array, affine, dtype=array.dtype).to_bytes()
    length = kind.header_class.sizeof_hdr
    header = np.frombuffer(content[:length], kind.header_class.template_dtype).copy()
    for name, value in fields.items():
        for place, one in value.items() if isinstance(value, dict) else [(Ellipsis, value)]:
            header[name][0 if place is ... else (0, place)] = one
    return header.tobytes() + content[length:]


def right(array: Array = VOXELS, affine: Any = STORED) -> dict[str, Any]:
    result = {"voxels": digest(array)}
    return result if affine is None else result | {"affine": affine.tolist()}


def no_forms(**fields: Any) -> bytes:
    return nifti(sform_code=0, qform_code=0, **fields)


NAN, INF, TINY, HUGE = np.nan, np.inf, 1e-42, 3e38
THREE = dict.fromkeys((1, 2, 3), 0)


def all_three(value: float) -> dict[int, float]:
    return dict.fromkeys(THREE, value)


SFORM = {
    "NaN": {"srow_y": {1: NAN}}, "infinite": {"srow_x": {3: INF}}, "zero": {f"srow_{axis}": 0 for axis in "xyz"},
    "singular": {"srow_x": (1, 1, 0, 0), "srow_y": (1, 1, 0, 0)},
    "nearly singular": {"srow_x": (50, 50, 50, 0), "srow_y": (0, 0.01, 0, 0), "srow_z": (0, 0, 0.01, 0)},
    "with an origin far away": {"srow_x": {3: 1e20}},
    "of kilometres": {f"srow_{axis}": {i: 1e30} for i, axis in enumerate("xyz")},
    "of atoms": {"srow_x": (1e-20, 0, 0, 0), "srow_y": (0, 1e10, 0, 0), "srow_z": (0, 0, 1e10, 0)},
}  # fmt: skip
for name, fields in SFORM.items():
    ROWS.add(f"sform {name}", nifti(**fields), "affine")
QFORM: dict[str, dict[str, Any]] = {
    "NaN": {"quatern_b": NAN}, "infinite": {"qoffset_x": INF}, "too long": {"quatern_b": 3},
    "NaN spacing": {"pixdim": {2: NAN}}, "huge spacing": {"pixdim": all_three(HUGE)},
}  # fmt: skip
for name, fields in QFORM.items():
    rule = "w2 should be positive" if name == "too long" else "affine"
    ROWS.add(f"qform {name}", nifti(sform_code=0, qform_code=1, **fields), rule)
for word, value in {"NaN": NAN, "infinite": INF, "denormal": TINY, "huge": HUGE}.items():
    ROWS.add(f"no forms, pixdim {word}", no_forms(pixdim=all_three(value)), "affine")
for word, value in {"NaN": NAN, "infinite": INF, "denormal": TINY, "huge": HUGE, "zero": 0, "negative": -2}.items():
    ROWS.add(f"pixdim {word} beside an sform", nifti(pixdim=all_three(value)), right())
ROWS.add("no forms, pixdim zero", no_forms(pixdim=THREE), right(affine=None))
ROWS.add("no forms, pixdim negative", no_forms(pixdim=all_three(-2)), right(affine=None))
ROWS.add("no forms", no_forms(), right(affine=None))
ROWS.add("unknown sform code", nifti(sform_code=999, qform_code=0), right(affine=None))
ROWS.add("qfac of 7", nifti(pixdim={0: 7}), right())

ROWS.add("dim 32767³", nifti(dim=(3, 32767, 32767, 32767, 1, 1, 1, 1)), "voxels, more than")
ROWS.add("dim 1000³", nifti(dim={1: 1000, 2: 1000, 3: 1000}), "truncated")
ROWS.add("dim 32767³ in gzip", gzip.compress(nifti(dim={1: 32767, 2: 32767, 3: 32767})), "voxels, more than")
ROWS.add("dim 2⁶²", nifti(kind=nib.Nifti2Image, dim={1: 2**62, 2: 2**62}), "voxels, more than")
ROWS.add("dim beyond 64 bits", nifti(kind=nib.Nifti2Image, dim={1: 2**40, 2: 2**40}), "voxels, more than")
ROWS.add("dim negative", nifti(dim={1: -9}), "at least 2 voxels, got shape (-9, 8, 7)")
ROWS.add("dim zero", nifti(dim={2: 0}), "at least 2 voxels, got shape (9, 0, 7)")
ROWS.add("dim[0] 8", nifti(dim={0: 8}), "")
ROWS.add("dim[0] 0", nifti(dim={0: 0}), "")
ROWS.add("dim[0] -3", nifti(dim={0: -3}), "")
ROWS.add("dim[0] 2", nifti(dim={0: 2}), "must be a 3D volume, got shape (9, 8)")
ROWS.add("dim[0] 7", nifti(dim={0: 7}), right())
ROWS.add("dim[0] 8 of NIfTI-2", nifti(kind=nib.Nifti2Image, dim={0: 8}), "")
ROWS.add("one voxel thick", nifti(VOXELS[:, :1]), "at least 2 voxels")
ROWS.add("4D of one frame", nifti(VOXELS[..., None]), right())
ROWS.add("4D of no frame", nifti(dim={0: 4, 4: 0}), "must be a 3D volume, got shape (9, 8, 7, 0)")
ROWS.add("4D of two frames", nifti(np.stack([VOXELS] * 2, -1)), "must be a 3D volume, got shape (9, 8, 7, 2)")
ROWS.add("5D, a vector a voxel", nifti(np.zeros((5, 5, 5, 1, 3))), "must be a 3D volume")

for code in DTYPES:
    array = (np.abs(VOXELS) % 100).astype(code)
    for order, kind in itertools.product("<>", (nib.Nifti1Image, nib.Nifti2Image)):
        image = kind(array.astype(order + code), AFFINE, kind.header_class(endianness=order), dtype=array.dtype)
        affine = AFFINE if kind is nib.Nifti2Image else np.float32(AFFINE)  # what its header holds
        ROWS.add(f"{order}{code} {kind.__name__}", image.to_bytes(), right(array, affine))
RGB = np.zeros((3, 3, 3), [("R", "u1"), ("G", "u1"), ("B", "u1")])
ROWS.add("RGB", nifti(RGB), "voxels must be integers or floats")
ROWS.add("complex", nifti(np.zeros((3, 3, 3), np.complex64)), "voxels must be integers or floats")
ROWS.add("float128", nifti(datatype=1536, bitpix=128), "")
for number in (0, 1, 77, -1):
    ROWS.add(f"datatype {number}", nifti(datatype=number), "")
ROWS.add("bitpix that contradicts", nifti(bitpix=8), right())

ROWS.add("scl_slope 0", nifti(scl_slope=0, scl_inter=5), right())
ROWS.add("scl_slope NaN", nifti(scl_slope=NAN, scl_inter=NAN), right())
for value in (INF, -INF):
    ROWS.add(f"scl_slope {value}", nifti(scl_slope=value), "scl_slope must be finite")
for name, fields in {
    "scl_inter NaN": {"scl_slope": 1, "scl_inter": NAN}, "scl_inter infinite": {"scl_slope": 1, "scl_inter": INF},
}.items():  # fmt: skip
    ROWS.add(name, nifti(**fields), "invalid intercept")
ROWS.add("scl_slope beyond float32", nifti(scl_slope=HUGE, scl_inter=0), "voxels are not finite")
ROWS.add("scl_slope negative", nifti(scl_slope=-2, scl_inter=1), right(VOXELS * -2.0 + 1))

for word, value in {"0": 0, "100": 100, "negative": -1e9, "just negative": -1, "353.5": 353.5}.items():
    ROWS.add(f"vox_offset {word}", nifti(vox_offset=value), "vox_offset")
for word, value in {"NaN": NAN, "infinite": INF, "1e30": 1e30, "2e9": 2e9}.items():
    ROWS.add(f"vox_offset {word}", nifti(vox_offset=value), "vox_offset")
ROWS.add("vox_offset 2⁶²", nifti(kind=nib.Nifti2Image, vox_offset=2**62), "vox_offset")
ROWS.add("vox_offset -2⁶³", nifti(kind=nib.Nifti2Image, vox_offset=-(2**63)), "vox_offset")
NOISE = np.random.default_rng(0).bytes(2 * 10**6)
ROWS.add("vox_offset 2e9 in gzip", gzip.compress(nifti(vox_offset=2e9) + NOISE), "vox_offset")

ROWS.add("magic of a pair", nifti(magic=b"ni1"), "not a single-file NIfTI: magic b'ni1'")
ROWS.add("magic wrong", nifti(magic=b"abc"), "not a single-file NIfTI: magic b'abc'")
ROWS.add("magic empty", nifti(magic=b""), "magic")
ROWS.add("sizeof_hdr 0", nifti(sizeof_hdr=0), right())
ROWS.add("sizeof_hdr 349", nifti(sizeof_hdr=349), right())
ROWS.add("header alone", nifti()[:348], "348 bytes of header, expected at least 352")
ROWS.add("header and flags alone", nifti()[:352], "truncated")
ROWS.add("one byte short", nifti()[:-1], "truncated")
ROWS.add("trailing garbage", nifti() + b"more" * 50, right())
for size in (0, -16, 7, 2**31 - 1, 2**20):
    extended = nifti(vox_offset=400)[:348] + struct.pack("<4bii", 1, 0, 0, 0, size, 6) + bytes(40)
    ROWS.add(f"extension of {size} bytes", extended + nifti()[352:], right())

for name, change in {
    "NaN": {0: NAN}, "infinite": {0: INF}, "1e300": {0: 1e300},
}.items():  # fmt: skip
    spoilt = VOXELS.astype(np.float64)
    spoilt.flat[0] = change[0]
    ROWS.add(f"voxel {name}", nifti(spoilt), "1 of 504 voxels are not finite")
ROWS.add("constant", nifti(np.full((5, 4, 3), 7, np.int16)), right(np.full((5, 4, 3), 7)))

PACKED = gzip.compress(nifti(), mtime=0)
for cut in (1, 2, 5, 9, 10, 11, 200, len(PACKED) // 2, len(PACKED) - 9, len(PACKED) - 8, len(PACKED) - 4):
    rule = {1: "header"}.get(cut, "ended before")
    GZIP.add(f"cut at {cut}", PACKED[:cut], rule)
GZIP.add("last byte missing", PACKED[:-1], "ended before")
GZIP.add("bad CRC", PACKED[:-8] + bytes([PACKED[-8] ^ 1]) + PACKED[-7:], "CRC")
GZIP.add("bad length", PACKED[:-1] + bytes([PACKED[-1] ^ 1]), "")
GZIP.add("two members", gzip.compress(nifti()[:400]) + gzip.compress(nifti()[400:]), right())
GZIP.add("100,000 empty members", gzip.compress(b"") * 100_000 + PACKED, right())
GZIP.add("zeros after it", PACKED + bytes(512), right())
GZIP.add("garbage after it", PACKED + b"garbage", "")
GZIP.add("second member cut", PACKED + PACKED[:50], "ended before")
GZIP.add("method 7", PACKED[:2] + b"\x07" + PACKED[3:], "")
GZIP.add("reserved flags", PACKED[:3] + b"\xe0" + PACKED[4:], right())
GZIP.add("name without end", PACKED[:3] + b"\x08" + PACKED[4:10] + b"x" * 10**6, "")
GZIP.add("twice", gzip.compress(PACKED), "a gzip inside of a gzip")
GZIP.add("zlib instead", zlib.compress(nifti()), "")
GZIP.add("bzip2 instead", bz2.compress(nifti() * 20), "compressed by bzip2")
GZIP.add("xz instead", lzma.compress(nifti() * 20), "compressed by xz")
GZIP.add("zip instead", b"PK\x03\x04" + bytes(1000), "a zip archive")
GZIP.add("DICOM instead", bytes(128) + b"DICM" + bytes(1000), "a DICOM file")
GZIP.add("a web page instead", b"<html>404</html>" * 50, "a web page")


def bomb(head: bytes, gigabytes: float) -> bytes:
    """A gzip of `head` and then zeros: a megabyte holds one gigabyte of them."""
    packer, zeros = zlib.compressobj(9, zlib.DEFLATED, -15), bytes(2**24)
    start = packer.compress(head) + packer.flush(zlib.Z_FULL_FLUSH)
    block = packer.compress(zeros) + packer.flush(zlib.Z_FULL_FLUSH)  # depends on nothing before it: repeat it
    blocks, crc = round(64 * gigabytes), zlib.crc32(head)
    for _ in range(blocks):
        crc = zlib.crc32(zeros, crc)
    trailer = struct.pack("<II", crc, (len(head) + blocks * len(zeros)) & 0xFFFFFFFF)
    return gzip.compress(b"", mtime=0)[:10] + start + block * blocks + packer.flush() + trailer


GZIP.add("bomb behind a small volume", bomb(nifti(), 0.5), "more than")
GZIP.add("bomb in front of a header", bomb(b"", 0.5), "")
HONEST = nifti(dim={1: 4000, 2: 4000, 3: 4000})
GZIP.add("bomb of a header that is true", bomb(HONEST, 0.1), "voxels, more than")
GZIP.add("bomb that is short", bomb(nifti(dim={1: 400, 2: 400, 3: 53}), 0.016), "truncated")

# --- label maps and their preparation


def label(value: float, dtype: str) -> bytes:
    array = np.zeros((5, 5, 5), dtype)
    array[1, 2, 3] = value
    return nifti(array)


for value, dtype in ((0.5, "f4"), (-1, "i2"), (256, "i2"), (2**31 - 1, "i4"), (2**62, "i8"), (-3e38, "f4")):
    LABELS.add(f"value {value:g} as {dtype}", label(value, dtype), "label values must be integers in 0..255")
LABELS.add("NaN", label(NAN, "f4"), "voxels are not finite")
LABELS.add("floats that are integers", label(255, "f8"), {})
LABELS.add("constant air", nifti(np.full((8, 8, 8), -1000, np.int16)), "there is nothing in it", "prepare")
LABELS.add("constant bone", nifti(np.full((8, 8, 8), 900, np.int16)), "there is nothing in it", "prepare")
LABELS.add("voxels of 900 mm", nifti(affine=np.diag([900, 900, 900, 1.0])), "is the affine in mm?", "prepare")
LABELS.add(
    "voxels of 3e38 HU",
    nifti(np.where(VOXELS > 0, 3e38, -3e38).astype("f4")),
    "0.0% of them inside the window",
    "prepare",
)


ROWS.add_no_files()
for word, name in {
    "a line break": "a\nb.nii",
    "unicode": "größe-肝.nii",
    "no UTF-8": os.fsdecode(b"a\xff.nii"),
}.items():
    ROWS.add(f"name with {word}", other(name, lambda p: p.write_bytes(nifti())), right())
    ROWS.add(f"name with {word}, broken", other(name, lambda p: p.touch()), "header")
ROWS.add("name too long", other("n" * 256 + ".nii", lambda p: None), "name too long")
ROWS.add("file as a folder", other("f/v.nii", lambda p: p.parent.touch()), "Not a dir")


TABLES = {"nifti": ROWS, "gzip": GZIP, "label": LABELS}


@pytest.mark.parametrize(("table", "name"), [(table, name) for table, rows in TABLES.items() for name in rows])
def test_hostile_volume_is_refused_or_right(table: str, name: str, probe: Probe, tmp_path: Path) -> None:
    """One line that names file and rule, or the right voxels and affine; no bomb goes off."""
    check(TABLES[table][name], probe, tmp_path)
