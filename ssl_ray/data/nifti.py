"""Reading NIfTI files that others wrote: a volume of finite voxels, or one line that says what is wrong with the file.

One bad volume among thousands must be named; it must not crash a run, stall it or fill the memory. So nothing that a
header promises is believed before the bytes are there.
"""

import hashlib
import io
import logging
import math
from collections.abc import MutableMapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import numpy.typing as npt
from isal import igzip, isal_zlib
from nibabel.arrayproxy import ArrayProxy
from nibabel.filebasedimages import ImageFileError
from nibabel.spatialimages import HeaderDataError

from ssl_ray.errors import UserError
from ssl_ray.storage.files import appearing, read_file
from ssl_ray.text import shown

_MOST_VOXELS = 2**31
"""Voxels of a file, more than a photon-counting CT of a whole body has."""
_MOST_EXTENSION = 2**26
"""Bytes in front of the voxels; in a compressed file, a kilobyte can hold a megabyte of them."""
_CHUNK = 2**22
"""Bytes that are decompressed at a time."""
_OTHERS = {
    b"version https://git-lfs": "a Git LFS pointer, which `git lfs pull` replaces by the volume",
    b"/annex/objects/": "a git-annex pointer, which `git annex get` replaces by the volume",
    b"<": "a web page or XML, as a failed download leaves it",
    b"{": "JSON, as a failed download leaves it",
    b"PK\x03\x04": "a zip archive",
    b"\x1f\x8b": "a gzip inside of a gzip",
    b"BZh": "compressed by bzip2",
    b"\xfd7zXZ": "compressed by xz",
    b"\0" * 128 + b"DICM": "a DICOM file",
    b"NRRD": "an NRRD file",
}
"""What is found under a volume's name, by how it begins."""
_BLANK = b"\xef\xbb\xbf \t\r\n"
"""What may stand before it: blanks and a byte order mark."""
_LONG_QUATERNION = 1.001
"""Scanners write unit quaternions in few digits; a longer one than this is no rotation."""
_TO_MM = {1: 1e3, 3: 1e-3}
"""Of the unit in a header: metre and micron (NIfTI-1's `xyzt_units`); what has no unit is in mm."""
_TEXT = ("descrip", "aux_file", "db_name", "data_type", "unused_str")
"""Fields of a header in which programs leave names of patients and files."""
_SCALED = 1e-3
"""Labels that a program stored as floats, or with a slope, are this close to integers."""


@dataclass(frozen=True)
class Nifti:
    """Voxels (X, Y, Z) as float32, in HU or label values, and the affine (4, 4) from voxels to mm, RAS+.

    `header`: nibabel's, of a volume that was read from a file.
    """

    voxels: npt.NDArray[np.float32]
    affine: npt.NDArray[np.float64]
    header: Any = None


def read_nifti(path: Path, content: bytes | None = None) -> Nifti:
    """Read a .nii or .nii.gz file, or `content` if the caller has read its bytes already.

    What is not a whole, finite 3D volume with an invertible affine is a UserError.
    """
    place = shown(path, 5000)
    try:
        raw = read_file(path) if content is None else content
    except OSError as error:
        raise UserError(f"{place}: cannot read: {error.strerror}") from error
    try:
        header, raw = _parse(raw, place)
        affine = header_affine(header)
        with np.errstate(over="ignore"):  # what overflows float32 becomes infinite, which is refused below
            voxels = np.asanyarray(ArrayProxy(io.BytesIO(raw), header), dtype=np.float32)
    except (HeaderDataError, ImageFileError, isal_zlib.error, EOFError, OSError, OverflowError, ValueError) as error:
        raise UserError(f"{place}: {' '.join(str(error).split())}") from error
    if not np.isfinite([voxels.min(), voxels.max()]).all():  # NaN would be both
        count = int(voxels.size - np.isfinite(voxels).sum())
        raise UserError(f"{place}: {count} of {voxels.size} voxels are not finite (NaN or infinite)")
    return Nifti(voxels.reshape(voxels.shape[:3]), affine, header)


def read_label(path: Path, content: bytes | None = None) -> Nifti:
    """Read one label map as `read_nifti` does; values that are not integers in 0..255, up to rounding, are refused."""
    label = read_nifti(path, content)
    rule = f"{shown(path, 5000)}: label values must be integers in 0..255, got"
    low, high, voxels = float(label.voxels.min()), float(label.voxels.max()), np.rint(label.voxels)
    if low < -_SCALED or high > 255 + _SCALED:
        raise UserError(f"{rule} values from {low:g} to {high:g}")
    broken = label.voxels[np.abs(label.voxels - voxels) > _SCALED]
    if broken.size:
        raise UserError(
            f"{rule} {broken[0]:.4g} and {broken.size - 1} more that are none: was it interpolated when it was "
            "resampled, or is it no label map?"
        )
    return Nifti(voxels, label.affine)


