"""Broken and hostile input: a clear error or the right result, within bounded time and memory, and no code is run.

Every row of the tables is one file, read in a process of its own (`hostile_probe.py`) under an alarm and a limit to the
address space; asserted are the type of the error, that it is one line that names the file and the rule, and how much
memory it took.
"""

import bz2
import gzip
import hashlib
import itertools
import json
import lzma
import os
import pickle
import random
import socket
import struct
import subprocess
import sys
import zipfile
import zlib
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import fuzz
import nibabel as nib
import numpy as np
import pytest
import torch
from hostile_probe import NETWORK, digest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save
from volumes import Array, oblique_affine, smooth_ct

from ssl_ray.networks.unetr import build_autoencoder
from ssl_ray.networks.weight_files import describe
from ssl_ray.training.checkpoint import save_state

MEGABYTES, TIMES = 48, {"datalist": 50}
"""Memory that reading may take besides so many times the file, ten by default; a list of empty lists is 25 times."""
VOXELS = smooth_ct((9, 8, 7))
AFFINE = oblique_affine((0.8, 1.1, 2.5), 25)
STORED = AFFINE.astype(np.float32)
DTYPES = ["i1", "u1", "i2", "u2", "i4", "u4", "i8", "u8", "f4", "f8"]

Build = Callable[[Path], Path | bytes | None]


class Rows(dict[str, tuple[str, Build, str | dict[str, Any]]]):
    """Row by name: its reader, what makes the file, and the rule in its error or a part of the right result."""

    def add(
        self, group: str, name: str, content: bytes | Build, expected: str | dict[str, Any], reader: str = ""
    ) -> None:
        build = (lambda path: content) if isinstance(content, bytes) else content
        assert f"{group}: {name}" not in self
        self[f"{group}: {name}"] = (reader or group, build, expected)


ROWS = Rows()


# --- NIfTI


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
    ROWS.add("nifti", f"sform {name}", nifti(**fields), "affine")
QFORM: dict[str, dict[str, Any]] = {
    "NaN": {"quatern_b": NAN}, "infinite": {"qoffset_x": INF}, "too long": {"quatern_b": 3},
    "NaN spacing": {"pixdim": {2: NAN}}, "huge spacing": {"pixdim": all_three(HUGE)},
}  # fmt: skip
for name, fields in QFORM.items():
    rule = "w2 should be positive" if name == "too long" else "affine"
    ROWS.add("nifti", f"qform {name}", nifti(sform_code=0, qform_code=1, **fields), rule)
for word, value in {"NaN": NAN, "infinite": INF, "denormal": TINY, "huge": HUGE}.items():
    ROWS.add("nifti", f"no forms, pixdim {word}", no_forms(pixdim=all_three(value)), "affine")
for word, value in {"NaN": NAN, "infinite": INF, "denormal": TINY, "huge": HUGE, "zero": 0, "negative": -2}.items():
    ROWS.add("nifti", f"pixdim {word} beside an sform", nifti(pixdim=all_three(value)), right())
ROWS.add("nifti", "no forms, pixdim zero", no_forms(pixdim=THREE), right(affine=None))
ROWS.add("nifti", "no forms, pixdim negative", no_forms(pixdim=all_three(-2)), right(affine=None))
ROWS.add("nifti", "no forms", no_forms(), right(affine=None))
ROWS.add("nifti", "unknown sform code", nifti(sform_code=999, qform_code=0), right(affine=None))
ROWS.add("nifti", "qfac of 7", nifti(pixdim={0: 7}), right())

ROWS.add("nifti", "dim 32767³", nifti(dim=(3, 32767, 32767, 32767, 1, 1, 1, 1)), "voxels, more than")
ROWS.add("nifti", "dim 1000³", nifti(dim={1: 1000, 2: 1000, 3: 1000}), "truncated")
ROWS.add("nifti", "dim 32767³ in gzip", gzip.compress(nifti(dim={1: 32767, 2: 32767, 3: 32767})), "voxels, more than")
ROWS.add("nifti", "dim 2⁶²", nifti(kind=nib.Nifti2Image, dim={1: 2**62, 2: 2**62}), "voxels, more than")
ROWS.add("nifti", "dim beyond 64 bits", nifti(kind=nib.Nifti2Image, dim={1: 2**40, 2: 2**40}), "voxels, more than")
ROWS.add("nifti", "dim negative", nifti(dim={1: -9}), "at least 2 voxels, got shape (-9, 8, 7)")
ROWS.add("nifti", "dim zero", nifti(dim={2: 0}), "at least 2 voxels, got shape (9, 0, 7)")
ROWS.add("nifti", "dim[0] 8", nifti(dim={0: 8}), "")
ROWS.add("nifti", "dim[0] 0", nifti(dim={0: 0}), "")
ROWS.add("nifti", "dim[0] -3", nifti(dim={0: -3}), "")
ROWS.add("nifti", "dim[0] 2", nifti(dim={0: 2}), "must be a 3D volume, got shape (9, 8)")
ROWS.add("nifti", "dim[0] 7", nifti(dim={0: 7}), right())
ROWS.add("nifti", "dim[0] 8 of NIfTI-2", nifti(kind=nib.Nifti2Image, dim={0: 8}), "")
ROWS.add("nifti", "one voxel thick", nifti(VOXELS[:, :1]), "at least 2 voxels")
ROWS.add("nifti", "4D of one frame", nifti(VOXELS[..., None]), right())
ROWS.add("nifti", "4D of no frame", nifti(dim={0: 4, 4: 0}), "must be a 3D volume, got shape (9, 8, 7, 0)")
ROWS.add("nifti", "4D of two frames", nifti(np.stack([VOXELS] * 2, -1)), "must be a 3D volume, got shape (9, 8, 7, 2)")
ROWS.add("nifti", "5D, a vector a voxel", nifti(np.zeros((5, 5, 5, 1, 3))), "must be a 3D volume")

