"""Reading NIfTI: what nibabel reads from files that are whole, one sentence on files that are not."""

import gzip
import itertools
import tracemalloc
import zlib
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from volumes import Array, oblique_affine, organ_labels, smooth_ct, write_nifti

from ssl_ray.data.nifti import Nifti, content_digest, on_image_grid, read_label, read_nifti, write_labels

SHAPE = (22, 26, 19)


AFFINE = oblique_affine((0.8, 1.1, 2.5), 25)


def compressed(array: Array | None = None, kind: Any = nib.Nifti1Image) -> bytes:
    """Bytes of a small .nii.gz, always the same."""
    array = smooth_ct((9, 8, 7)) if array is None else array
    return gzip.compress(kind(array, AFFINE).to_bytes(), mtime=0)


def refusal(content: bytes) -> str:
    with pytest.raises(ValueError, match=r"\S") as caught:
        read_nifti(Path("volume.nii.gz"), content)
    message = str(caught.value)
    assert message.startswith("volume.nii.gz: ")
    assert "\n" not in message
    return message


def with_header(change: Callable[[Any], object], array: Array | None = None) -> bytes:
    """A small .nii whose header was changed without nibabel's consent."""
    content: bytes = nib.Nifti1Image(smooth_ct((9, 8, 7)) if array is None else array, AFFINE).to_bytes()
    header = np.frombuffer(content[:348], nib.Nifti1Header.template_dtype).copy()
    change(header[0])
    return header.tobytes() + content[348:]


PAGE = b"<!DOCTYPE html>\n<html><head><title>404 Not Found</title></head>" + b"<p>not here</p>" * 50
ARRAYS = {
    "int16": smooth_ct((7, 6, 5)),
    "uint8": organ_labels((7, 6, 5)),
    "int32": smooth_ct((7, 6, 5)).astype(np.int32) * 1000,
    "uint16": smooth_ct((7, 6, 5)).view(np.uint16),
    "float32": smooth_ct((7, 6, 5)).astype(np.float32) / 7,
    "float64": smooth_ct((7, 6, 5)) / 7,
    "big-endian": smooth_ct((7, 6, 5)).astype(">i2"),
    "big-endian float": (smooth_ct((7, 6, 5)) / 7).astype(">f4"),
    "one frame": smooth_ct((7, 6, 5))[..., None],
    "one frame of 5D": smooth_ct((7, 6, 5))[..., None, None],
}


@pytest.mark.parametrize("suffix", [".nii", ".nii.gz"])
@pytest.mark.parametrize("kind", [nib.Nifti1Image, nib.Nifti2Image])
@pytest.mark.parametrize("name", ARRAYS)
def test_voxels_and_affine_are_those_of_nibabel(tmp_path: Path, name: str, kind: Any, suffix: str) -> None:
    """Every type, byte order, version and suffix reads as with nibabel."""
    array = ARRAYS[name]
    header = kind.header_class(endianness=">" if "big" in name else "<")
    header.set_data_dtype(array.dtype)
    path = tmp_path / f"volume{suffix}"
    nib.save(kind(array, AFFINE, header), path)
    assert (path.read_bytes()[:2] == b"\x1f\x8b") == (suffix == ".nii.gz")
    expected = nib.load(path)
    assert expected.get_data_dtype() == array.dtype
    read = read_nifti(path)
    np.testing.assert_array_equal(read.voxels, expected.get_fdata(dtype=np.float32).reshape(7, 6, 5))
    np.testing.assert_array_equal(read.affine, expected.affine)
    assert read.voxels.dtype == np.float32
    assert read.affine.dtype == np.float64


def test_scale_and_intercept_are_applied(tmp_path: Path) -> None:
    """Stored values become HU by the header's slope and intercept, as with nibabel."""
    image = nib.Nifti1Image(smooth_ct((7, 6, 5)), AFFINE)
    image.header.set_slope_inter(0.5, -1024)
    path = tmp_path / "volume.nii.gz"
    content = image.to_bytes()
    header = np.frombuffer(content[:348], nib.Nifti1Header.template_dtype).copy()
    header["scl_slope"], header["scl_inter"] = 0.5, -1024
    path.write_bytes(gzip.compress(header.tobytes() + content[348:]))
    expected = nib.load(path)
    assert expected.dataobj.slope == 0.5
    np.testing.assert_array_equal(read_nifti(path).voxels, expected.get_fdata(dtype=np.float32))