def write_labels(path: Path, labels: npt.NDArray[np.uint8], header: Any) -> None:
    """Write a label map (X, Y, Z) as .nii.gz, complete or not at all, under the header of the scan that it is of.

    Grid, affines and their codes are the scan's; its extensions and texts, which may name the patient, are left out.
    """
    header = header.copy()
    header.set_data_dtype(np.uint8)
    header.set_data_shape(labels.shape)
    header.set_intent("label")
    header["cal_min"] = header["cal_max"] = 0
    for field in set(header.keys()).intersection(_TEXT):
        header[field] = b""
    kind = nib.Nifti2Image if isinstance(header, nib.Nifti2Header) else nib.Nifti1Image
    # Neither the time nor a name in the gzip: the same labels are the same file.
    with appearing(path) as part, part.open("wb") as raw, igzip.IGzipFile("", "wb", fileobj=raw, mtime=0) as file:
        kind(labels, header.get_best_affine(), header).to_stream(file)


def on_image_grid(image: Nifti, other: Nifti, place: Path, what: str = "label") -> Nifti:
    """A label map, or another channel, with its axes in the order and direction of its image's, and with its affine.

    Both files may lay out the same physical grid in their own way. Refused, as the file `place`, is what has another
    shape than the image, or corner voxels more than 0.1 voxel from the image's; `what` it is, is for the message.
    """
    turn = nib.io_orientation(np.linalg.solve(image.affine, other.affine))
    voxels = nib.apply_orientation(other.voxels, turn)
    if image.voxels.shape != voxels.shape:
        raise UserError(f"{place}: the {what} has shape {other.voxels.shape}, its image {image.voxels.shape}")
    affine = other.affine @ nib.orientations.inv_ornt_aff(turn, other.voxels.shape)
    corners = np.array([*np.ndindex(2, 2, 2)]) * (np.array(voxels.shape) - 1)
    apart = nib.affines.apply_affine(image.affine, corners) - nib.affines.apply_affine(affine, corners)
    worst, voxel = float(np.linalg.norm(apart, axis=1).max()), float(nib.affines.voxel_sizes(image.affine).min())
    if worst > 0.1 * voxel:
        why = f"the {what}'s affine puts its voxels up to {worst:.3g} mm from those of its image"
        turns = _turns_of_forms(image.header)
        if turns is not None and not np.allclose(turns, np.eye(4), atol=1e-3):
            why += ", whose sform and qform differ: was the other one read where it was made?"
        raise UserError(f"{place}: {why}")
    return Nifti(voxels.copy(order="K"), image.affine)  # torch takes no axis that runs backwards in memory


def content_digest(scan: Nifti) -> str:
    """The same for the same voxels, to the whole HU, whatever the file's name, format, compression and order of axes.

    Values of no CT, that span less than 16 units, are rounded to a thousandth of that. It is the SHA-256 of the shape
    and of a checksum of every slice, which takes a twentieth of the voxels' own.
    """
    turned = nib.apply_orientation(scan.voxels, nib.io_orientation(scan.affine)).T
    span = np.ptp(turned[::4, ::4, ::4])
    slices = np.rint(turned * (1000 / span) if 0 < span < 16 else turned, order="C")
    slices += 0  # no negative zero
    checksums = [isal_zlib.crc32(one) for one in slices]
    return hashlib.sha256(f"{slices.shape} {checksums}".encode()).hexdigest()


class _NamedLog(logging.LoggerAdapter[logging.Logger]):
    """nibabel's log, with the file's name before what it mends in a header."""

    def process(self, msg: Any, kwargs: MutableMapping[str, Any]) -> tuple[Any, MutableMapping[str, Any]]:
        """Called for every line."""
        return f"{self.extra and self.extra['place']}: {msg}", kwargs


def _parse(raw: bytes, place: str) -> tuple[Any, bytes]:
    """Header and content of a whole volume; the errors, of several types, do not name the file."""
    compressed = raw[:2] == b"\x1f\x8b"
    with igzip.open(io.BytesIO(raw)) if compressed else io.BytesIO(raw) as stream:
        head = stream.read(544)
        second = 540 in (int.from_bytes(head[:4], order) for order in ("little", "big"))
        kind = nib.Nifti2Header if second else nib.Nifti1Header
        other = next((what for start, what in _OTHERS.items() if head.lstrip(_BLANK).startswith(start)), None)
        if other and head[344:347] != b"n+1":
            raise ValueError(f"not a NIfTI file but {other}")
        if len(head) < (least := kind.single_vox_offset):
            raise ValueError(f"not a NIfTI file: {len(head)} bytes of header, expected at least {least}")
        header = kind(head[: kind.sizeof_hdr], check=False)
        size = _check_header(header, place)
        if compressed:
            raw = _inflate(head, stream, size)
    if len(raw) < size:
        raise ValueError(f"truncated: {len(raw)} bytes of the {size} that the header promises")
    return header, raw