for code in DTYPES:
    array = (np.abs(VOXELS) % 100).astype(code)
    for order, kind in itertools.product("<>", (nib.Nifti1Image, nib.Nifti2Image)):
        image = kind(array.astype(order + code), AFFINE, kind.header_class(endianness=order), dtype=array.dtype)
        affine = AFFINE if kind is nib.Nifti2Image else np.float32(AFFINE)  # what its header holds
        ROWS.add("nifti", f"{order}{code} {kind.__name__}", image.to_bytes(), right(array, affine))
RGB = np.zeros((3, 3, 3), [("R", "u1"), ("G", "u1"), ("B", "u1")])
ROWS.add("nifti", "RGB", nifti(RGB), "voxels must be integers or floats")
ROWS.add("nifti", "complex", nifti(np.zeros((3, 3, 3), np.complex64)), "voxels must be integers or floats")
ROWS.add("nifti", "float128", nifti(datatype=1536, bitpix=128), "")
for number in (0, 1, 77, -1):
    ROWS.add("nifti", f"datatype {number}", nifti(datatype=number), "")
ROWS.add("nifti", "bitpix that contradicts", nifti(bitpix=8), right())

ROWS.add("nifti", "scl_slope 0", nifti(scl_slope=0, scl_inter=5), right())
ROWS.add("nifti", "scl_slope NaN", nifti(scl_slope=NAN, scl_inter=NAN), right())
for name, fields in {
    "scl_slope infinite": {"scl_slope": INF}, "scl_slope -infinite": {"scl_slope": -INF},
    "scl_inter NaN": {"scl_slope": 1, "scl_inter": NAN}, "scl_inter infinite": {"scl_slope": 1, "scl_inter": INF},
}.items():  # fmt: skip
    ROWS.add("nifti", name, nifti(**fields), "scl_slope and scl_inter must be finite")
ROWS.add("nifti", "scl_slope beyond float32", nifti(scl_slope=HUGE, scl_inter=0), "voxels are not finite")
ROWS.add("nifti", "scl_slope negative", nifti(scl_slope=-2, scl_inter=1), right(VOXELS * -2.0 + 1))

for word, value in {"0": 0, "100": 100, "negative": -1e9, "just negative": -1, "353.5": 353.5}.items():
    ROWS.add("nifti", f"vox_offset {word}", nifti(vox_offset=value), "vox_offset")
for word, value in {"NaN": NAN, "infinite": INF, "1e30": 1e30, "2e9": 2e9}.items():
    ROWS.add(
        "nifti",
        f"vox_offset {word}",
        nifti(vox_offset=value),
        "vox_offset" if word in ("NaN", "infinite") else "truncated",
    )
ROWS.add("nifti", "vox_offset 2⁶²", nifti(kind=nib.Nifti2Image, vox_offset=2**62), "truncated")
ROWS.add("nifti", "vox_offset -2⁶³", nifti(kind=nib.Nifti2Image, vox_offset=-(2**63)), "vox_offset")
NOISE = np.random.default_rng(0).bytes(2 * 10**6)
ROWS.add("nifti", "vox_offset 2e9 in gzip", gzip.compress(nifti(vox_offset=2e9) + NOISE), "vox_offset")