def test_the_world_is_that_of_nibabel_without_any_form() -> None:
    """Without sform, with a qform or with neither, the affine is the one that nibabel takes."""
    for codes in ((0, 1), (1, 0), (1, 1), (0, 0)):
        image = nib.Nifti1Image(smooth_ct((9, 8, 7)), AFFINE)
        image.set_sform(AFFINE, codes[0])
        image.set_qform(oblique_affine((1, 2, 3), 10), codes[1])
        content = image.to_bytes()
        expected = nib.Nifti1Image.from_bytes(content).affine
        np.testing.assert_array_equal(read_nifti(Path("v.nii"), content).affine, expected)


def with_forms(sform: Array, qform: Array) -> bytes:
    """A small .nii with both forms; a qform holds no shear."""
    image = nib.Nifti1Image(smooth_ct((9, 8, 7)), sform)
    image.set_sform(sform, 2)
    image.set_qform(qform, 1)
    content: bytes = image.to_bytes()
    return content


def test_forms_that_mirror_or_turn_each_other_are_refused() -> None:
    """Another program reads the qform: a label map that was drawn there would lie on the other side here."""
    mirror = np.diag([-1.0, 1, 1, 1])
    mirror[0, 3] = 8  # over the same box
    for other in (mirror, np.eye(4)[[1, 0, 2, 3]]):
        assert "its sform has axes" in refusal(with_forms(AFFINE, AFFINE @ other))
    sheared = AFFINE.copy()
    sheared[:3, 2] += 0.4 * AFFINE[:3, 1]
    aligned = oblique_affine((0.8, 1.1, 2.5), 45)
    for sform, qform in ((AFFINE, AFFINE + 1e-4), (sheared, sheared), (aligned, AFFINE), (AFFINE, aligned)):
        np.testing.assert_allclose(read_nifti(Path("v.nii"), with_forms(sform, qform)).affine, sform, rtol=1e-6)


def test_a_label_on_the_other_form_is_refused_with_the_cause() -> None:
    """Where the forms of an image differ without turning it, a label map of the other one lies elsewhere."""
    moved = AFFINE.copy()
    moved[:3, 3] += 5
    image = read_nifti(Path("i.nii"), with_forms(AFFINE, moved))
    with pytest.raises(ValueError, match="from those of its image, whose sform and qform differ"):
        on_image_grid(image, Nifti(image.voxels, moved), Path("l.nii"))
    same = read_nifti(Path("i.nii"), with_forms(AFFINE, AFFINE))
    with pytest.raises(ValueError, match=r"from those of its image$"):
        on_image_grid(same, Nifti(image.voxels, moved), Path("l.nii"))


@pytest.mark.parametrize(("unit", "mm"), [("unknown", 1), ("mm", 1), ("meter", 1000), ("micron", 0.001)])
@pytest.mark.parametrize("forms", [(1, 0), (0, 1), (0, 0)])
def test_lengths_are_in_the_unit_of_the_header(tmp_path: Path, unit: str, mm: float, forms: tuple[int, int]) -> None:
    """Whichever form says where the voxels lie; a label map of the scan lies there too, in mm."""
    stored = AFFINE.copy()
    stored[:3] /= mm
    image = nib.Nifti1Image(smooth_ct((9, 8, 7)), stored)
    image.set_sform(stored, forms[0])
    image.set_qform(stored, forms[1])
    image.header.set_xyzt_units(unit)
    scan = read_nifti(Path("v.nii"), image.to_bytes())
    np.testing.assert_allclose(scan.affine[:3] / mm, image.header.get_best_affine()[:3], rtol=1e-5)
    write_labels(tmp_path / "l.nii.gz", np.ones((9, 8, 7), np.uint8), scan.header)
    on_image_grid(scan, read_label(tmp_path / "l.nii.gz"), tmp_path)
    np.testing.assert_allclose(nib.load(tmp_path / "l.nii.gz").affine, scan.affine, rtol=1e-5)


@pytest.mark.parametrize("kind", [nib.Nifti1Image, nib.Nifti2Image])
def test_label_maps_do_not_name_the_patient(tmp_path: Path, kind: Any) -> None:
    """No text of the scan's header is in that of a label map."""
    image = kind(smooth_ct((9, 8, 7)), AFFINE)
    for field in {"descrip", "aux_file", "db_name", "data_type", "intent_name"}.intersection(image.header.keys()):
        image.header[field] = b"MUSTERMANN"
    scan = read_nifti(Path("v.nii"), image.to_bytes())
    write_labels(tmp_path / "l.nii.gz", np.ones((9, 8, 7), np.uint8), scan.header)
    assert b"MUSTERMANN" in image.to_bytes()
    assert b"MUSTERMANN" not in gzip.decompress((tmp_path / "l.nii.gz").read_bytes())