def _check_header(header: Any, place: str) -> int:
    """Bytes that the whole file must have by its header."""
    magic, start, least = header["magic"].item(), float(header["vox_offset"]), header.single_vox_offset
    if magic[:3] not in (b"n+1", b"n+2"):
        raise ValueError(f"not a single-file NIfTI: magic {magic!r}")
    if not least <= start <= _MOST_EXTENSION or not start.is_integer():
        raise ValueError(f"vox_offset must be an integer from {least} to {_MOST_EXTENSION}, got {start:g}")
    header.check_fix(_NamedLog(nib.imageglobals.logger, {"place": place}))
    shape, dtype = header.get_data_shape(), header.get_data_dtype()
    if dtype.kind not in "iuf":
        raise ValueError(f"voxels must be integers or floats, got {dtype}")
    if len(shape) < 3 or any(side != 1 for side in shape[3:]):
        mend = "; split it into a file for each channel and list them as `image: [a, b]`" if len(shape) > 3 else ""
        raise ValueError(f"must be a 3D volume, got shape {tuple(shape)}{mend}")
    if min(shape[:3]) < 2:
        raise ValueError(f"every axis must have at least 2 voxels, got shape {tuple(shape)}")
    count = math.prod(int(side) for side in shape)
    if count > _MOST_VOXELS:
        raise ValueError(f"shape {tuple(shape)} are {count:.3g} voxels, more than {_MOST_VOXELS}")
    # A slope of NaN or 0 means "not given" (NIfTI, SPM). nibabel would take an infinite one for that, too.
    if math.isinf(header["scl_slope"]):
        raise ValueError(f"scl_slope must be finite, got {header['scl_slope']}")
    return int(start) + count * int(dtype.itemsize)


def header_affine(header: Any) -> npt.NDArray[np.float64]:
    """The affine (4, 4) in mm of a header, which is brought to mm, and in which a quaternion that is too long by
    rounding becomes a unit one. Refused are two forms between which programs differ in where left is.
    """
    if scale := _TO_MM.get(int(header["xyzt_units"]) & 7):
        for field in ("srow_x", "srow_y", "srow_z", "qoffset_x", "qoffset_y", "qoffset_z"):
            header[field] = header[field] * scale
        header["pixdim"][1:4] *= scale
        header["xyzt_units"] = int(header["xyzt_units"]) & ~7 | 2
    quaternion = [f"quatern_{axis}" for axis in "bcd"]
    length = np.linalg.norm([float(header[part]) for part in quaternion])
    if header.quaternion_threshold < length**2 - 1 and length < _LONG_QUATERNION:  # nibabel would refuse it
        for part in quaternion:
            header[part] = header[part] / length
    affine = checked_affine(np.asarray(header.get_best_affine(), np.float64))
    turns = _turns_of_forms(header)
    if turns is not None and (nib.io_orientation(turns) != [[0, 1], [1, 1], [2, 1]]).any():
        axes = ["".join(nib.aff2axcodes(form)) for form in (affine, affine @ turns)]
        raise ValueError(
            f"its sform has axes {axes[0]} and its qform {axes[1]}, and programs read the one or the other: set the "
            "code of the wrong one to 0"
        )
    return affine


def _turns_of_forms(header: Any) -> npt.NDArray[np.float64] | None:
    """The affine (4, 4) from voxels by the qform to voxels by the sform; None where a header has not both."""
    if header is None or min(header["sform_code"], header["qform_code"]) < 1:
        return None
    try:
        turns: npt.NDArray[np.float64] = np.linalg.solve(header.get_sform(), header.get_qform())
    except (HeaderDataError, np.linalg.LinAlgError):  # no rotation: no program reads it
        return None
    return turns if np.isfinite(turns).all() and abs(np.linalg.det(turns)) > 1e-9 else None


def checked_affine(affine: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """An affine (4, 4) from voxels to mm, or a ValueError where it is none that a scan has."""
    with np.errstate(all="ignore"):  # numbers that overflow are refused below
        sides, volume = nib.affines.voxel_sizes(affine), abs(np.linalg.det(affine[:3, :3]))
    apart = volume > 1e-9 and volume >= 1e-3 * sides.prod()
    if not (apart and sides.min() >= 1e-3 and sides.max() <= 1e3 and np.abs(affine[:3, 3]).max() <= 1e6):
        raise ValueError(
            "the affine must be finite, with voxel sides of 0.001 to 1000 mm, axes that are not parallel and an origin "
            f"within 1 km, got {affine.tolist()}"
        )
    return affine


def _inflate(head: bytes, stream: Any, size: int) -> bytes:
    """At least the first `size` bytes of a gzip, of which `head` has been read; refuses a bomb that holds far more.

    The stream is read to its end, because the checksum of a gzip lies behind its data.
    """
    parts, found = [head], len(head)
    while part := stream.read(_CHUNK):
        if found < size:
            parts.append(part)
        found += len(part)
        if found > 2 * size + 4 * _CHUNK:
            raise ValueError(f"the gzip holds more than twice the {size} bytes that the header promises")
    return b"".join(parts)