ROWS.add("nifti", "magic of a pair", nifti(magic=b"ni1"), "not a single-file NIfTI: magic b'ni1'")
ROWS.add("nifti", "magic wrong", nifti(magic=b"abc"), "magic string 'abc' is not valid")
ROWS.add("nifti", "magic empty", nifti(magic=b""), "magic")
ROWS.add("nifti", "sizeof_hdr 0", nifti(sizeof_hdr=0), right())
ROWS.add("nifti", "sizeof_hdr 349", nifti(sizeof_hdr=349), right())
ROWS.add("nifti", "header alone", nifti()[:348], "348 bytes of header, expected at least 352")
ROWS.add("nifti", "header and flags alone", nifti()[:352], "truncated")
ROWS.add("nifti", "one byte short", nifti()[:-1], "truncated")
ROWS.add("nifti", "trailing garbage", nifti() + b"more" * 50, right())
for size in (0, -16, 7, 2**31 - 1, 2**20):
    extended = nifti(vox_offset=400)[:348] + struct.pack("<4bii", 1, 0, 0, 0, size, 6) + bytes(40)
    ROWS.add("nifti", f"extension of {size} bytes", extended + nifti()[352:], "extension")

for name, change in {
    "NaN": {0: NAN}, "infinite": {0: INF}, "1e300": {0: 1e300},
}.items():  # fmt: skip
    spoilt = VOXELS.astype(np.float64)
    spoilt.flat[0] = change[0]
    ROWS.add("nifti", f"voxel {name}", nifti(spoilt), "1 of 504 voxels are not finite")
ROWS.add("nifti", "constant", nifti(np.full((5, 4, 3), 7, np.int16)), right(np.full((5, 4, 3), 7)))