@pytest.mark.parametrize("kind", [nib.Nifti1Image, nib.Nifti2Image])
@pytest.mark.parametrize("compress", [gzip.compress, bytes], ids=["gz", "plain"])
def test_header_extensions_are_skipped(kind: Any, compress: Callable[[bytes], bytes]) -> None:
    """Extensions, which may be longer than the header itself, do not shift the voxels."""
    image = kind(smooth_ct((9, 8, 7)), AFFINE)
    image.header.extensions.append(nib.nifti1.Nifti1Extension("comment", b"x" * 5000))
    read = read_nifti(Path("v.nii.gz"), compress(image.to_bytes()))
    np.testing.assert_array_equal(read.voxels, smooth_ct((9, 8, 7)))


@given(st.lists(st.integers(0, 1500), max_size=6))
@settings(max_examples=30)
def test_gzip_members_are_joined(cuts: list[int]) -> None:
    """A stream of several gzip members, empty ones and short ones too, is the stream of their contents."""
    content = nib.Nifti1Image(smooth_ct((9, 8, 7)), AFFINE).to_bytes()
    edges = [0, *sorted(cuts), len(content)]
    members = [gzip.compress(content[a:b]) for a, b in itertools.pairwise(edges)]
    np.testing.assert_array_equal(read_nifti(Path("v.nii.gz"), b"".join(members)).voxels, smooth_ct((9, 8, 7)))
    damaged = bytearray(members[-1])
    damaged[-6] ^= 1
    assert "CRC check failed" in refusal(b"".join(members[:-1]) + bytes(damaged))


def test_bytes_after_the_voxels_are_allowed() -> None:
    """A longer file is read, and its checksum still verified."""
    content = nib.Nifti1Image(smooth_ct((9, 8, 7)), AFFINE).to_bytes() + b"more" * 50
    for whole in (content, gzip.compress(content), gzip.compress(content) + b"\0" * 512):
        np.testing.assert_array_equal(read_nifti(Path("v.nii"), whole).voxels, smooth_ct((9, 8, 7)))
    damaged = bytearray(gzip.compress(content))
    damaged[-6] ^= 1
    assert "CRC check failed" in refusal(bytes(damaged))


@given(st.integers(0, len(compressed()) - 1))
def test_a_truncated_gzip_is_refused(cut: int) -> None:
    """Wherever the download stopped, the file is refused."""
    refusal(compressed()[:cut])


@given(st.integers(0, len(nib.Nifti1Image(smooth_ct((9, 8, 7)), AFFINE).to_bytes()) - 1))
@settings(max_examples=40)
def test_a_truncated_nii_is_refused(cut: int) -> None:
    """The same without compression."""
    refusal(nib.Nifti1Image(smooth_ct((9, 8, 7)), AFFINE).to_bytes()[:cut])


@given(st.integers(10, len(compressed()) - 1), st.integers(1, 255))
@settings(max_examples=300)
def test_a_flipped_byte_never_gives_other_voxels(place: int, flip: int) -> None:
    """Whatever byte of the compressed stream is damaged, the volume is refused, or the damage is of no effect."""
    damaged = bytearray(compressed())
    damaged[place] ^= flip
    with suppress(ValueError):
        voxels = read_nifti(Path("volume.nii.gz"), bytes(damaged)).voxels
        np.testing.assert_array_equal(voxels, smooth_ct((9, 8, 7)))


@given(st.lists(st.tuples(st.integers(0, 351), st.integers(0, 255)), min_size=1, max_size=6), st.booleans())
@settings(max_examples=150)
def test_any_header_is_read_or_refused(changes: list[tuple[int, int]], pack: bool) -> None:
    """Whatever stands in the header, the outcome is a finite volume or a ValueError, and little memory."""
    content = bytearray(nib.Nifti1Image(smooth_ct((9, 8, 7)), AFFINE).to_bytes())
    for place, value in changes:
        content[place] = value
    read, message = None, "v.nii: "
    try:
        read = read_nifti(Path("v.nii"), gzip.compress(bytes(content), 1) if pack else bytes(content))
    except ValueError as error:
        message = str(error)
    assert message.startswith("v.nii: ")
    if read:
        assert read.voxels.ndim == 3
        assert read.voxels.nbytes <= 4 * len(content)
        assert np.isfinite(read.voxels).all()
        assert np.isfinite(np.linalg.inv(read.affine)).all()