PACKED = gzip.compress(nifti(), mtime=0)
for cut in (1, 2, 5, 9, 10, 11, 200, len(PACKED) // 2, len(PACKED) - 9, len(PACKED) - 8, len(PACKED) - 4):
    rule = {1: "header"}.get(cut, "truncated gzip")
    ROWS.add("gzip", f"cut at {cut}", PACKED[:cut], rule, "nifti")
ROWS.add("gzip", "last byte missing", PACKED[:-1], "truncated gzip", "nifti")
ROWS.add("gzip", "bad CRC", PACKED[:-8] + bytes([PACKED[-8] ^ 1]) + PACKED[-7:], "CRC", "nifti")
ROWS.add("gzip", "bad length", PACKED[:-1] + bytes([PACKED[-1] ^ 1]), "", "nifti")
ROWS.add("gzip", "two members", gzip.compress(nifti()[:400]) + gzip.compress(nifti()[400:]), right(), "nifti")
ROWS.add("gzip", "100,000 empty members", gzip.compress(b"") * 100_000 + PACKED, right(), "nifti")
ROWS.add("gzip", "zeros after it", PACKED + bytes(512), right(), "nifti")
ROWS.add("gzip", "garbage after it", PACKED + b"garbage", "", "nifti")
ROWS.add("gzip", "second member cut", PACKED + PACKED[:50], "truncated gzip", "nifti")
ROWS.add("gzip", "method 7", PACKED[:2] + b"\x07" + PACKED[3:], "", "nifti")
ROWS.add("gzip", "reserved flags", PACKED[:3] + b"\xe0" + PACKED[4:], right(), "nifti")
ROWS.add("gzip", "name without end", PACKED[:3] + b"\x08" + PACKED[4:10] + b"x" * 10**6, "", "nifti")
ROWS.add("gzip", "twice", gzip.compress(PACKED), "", "nifti")
ROWS.add("gzip", "zlib instead", zlib.compress(nifti()), "", "nifti")
ROWS.add("gzip", "bzip2 instead", bz2.compress(nifti() * 20), "", "nifti")
ROWS.add("gzip", "xz instead", lzma.compress(nifti() * 20), "", "nifti")
ROWS.add("gzip", "zip instead", b"PK\x03\x04" + bytes(1000), "", "nifti")
ROWS.add("gzip", "DICOM instead", bytes(128) + b"DICM" + bytes(1000), "", "nifti")
ROWS.add("gzip", "a web page instead", b"<html>404</html>" * 50, "", "nifti")


def bomb(head: bytes, gigabytes: float) -> Build:
    """A gzip of `head` and then zeros: a megabyte holds one gigabyte of them."""

    def build(path: Path) -> None:
        with gzip.open(path, "wb", compresslevel=9) as stream:
            stream.write(head)
            for _ in range(round(64 * gigabytes)):
                stream.write(bytes(2**24))

    return build


ROWS.add("gzip", "bomb behind a small volume", bomb(nifti(), 0.5), "more than", "nifti")
ROWS.add("gzip", "bomb in front of a header", bomb(b"", 0.5), "", "nifti")
HONEST = nifti(dim={1: 4000, 2: 4000, 3: 4000})
ROWS.add("gzip", "bomb of a header that is true", bomb(HONEST, 0.1), "voxels, more than", "nifti")
ROWS.add("gzip", "bomb that is short", bomb(nifti(dim={1: 400, 2: 400, 3: 53}), 0.016), "truncated", "nifti")

# --- label maps and their preparation


def label(value: float, dtype: str) -> bytes:
    array = np.zeros((5, 5, 5), dtype)
    array[1, 2, 3] = value
    return nifti(array)


for value, dtype in ((0.5, "f4"), (-1, "i2"), (256, "i2"), (2**31 - 1, "i4"), (2**62, "i8"), (-3e38, "f4")):
    ROWS.add("label", f"value {value:g} as {dtype}", label(value, dtype), "label values must be integers in 0..255")
ROWS.add("label", "NaN", label(NAN, "f4"), "voxels are not finite")
ROWS.add("label", "floats that are integers", label(255, "f8"), {})
ROWS.add("prepare", "constant air", nifti(np.full((8, 8, 8), -1000, np.int16)), "no voxel lies above")
ROWS.add("prepare", "constant bone", nifti(np.full((8, 8, 8), 900, np.int16)), {"highest": 255})
ROWS.add("prepare", "voxels of 900 mm", nifti(affine=np.diag([900, 900, 900, 1.0])), "is the affine in mm?")
ROWS.add("prepare", "voxels of 3e38 HU", nifti(np.where(VOXELS > 0, 3e38, -3e38).astype("f4")), {"highest": 255})


# --- files that are no files


def made(make: Callable[[Path], object]) -> Build:
    def build(path: Path) -> None:
        make(path)

    return build


def _socket(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as one:
        os.chdir(path.parent)  # a socket's path is short
        one.bind(path.name)


NO_FILES = {
    "missing": (lambda path: None, "No such file"),
    "empty": (lambda path: path.touch(), ""),
    "one byte": (lambda path: path.write_bytes(b"\0"), ""),
    "a folder": (lambda path: path.mkdir(), "Is a directory"),
    "a FIFO": (lambda path: os.mkfifo(path), "not a regular file"),
    "a device without end": (lambda path: path.symlink_to("/dev/zero"), "not a regular file"),
    "the null device": (lambda path: path.symlink_to("/dev/null"), "not a regular file"),
    "a socket": (_socket, ""),
    "a link to itself": (lambda path: path.symlink_to(path.name), "Too many levels of symbolic links"),
    "a link to nothing": (lambda path: path.symlink_to("nowhere"), "No such file"),
    "random bytes": (lambda path: path.write_bytes(np.random.default_rng(5).bytes(5000)), ""),
}
ENDINGS = {"nifti": ".nii.gz", "datalist": ".json", "yaml": ".yaml", "weights": ".pt", "state": ""}
for group, (name, (make, rule)) in itertools.product(("nifti", "datalist", "yaml", "weights"), NO_FILES.items()):
    ROWS.add(group, f"file is {name}", made(make), rule)
for name, (make, rule) in NO_FILES.items():
    ROWS.add("weights", f"safetensors is {name}", lambda path, make=make: other(path, "a.safetensors", make), rule)


def other(path: Path, name: str, make: Callable[[Path], object]) -> Path:
    """Another name than that of the row."""
    path = path.parent / name
    make(path)
    return path


for word, name in {
    "a line break": "a\nb.nii",
    "unicode": "größe-肝.nii",
    "no UTF-8": os.fsdecode(b"a\xff.nii"),
}.items():
    ROWS.add("nifti", f"name with {word}", lambda p, n=name: other(p, n, lambda p: p.write_bytes(nifti())), right())
    ROWS.add("nifti", f"name with {word}, broken", lambda p, n=name: other(p, n, lambda p: p.touch()), "header")
ROWS.add("nifti", "name too long", lambda path: other(path, "n" * 256 + ".nii", lambda p: None), "name too long")
ROWS.add("nifti", "file as a folder", lambda path: other(path, "f/v.nii", lambda p: p.parent.touch()), "Not a dir")

# --- datalists


def listing(text: str | bytes | dict[str, Any]) -> Build:
    """A datalist beside the volumes v1, v2, v3 and what leads nowhere."""

    def build(path: Path) -> bytes:
        root = path.parent
        for name in ("v1.nii", "v2.nii", "v3.nii", "../out.nii"):
            (root / name).touch()
        (root / "dir.nii").mkdir()
        os.mkfifo(root / "fifo.nii")
        (root / "link.nii").symlink_to("v1.nii")
        (root / "loop.nii").symlink_to("loop.nii")
        (root / "escape.nii").symlink_to("../out.nii")
        (root / "outside").symlink_to("..")
        (root / "zero.nii").symlink_to("/dev/zero")
        content = json.dumps(text) if isinstance(text, dict) else text
        return content.encode() if isinstance(content, str) else content

    return build


def entries(*listed: Any, **more: Any) -> Build:
    return listing({"training": list(listed), **more})


for name, path_, rule in (
    ("absolute path", "/etc/passwd.nii", "leaves the root"), ("..", "../out.nii", "leaves the root"),
    (".. in the middle", "a/../../out.nii", "leaves the root"), ("link out of the root", "escape.nii", "leaves"),
    ("folder that is a link out", "outside/out.nii", "leaves"), ("link to itself", "loop.nii", "no such file"),
    ("FIFO", "fifo.nii", "no such file"), ("folder", "dir.nii", "no such file"), ("device", "zero.nii", "leaves"),
    ("missing file", "v9.nii", "no such file"), ("other ending", "v1.mha", "must end in .nii"),
    ("empty path", "", "must be a path"), ("NUL", "a\0.nii", "must be a path"), ("line break", "a\nb.nii", "must be"),
    ("half a character", "\ud800.nii", "must be a path"), ("path of 1 MB", "x" * 10**6 + ".nii", "no such file"),
    ("path of 100,000 folders", "x/" * 10**5 + "v.nii", "no such file"),
    ("number", 5, "must be a path"), ("null", None, "must be a path"), ("list", ["v1.nii"], "must be a path"),
    ("true", True, "must be a path"), ("NaN", NAN, "must be a path"), ("no image", {"label": "v1.nii"}, "must be"),
    ("image is a list", {"image": ["v1.nii"]}, "must be a path"),
    ("image is deep", {"image": json.loads("[" * 200 + "]" * 200)}, "must be a path"),
):  # fmt: skip
    ROWS.add("datalist", f"entry is a {name}", entries("v2.nii", path_), rule)
ROWS.add("datalist", "volume twice", entries("v1.nii", "v2.nii", "./v1.nii"), "listed twice")
ROWS.add("datalist", "volume twice through a link", entries("v1.nii", "link.nii"), "listed twice")
ROWS.add("datalist", "volume in two sections", entries("v1.nii", validation=["v1.nii"]), "in both")
ROWS.add("datalist", "whole", entries("v1.nii", {"image": "v2.nii"}, validation=["v3.nii"]), {"cases": 3})
for name, section in {"object": {}, "null": None, "text": "v1.nii", "number": 1e999}.items():
    ROWS.add("datalist", f"section is {name}", entries("v1.nii", validation=section), "validation: must be a list")
for name, text, rule in (
    ("list", "[]", "is an object"), ("number", "5", "is an object"), ("null", "null", "is an object"),
    ("empty object", "{}", "'training' must list"), ("100,000 brackets", "[" * 10**5, "not valid JSON"),
    ("100,000 objects", '{"a":' * 10**5, "not valid JSON"), ("trailing garbage", '{"training": ["v1.nii"]} x', "JSON"),
    ("cut", '{"training": ["v1.n', "not valid JSON"), ("Python", "{'training': []}", "not valid JSON"),
    ("duplicate section", '{"training": ["v1.nii"], "training": ["v2.nii"]}', "stands twice"),
    ("duplicate image", '{"training": [{"image": "v1.nii", "image": "v2.nii"}]}', "stands twice"),
    ("integer of 100,000 digits", '{"numTraining": ' + "9" * 10**5 + "}", "not valid JSON"),
    ("entry of 5,000 digits", '{"training": [' + "9" * 5000 + "]}", "not valid JSON"),
    ("UTF-16", '{"training": ["v1.nii"]}'.encode("utf-16"), "not valid JSON"), ("no UTF-8", b'{"\xff": 1}', "JSON"),
    ("BOM", b'\xef\xbb\xbf{"training": ["v1.nii"]}', "not valid JSON"), ("NULs", bytes(1000), "not valid JSON"),
    ("NaN beside the list", '{"training": ["v1.nii"], "numTraining": NaN}', {"cases": 1}),
    ("labels are a list", '{"training": ["v1.nii"], "labels": ["a"]}', "labels: must map"),
    ("labels are text with a line break", '{"training": ["v1.nii"], "labels": "a\\nb"}', "labels: must map"),
    ("labels are turned round", '{"training": ["v1.nii"], "labels": {"liver": 1}}', "labels: must map"),
    ("label value is infinite", '{"training": ["v1.nii"], "labels": {"1e999": "x"}}', "labels: must map"),
    ("label value of 5,000 digits", '{"training": ["v1.nii"], "labels": {"' + "9" * 5000 + '": "x"}}', "must map"),
    ("label value is negative", '{"training": ["v1.nii"], "labels": {"-1": "x"}}', "labels: must map"),
):  # fmt: skip
    ROWS.add("datalist", f"{name} as the list", listing(text), rule)
for depth in range(900, 1000, 7):
    text = '{"training": [' + "[" * depth + "]" * depth + "]}"
    ROWS.add("datalist", f"entry {depth} deep", listing(text), "")
    text = '{"training": ["v1.nii"], "labels": ' + "[" * depth + "]" * depth + "}"
    ROWS.add("datalist", f"labels {depth} deep", listing(text), "")


def many(entry: str, count: int = 10**7) -> Build:
    return lambda path: f'{{"training": [{",".join([entry] * count)}]}}'.encode()


for entry in ("0", '"v.nii"', "{}", "[]", '""'):
    ROWS.add("datalist", f"10,000,000 times {entry}", many(entry), "bytes are more than")
    ROWS.add("datalist", f"1,000,000 times {entry}", many(entry, 10**6), "must list at most")
ROWS.add("datalist", "90,000 brackets in an entry", many("[" * 90 + "]" * 90, 10**3), "must be a path")
ROWS.add("datalist", "100,000 times one file", many('"v.nii"', 10**5), "listed twice")


# --- weights


def tensors(spoil: Callable[[dict[str, torch.Tensor]], object] = lambda state: None, width: int = 48) -> Build:
    """A torch file of an autoencoder's weights, spoilt in place."""

    def build(path: Path) -> None:
        torch.manual_seed(0)
        network = NETWORK.model_copy(update={"hidden_size": width})
        state = build_autoencoder(network, (32, 32, 32)).state_dict()
        spoil(state)
        torch.save(state, path)

    return build


def saved(content: Any, **options: Any) -> Build:
    return made(lambda path: torch.save(content, path, **options))


class Attack:
    """Pickles to a call that makes a folder."""

    def __init__(self, folder: str) -> None:
        self.folder = folder

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (self.folder,)


def safetensors(header: Any, data: bytes = bytes(16), length: int | None = None) -> Build:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    content = struct.pack("<Q", len(text) if length is None else length) + text + data
    return lambda path: other(path, "a.safetensors", lambda path: path.write_bytes(content))


def slot(start: int, end: int, shape: Any = (4,), dtype: str = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}


def rezipped(path: Path) -> None:
    """A torch file whose one tensor is 256 MB of zeros, deflated."""
    torch.save({"a": torch.zeros(4)}, path.with_suffix(".plain"))
    with zipfile.ZipFile(path.with_suffix(".plain")) as source, zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as out:
        for info in source.infolist():
            with out.open(info.filename, "w") as stream:
                for _ in range(256 if info.filename.endswith("/data/0") else 0):
                    stream.write(bytes(2**20))
                if not info.filename.endswith("/data/0"):
                    stream.write(source.read(info.filename))


SLOT = json.dumps(slot(0, 16)).encode()
ENCODER = "not the weights of this ViT"
for name, build, rule, reader in (
    ("whole", tensors(), {"share": 1.0}, "transfer"),
    ("NaN weights", tensors(lambda state: state["norm.bias"].fill_(NAN)), "NaN or infinite weights", "transfer"),
    ("infinite weights", tensors(lambda state: state["norm.bias"].fill_(INF)), "NaN or infinite", "transfer"),
    ("missing key", tensors(lambda state: state.pop("blocks.3.norm1.weight")), "missing: blocks.3", "transfer"),
    ("another width", tensors(width=96), "hidden_size is 96 there and 48 here", "transfer"),
    ("another architecture", saved(torch.nn.Linear(3, 3).state_dict()), ENCODER, "transfer"),
    ("pickled code", saved({"a": torch.ones(1), "b": Attack("owned")}), "which can run code", "weights"),
    ("pickled code, old format", saved(Attack("owned"), _use_new_zipfile_serialization=False), "run code", "weights"),
    ("bare pickle", lambda path: pickle.dumps(Attack("owned")), "", "weights"),
    ("whole network", saved(torch.nn.Linear(2, 2)), "which can run code", "weights"),
    ("list", saved([torch.ones(1)]), "expected a state dict", "weights"),
    ("number", saved(5), "expected a state dict", "weights"),
    ("empty dict", saved({}), "expected a state dict", "weights"),
    ("key with a line break", saved({"a\nb": torch.ones(1)}), ENCODER, "transfer"),
    ("deep dict", saved({"state_dict": {"state_dict": {"a": torch.ones(1)}}}), "expected a state dict", "weights"),
    ("expanded tensor", saved({"norm.weight": torch.ones(1).expand(10**6, 10**6)}), "dense", "transfer"),
    ("meta tensor", saved({"norm.weight": torch.empty(10**6, 10**6, device="meta")}), "dense", "transfer"),
    ("sparse tensor", saved({"norm.weight": torch.eye(3).to_sparse()}), "dense", "transfer"),
    ("huge sparse tensor", saved({"a": torch.sparse_coo_tensor(size=(10**9, 10**9))}), "", "transfer"),
    ("deflated zeros", made(rezipped), "", "weights"),
    ("safetensors, absurd header", safetensors({}, length=2**63 - 1), "not a file of weights", "weights"),
    ("safetensors, header beyond the file", safetensors({}, length=10**6), "not a file of weights", "weights"),
    ("safetensors, header is no JSON", safetensors(b"\xff" * 20), "not a file of weights", "weights"),
    ("safetensors, header deep", safetensors(b"[" * 10**5), "not a file of weights", "weights"),
    ("safetensors, offsets overlap", safetensors({"a": slot(0, 16), "b": slot(0, 16)}), "not a file", "weights"),
    ("safetensors, offsets negative", safetensors({"a": slot(-16, 0)}), "not a file of weights", "weights"),
    ("safetensors, offsets beyond", safetensors({"a": slot(0, 2**40, (2**38,))}), "not a file of weights", "weights"),
    ("safetensors, shape overflows", safetensors({"a": slot(0, 16, (2**62, 2**62, 4))}), "not a file", "weights"),
    ("safetensors, shape is another", safetensors({"a": slot(0, 16, (5,))}), "not a file of weights", "weights"),
    ("safetensors, dtype unknown", safetensors({"a": slot(0, 16, (4,), "Q7")}), "not a file of weights", "weights"),
    ("safetensors, hole", safetensors({"a": slot(4, 16, (3,))}), "not a file of weights", "weights"),
    ("safetensors, no tensor", safetensors({}, b""), "expected a state dict", "weights"),
    ("safetensors, metadata is a list", safetensors({"__metadata__": [], "a": slot(0, 16)}), "", "weights"),
    ("safetensors, metadata broken", safetensors({}, length=2**63 - 1), "", "metadata"),
    ("safetensors, empty tensor", safetensors({"norm.weight": slot(0, 0, (0, 2**40))}, b""), ENCODER, "transfer"),
    ("safetensors, key twice", safetensors(b'{"a":%s,"a":%s}' % (SLOT, SLOT)), {"names": ["a"]}, "weights"),
    ("pytorch cut", lambda path: cut(path, tensors(), 0.5), "not a file of weights", "weights"),
    ("pytorch without its end", lambda path: cut(path, tensors(), 0.99), "not a file of weights", "weights"),
    ("safetensors cut", safetensors({"a": slot(0, 16)}, bytes(9)), "not a file of weights", "weights"),
    ("patch size a lie", lambda path: exported(path, {"patch_size": "[99, 99, 99]"}), "does not explain", "transfer"),
    ("patch size absurd", lambda path: exported(path, {"patch_size": "9" * 10**5}), "does not explain", "transfer"),
    ("heads another number", lambda path: exported(path, {"num_heads": "6"}), "num_heads 6", "transfer"),
):  # fmt: skip
    ROWS.add("weights", name, build, rule, reader)


def cut(path: Path, build: Build, share: float) -> bytes:
    build(path)
    content = path.read_bytes()
    return content[: round(len(content) * share)]


def exported(path: Path, metadata: dict[str, str]) -> Path:
    state = {key: value.contiguous() for key, value in build_autoencoder(NETWORK, (32, 32, 32)).state_dict().items()}
    content = save(state, describe(NETWORK, (32, 32, 32)) | metadata)
    return other(path, "a.safetensors", lambda path: path.write_bytes(content))


# --- training states


def state(spoil: Callable[[Path], object], content: dict[str, Any] | None = None) -> Build:
    def build(path: Path) -> None:
        save_state(path, content or {"step": 3, "model": {"weight": torch.ones(4)}})
        spoil(path)

    return build


def manifest(text: str | bytes) -> Build:
    content = text.encode() if isinstance(text, str) else text
    return state(lambda path: (path / "manifest.json").write_bytes(content))


def resealed(content: Any) -> Build:
    """Another content, whose digest in the manifest is right."""

    def spoil(path: Path) -> None:
        torch.save(content, path / "state.pt")
        save_digest(path)

    return state(spoil)


def save_digest(path: Path) -> None:
    found = hashlib.sha256((path / "state.pt").read_bytes()).hexdigest()
    (path / "manifest.json").write_text(json.dumps({"sha256": found, "step": 3}))


def replaced(name: str, make: Callable[[Path], object]) -> Build:
    def spoil(path: Path) -> None:
        (path / name).unlink()
        make(path / name)

    return state(spoil)


for name, build, rule in (
    ("whole", state(lambda path: None), {"names": ["model", "step"]}),
    ("digest wrong", manifest('{"sha256": "00", "step": 3}'), "does not match its digest"),
    ("digest missing", manifest('{"step": 3}'), "does not match its digest"),
    ("digest a number", manifest('{"sha256": 5}'), ""), ("digest a list", manifest('{"sha256": [[]]}'), ""),
    ("manifest missing", state(lambda path: (path / "manifest.json").unlink()), ""),
    ("manifest empty", manifest(""), ""), ("manifest no JSON", manifest("{"), ""),
    ("manifest a list", manifest("[]"), ""), ("manifest a number", manifest("5"), ""),
    ("manifest null", manifest("null"), ""), ("manifest text", manifest('"sha256"'), ""),
    ("manifest no UTF-8", manifest(b"\xff\xfe{"), ""), ("manifest deep", manifest("[" * 10**5), ""),
    ("manifest of 5,000 digits", manifest('{"sha256": ' + "9" * 5000 + "}"), ""),
    ("manifest a FIFO", replaced("manifest.json", os.mkfifo), ""),
    ("manifest a folder", replaced("manifest.json", os.mkdir), ""),
    ("state missing", state(lambda path: (path / "state.pt").unlink()), ""),
    ("state a FIFO", replaced("state.pt", os.mkfifo), ""),
    ("state a folder", replaced("state.pt", os.mkdir), ""),
    ("state without end", replaced("state.pt", lambda path: path.symlink_to("/dev/zero")), ""),
    ("state cut", state(lambda path: os.truncate(path / "state.pt", 300)), "does not match its digest"),
    ("state is pickled code", resealed({"step": Attack("owned")}), "cannot be loaded"),
    ("state is a list", resealed([1, 2]), ""), ("state is a number", resealed(5), ""),
    ("state is a file", lambda path: b"checkpoint", ""), ("state is nowhere", lambda path: None, ""),
):  # fmt: skip
    ROWS.add("state", name, build, rule)


@pytest.fixture(scope="module")
def ask() -> Iterator[Callable[[str, Path], dict[str, Any]]]:
    """Reads a file in the probe's process."""
    with subprocess.Popen(
        [sys.executable, str(Path(__file__).with_name("hostile_probe.py"))],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        stdin, stdout = process.stdin, process.stdout

        def request(reader: str, path: Path) -> dict[str, Any]:
            print(json.dumps({"reader": reader, "path": os.fsencode(path).hex()}), file=stdin, flush=True)
            answer: dict[str, Any] = json.loads(stdout.readline())
            return answer

        yield request
        stdin.close()


@pytest.mark.parametrize("name", ROWS)
def test_hostile_input_is_refused_or_right(
    name: str, tmp_path: Path, ask: Callable[[str, Path], dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """One line that names file and rule, or the right result; no hang, no code run, memory in proportion."""
    reader, build, expected = ROWS[name]
    folder = tmp_path / "root"
    folder.mkdir()
    monkeypatch.chdir(folder)
    path = folder / f"hostile{ENDINGS.get(name.partition(':')[0], '.nii.gz')}"
    built = build(path)
    if isinstance(built, Path):
        path = built
    elif built is not None:
        path.write_bytes(built)
    answer = ask(reader, path)
    size = os.path.getsize(path) if os.path.isfile(path) else 0
    assert answer["error"] in (None, "ValueError", "UserError"), answer
    if isinstance(expected, dict):
        assert {key: answer.get(key) for key in expected} == expected, answer
    else:
        assert answer["error"] in ("ValueError", "UserError"), answer
        lines = answer["message"].splitlines()
        shown = "".join(sign if sign.isprintable() else repr(sign)[1:-1] for sign in str(path))
        assert len(lines) == 1, answer
        assert all(line.startswith(f"{shown}: ") for line in lines), answer
        assert expected in answer["message"]
        assert max(map(len, lines)) < len(shown) + 2000
    assert answer["megabytes"] < MEGABYTES + TIMES.get(reader, 10) * size / 2**20, answer
    assert not list(tmp_path.rglob("owned"))


@cache
def corpus(target: str) -> list[bytes]:
    return fuzz.seeds(target)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("fuzz")
    fuzz.furnish(folder)
    return folder


@pytest.mark.parametrize("target", fuzz.TARGETS)
@given(number=st.integers(0, 99), rng=st.randoms(use_true_random=False))
@settings(max_examples=150)
def test_damaged_input_is_refused_or_keeps_the_invariants(
    target: str, folder: Path, number: int, rng: random.Random
) -> None:
    """Flips, truncations, insertions and splices of a valid file: one line that names it, or a sound result."""
    contents = corpus(target)
    fuzz.TARGETS[target](fuzz.mutate(contents[number % len(contents)], rng, contents), folder)


@pytest.mark.parametrize("target", fuzz.TARGETS)
def test_undamaged_input_is_accepted(target: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first input that damage starts from is whole, or the tests above would show nothing."""
    refusals: list[ValueError] = []
    monkeypatch.setattr(fuzz, "refused", lambda error, *_, **__: refusals.append(error))
    fuzz.TARGETS[target](corpus(target)[-1 if target == "weights" else 0], folder)
    assert [str(error) for error in refusals if "a.pt" not in str(error)] == []


def test_the_fuzzer_counts_and_ends(tmp_path: Path) -> None:
    """`fuzz.py` ends after its runs with one JSON object and finds nothing in a few seconds."""
    script = Path(__file__).parents[1] / "fuzz.py"
    command = [sys.executable, str(script), "datalist", "--runs", "300", "--seconds", "60"]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"TMPDIR": str(tmp_path)})
    counts = json.loads(done.stdout.splitlines()[-1])
    assert (done.returncode, counts["executions"], counts["ok"]) == (0, 300, True), counts
    assert not list(tmp_path.iterdir())