@pytest.mark.parametrize("sides", [(30000, 30000, 30000), (2000, 2000, 50)])
def test_absurd_dimensions_do_not_allocate(sides: tuple[int, int, int]) -> None:
    """A small file that promises a huge volume is refused without memory for it."""
    content = with_header(lambda header: header["dim"].__setitem__(slice(1, 4), sides))
    for whole in (content, gzip.compress(content), gzip.compress(content + bytes(2**20), mtime=0)):
        tracemalloc.start()
        refusal(whole)
        assert tracemalloc.get_traced_memory()[1] < 2**24
        tracemalloc.stop()


def test_a_lying_header_gets_no_more_memory_than_the_stream_holds() -> None:
    """A promise that the compression ratio would just allow is not believed in advance."""
    content = with_header(lambda header: header["dim"].__setitem__(slice(1, 4), (400, 400, 400)))
    packer = zlib.compressobj(0, zlib.DEFLATED, 31)
    stored = packer.compress(content + bytes(2**17)) + packer.flush()
    tracemalloc.start()
    assert "truncated: " in refusal(stored)
    assert tracemalloc.get_traced_memory()[1] < 2**25
    tracemalloc.stop()


@pytest.mark.parametrize(
    ("content", "rule"),
    [
        (b"", "not a NIfTI file: 0 bytes of header, expected at least 352"),
        (gzip.compress(b"", mtime=0), "not a NIfTI file: 0 bytes of header, expected at least 352"),
        (b"not a volume\n" * 100, "not "),
        (gzip.compress(b"not a volume\n" * 100, mtime=0), "not "),
        (b"\x1f\x8b", "ended before the end-of-stream"),
        (b"PK\x03\x04" + bytes(1000), "not a NIfTI file but a zip archive"),
        (PAGE, "not a NIfTI file but a web page or XML, as a failed download leaves it"),
        (gzip.compress(b"\xef\xbb\xbf\r\n" + PAGE, mtime=0), "not a NIfTI file but a web page or XML"),
        (b"<html>", "not a NIfTI file but a web page or XML"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n", "`git lfs pull` replaces"),
        (b"/annex/objects/MD5E-s5000--0123.nii.gz\n", "`git annex get` replaces"),
        (b'{"error": "no such series"}', "not a NIfTI file but JSON"),
        (bytes(128) + b"DICM" + bytes(500), "not a NIfTI file but a DICOM file"),
        (gzip.compress(compressed(), mtime=0), "not a NIfTI file but a gzip inside of a gzip"),
        (compressed(smooth_ct((9, 8, 7))[:, :, 0]), "must be a 3D volume, got shape (9, 8)"),
        (compressed(np.stack([smooth_ct((9, 8, 7))] * 2, -1)), "must be a 3D volume, got shape (9, 8, 7, 2)"),
        (compressed(smooth_ct((9, 8, 7))[:, :1]), "every axis must have at least 2 voxels, got shape (9, 1, 7)"),
        (compressed(np.where(np.eye(5)[..., None] > np.zeros(5), np.nan, 1.0).astype(np.float32)),
         "25 of 125 voxels are not finite (NaN or infinite)"),
        (compressed(np.full((3, 3, 3), np.inf, np.float32)), "27 of 27 voxels are not finite"),
        (compressed(np.zeros((3, 3, 3), [("R", "u1"), ("G", "u1"), ("B", "u1")])), "voxels must be integers or floats"),
        (compressed(np.zeros((3, 3, 3), np.complex64)), "voxels must be integers or floats, got complex64"),
        (with_header(lambda h: h.__setitem__("magic", b"ni1")), "not a single-file NIfTI: magic b'ni1'"),
        (with_header(lambda h: h.__setitem__("magic", b"abc")), "not a single-file NIfTI: magic b'abc'"),
        (with_header(lambda h: h.__setitem__("datatype", 77)), "data code 77 not recognized"),
        (with_header(lambda h: h["srow_y"].__setitem__(1, np.nan)), "the affine must be finite, with voxel sides"),
        (with_header(lambda h: h["srow_y"].fill(0)), "the affine must be finite, with voxel sides"),
        (with_header(lambda h: [h[f"srow_{axis}"].fill(0) for axis in "xyz"]), "the affine must be finite, with"),
        (with_header(lambda h: h["dim"].__setitem__(1, -9)), "must have at least 2 voxels, got shape (-9, 8, 7)"),
        (with_header(lambda h: h["dim"].__setitem__(1, 10)), "truncated: "),
        (with_header(lambda h: h.__setitem__("vox_offset", np.nan)), "vox_offset"),
        (with_header(lambda h: h.__setitem__("vox_offset", 1e30)), "vox_offset"),
    ],
)  # fmt: skip
def test_what_is_no_volume_is_refused(content: bytes, rule: str) -> None:
    """Other files, other dimensions, other types, broken affines: one sentence with the file, the rule, the value."""
    assert rule in refusal(content)


def test_what_cannot_be_opened_is_refused(tmp_path: Path) -> None:
    """A missing file and a folder are named."""
    with pytest.raises(ValueError, match=r"no\.nii: cannot read: No such file"):
        read_nifti(tmp_path / "no.nii")
    with pytest.raises(ValueError, match="cannot read: Is a directory"):
        read_nifti(tmp_path)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (256, "got values from 0 to 256$"),
        (-1, "got values from -1 to 255$"),
        (0.9882, r"must be integers in 0\.\.255, got 0\.9882 and 2 more that are none: was it interpolated"),
    ],
)
def test_labels_are_small_integers(tmp_path: Path, value: float, message: str) -> None:
    """A label map may be stored as floats, but holds integers in 0..255 only; the message has the value at fault."""
    array = np.zeros((4, 4, 4), np.float32)
    array[1, 2, 3] = 255
    path = write_nifti(tmp_path / "label.nii.gz", array, AFFINE)
    np.testing.assert_array_equal(read_label(path).voxels, array)
    rounded = write_nifti(tmp_path / "rounded.nii.gz", array + np.where(array > 0, 1e-4, -1e-5).astype("f4"), AFFINE)
    np.testing.assert_array_equal(read_label(rounded).voxels, array)
    array[0, 0, :3] = value
    with pytest.raises(ValueError, match=message) as caught:
        read_label(write_nifti(path, array, AFFINE))
    assert str(caught.value).startswith(f"{path}: ")


def test_labels_that_were_stored_with_a_slope_are_integers(tmp_path: Path) -> None:
    """nibabel keeps floats in 16 bits by a slope, which gives 12.9999 for 13: that is rounding, no interpolation."""
    labels = np.linspace(0, 13, 14).reshape(2, 7, 1).repeat(3, axis=2)
    image = nib.Nifti1Image(labels, AFFINE)
    image.set_data_dtype(np.uint16)
    nib.save(image, path := tmp_path / "label.nii.gz")
    assert not np.array_equal(nib.load(path).get_fdata(), labels)
    np.testing.assert_array_equal(read_label(path).voxels, labels)


def test_a_label_lies_on_the_grid_of_its_image() -> None:
    """Another shape and an affine more than a tenth of a voxel off are refused; rounding is not."""
    image = Nifti(np.zeros(SHAPE, np.float32), AFFINE)
    place = Path("label.nii.gz")
    on_image_grid(image, Nifti(image.voxels, AFFINE.astype(np.float32).astype(np.float64)), place)
    shifted = AFFINE.copy()
    for shift, fits in ((0.079, True), (0.081, False)):  # the smallest voxel side is 0.8 mm
        shifted[0, 3] = AFFINE[0, 3] + shift
        if fits:
            on_image_grid(image, Nifti(image.voxels, shifted), place)
        else:
            with pytest.raises(ValueError, match=r"label\.nii\.gz: the label's affine puts its voxels up to 0\.081 mm"):
                on_image_grid(image, Nifti(image.voxels, shifted), place)
    turned = AFFINE @ np.diag([1, 1, 1.01, 1])  # agrees at the origin, not at the far corner
    with pytest.raises(ValueError, match=r"up to 0\.45 mm"):
        on_image_grid(image, Nifti(image.voxels, turned), place)
    with pytest.raises(ValueError, match=r"the label has shape \(22, 19, 26\), its image \(22, 26, 19\)"):
        on_image_grid(image, Nifti(image.voxels.swapaxes(1, 2), AFFINE), place)
    mirrored = AFFINE @ np.diag([-1, 1, 1, 1])  # a direction that the voxels do not have: they lie beside the image
    with pytest.raises(ValueError, match=r"up to 16\.8 mm"):
        on_image_grid(image, Nifti(image.voxels, mirrored), place)


ORIENTATIONS = ["RAS", "LPS", "PIR", "ASL", "SAL"]


def reoriented(array: Array, axes: str) -> nib.Nifti1Image:
    """The volume in another order and direction of axes, by nibabel."""
    image = nib.Nifti1Image(array, oblique_affine((0.8, 1.1, 2.5), 15))
    turn = nib.orientations.ornt_transform(nib.io_orientation(image.affine), nib.orientations.axcodes2ornt(axes))
    return image.as_reoriented(turn)


@pytest.mark.parametrize("axes", ORIENTATIONS)
def test_a_label_in_another_orientation_is_taken_as_such(axes: str) -> None:
    """A RAS label of an LPS image on the same physical grid is right input, whatever the order of its axes."""
    image, labels = (Nifti(np.float32(one.dataobj), one.affine) for one in (
        reoriented(smooth_ct(SHAPE), "LPS"), reoriented(organ_labels(SHAPE), axes)
    ))  # fmt: skip
    found = on_image_grid(image, labels, Path("label.nii.gz"))
    np.testing.assert_array_equal(found.voxels, np.asarray(reoriented(organ_labels(SHAPE), "LPS").dataobj))
    np.testing.assert_array_equal(found.affine, image.affine)


def test_the_same_scan_has_the_same_digest(tmp_path: Path) -> None:
    """Neither compression, type, slope nor the order of axes count, but any voxel, the shape and a shift in them do."""
    hu = smooth_ct(SHAPE)
    digest = content_digest(read_nifti(write_nifti(tmp_path / "scan.nii.gz", hu, AFFINE)))
    sloped = nib.Nifti1Image(hu.astype(np.float64), AFFINE)
    sloped.set_data_dtype(np.uint16)
    nib.save(sloped, tmp_path / "sloped.nii")
    nib.save(nib.Nifti2Image(hu.astype(np.float32), AFFINE), tmp_path / "other.nii")
    for name in ("sloped.nii", "other.nii"):
        assert content_digest(read_nifti(tmp_path / name)) == digest
    for axes in ORIENTATIONS:
        turned = reoriented(hu, axes)
        assert content_digest(Nifti(np.float32(turned.dataobj), turned.affine)) == digest
    changed = hu.copy()
    changed[4, 5, 6] += 1
    others = changed, np.roll(hu, 1, 2), hu[:-1], hu.reshape(26, 22, 19), hu[::-1]
    digests = {content_digest(Nifti(np.float32(other), AFFINE)) for other in others}
    assert len(digests | {digest}) == 6


def test_a_quaternion_that_is_too_long_by_rounding_is_read() -> None:
    """Scanners write half a turn with a quaternion that is off unit by 1e-6; a longer one is no rotation."""
    half_turn = np.array([0.6, 0.8, 0.0])
    affine = np.diag([1.0, 2, 3, 1])
    affine[:3, :3] = (2 * np.outer(half_turn, half_turn) - np.eye(3)) * (1, 2, 3)
    for kind in (nib.Nifti1Image, nib.Nifti2Image):
        for off in (0, 1e-7, 1e-6, 1e-4, 3e-3):
            image = kind(smooth_ct((9, 8, 7)), None)
            image.set_qform(affine, 1)
            content = image.to_bytes()
            length = kind.header_class.sizeof_hdr
            header = np.frombuffer(content[:length], kind.header_class.template_dtype).copy()
            for axis, value in zip("bcd", half_turn * (1 + off), strict=True):
                header[f"quatern_{axis}"] = value
            changed = header.tobytes() + content[length:]
            if off < 1e-3:
                np.testing.assert_allclose(read_nifti(Path("v.nii"), changed).affine, affine, atol=1e-5)
            else:
                assert "w2 should be positive" in refusal(changed)


def test_what_nibabel_mends_is_logged_with_the_file(caplog: pytest.LogCaptureFixture) -> None:
    """Once, and with the name: a cohort has a thousand files."""
    content = with_header(lambda header: header["pixdim"].__setitem__(2, -1.1))
    read_nifti(Path("scans/v17.nii"), content)
    (line,) = [record.getMessage() for record in caplog.records]
    assert line.startswith("scans/v17.nii: pixdim")
