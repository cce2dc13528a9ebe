"""Reading NIfTI files that others wrote: a volume of finite voxels, or one line that says what is wrong with the file.

One bad volume among thousands must be named; it must not crash a run, stall it or fill the memory. So nothing that a
header promises is believed before the bytes are there.
"""

import io
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import numpy.typing as npt
from isal import igzip, isal_zlib
from nibabel.filebasedimages import ImageFileError
from nibabel.spatialimages import HeaderDataError

from ssl_ray.errors import UserError
from ssl_ray.storage.files import read_file
from ssl_ray.text import shown

_MOST_VOXELS = 2**31
"""Voxels of a file, more than a photon-counting CT of a whole body has."""
_MOST_EXTENSION = 2**26
"""Bytes in front of the voxels; in a compressed file, a kilobyte can hold a megabyte of them."""
_CHUNK = 2**22
"""Bytes that are decompressed at a time."""


@dataclass(frozen=True)
class Nifti:
    """Voxels (X, Y, Z) as float32, in HU or label values, and the affine (4, 4) from voxels to mm, RAS+."""

    voxels: npt.NDArray[np.float32]
    affine: npt.NDArray[np.float64]


def read_nifti(path: Path, content: bytes | None = None) -> Nifti:
    """Read a .nii or .nii.gz file, or `content` if the caller has read its bytes already.

    Raises:
        UserError: when the file is not a whole, finite 3D volume with an invertible affine.
    """
    place = shown(path, 5000)
    try:
        raw = read_file(path) if content is None else content
    except OSError as error:
        raise UserError(f"{place}: cannot read: {error.strerror}") from error
    try:
        image = _parse(raw)
        with np.errstate(over="ignore"):  # what overflows float32 becomes infinite, which is refused below
            voxels = image.get_fdata(dtype=np.float32, caching="unchanged").reshape(image.shape[:3])
    except (HeaderDataError, ImageFileError, isal_zlib.error, EOFError, OSError, OverflowError, ValueError) as error:
        raise UserError(f"{place}: {' '.join(str(error).split())}") from error
    if not np.isfinite(voxels).all():
        count = int(voxels.size - np.isfinite(voxels).sum())
        raise UserError(f"{place}: {count} of {voxels.size} voxels are not finite (NaN or infinite)")
    return Nifti(voxels, np.asarray(image.affine, dtype=np.float64))


def read_label(path: Path, content: bytes | None = None) -> Nifti:
    """Read one label map as `read_nifti` does; values that are not integers in 0..255 are refused."""
    label = read_nifti(path, content)
    low, high = float(label.voxels.min()), float(label.voxels.max())
    if low < 0 or high > 255 or not np.array_equal(label.voxels, np.rint(label.voxels)):
        raise UserError(
            f"{shown(path, 5000)}: label values must be integers in 0..255, got values from {low:g} to {high:g}"
        )
    return label


def check_same_grid(image: Nifti, label: Nifti, place: Path) -> None:
    """Refuse a label of another shape than its image, or with corner voxels more than 0.1 voxel from the image's."""
    if image.voxels.shape != label.voxels.shape:
        raise UserError(f"{place}: the label has shape {label.voxels.shape}, its image {image.voxels.shape}")
    corners = np.array([*np.ndindex(2, 2, 2)]) * (np.array(image.voxels.shape) - 1)
    apart = nib.affines.apply_affine(image.affine, corners) - nib.affines.apply_affine(label.affine, corners)
    worst, voxel = float(np.linalg.norm(apart, axis=1).max()), float(nib.affines.voxel_sizes(image.affine).min())
    if worst > 0.1 * voxel:
        raise UserError(f"{place}: the label's affine puts its voxels up to {worst:.3g} mm from those of its image")


def _parse(raw: bytes) -> Any:
    """A nibabel image out of the bytes of a file; the errors, of several types, do not name the file."""
    compressed = raw[:2] == b"\x1f\x8b"
    with igzip.open(io.BytesIO(raw)) if compressed else io.BytesIO(raw) as stream:
        head = stream.read(544)
        second = 540 in (int.from_bytes(head[:4], order) for order in ("little", "big"))
        kind = nib.Nifti2Image if second else nib.Nifti1Image
        if len(head) < (least := kind.header_class.single_vox_offset):
            raise ValueError(f"not a NIfTI file: {len(head)} bytes of header, expected at least {least}")
        # Without its extensions, which may reach beyond what has been read so far.
        header = kind.header_class(head[: kind.header_class.sizeof_hdr], check=False)
        size = _check_header(header)
        if compressed:
            raw = _inflate(head, stream, size)
    if len(raw) < size:
        raise ValueError(f"truncated: {len(raw)} bytes of the {size} that the header promises")
    image = kind.from_bytes(raw)
    _check_affine(image.affine)
    return image


def _check_header(header: Any) -> int:
    """Bytes that the whole file must have by its header."""
    magic, start, least = header["magic"].item(), float(header["vox_offset"]), header.single_vox_offset
    if magic[:3] not in (b"n+1", b"n+2"):
        raise ValueError(f"not a single-file NIfTI: magic {magic!r}")
    if not least <= start <= _MOST_EXTENSION or not start.is_integer():
        raise ValueError(f"vox_offset must be an integer from {least} to {_MOST_EXTENSION}, got {start:g}")
    header.check_fix()
    shape, dtype = header.get_data_shape(), header.get_data_dtype()
    if dtype.kind not in "iuf":
        raise ValueError(f"voxels must be integers or floats, got {dtype}")
    if len(shape) < 3 or any(side != 1 for side in shape[3:]):
        raise ValueError(f"must be a 3D volume, got shape {tuple(shape)}")
    if min(shape[:3]) < 2:
        raise ValueError(f"every axis must have at least 2 voxels, got shape {tuple(shape)}")
    count = math.prod(int(side) for side in shape)
    if count > _MOST_VOXELS:
        raise ValueError(f"shape {tuple(shape)} are {count:.3g} voxels, more than {_MOST_VOXELS}")
    # A slope of NaN or 0 means "not given" (NIfTI, SPM). nibabel would take an infinite one for that, too.
    if math.isinf(header["scl_slope"]):
        raise ValueError(f"scl_slope must be finite, got {header['scl_slope']}")
    return int(start) + count * int(dtype.itemsize)


def _check_affine(affine: npt.NDArray[Any]) -> None:
    with np.errstate(all="ignore"):  # numbers that overflow are refused below
        sides, volume = nib.affines.voxel_sizes(affine), abs(np.linalg.det(affine[:3, :3]))
    apart = volume > 1e-9 and volume >= 1e-3 * sides.prod()
    if not (apart and sides.min() >= 1e-3 and sides.max() <= 1e3 and np.abs(affine[:3, 3]).max() <= 1e6):
        raise ValueError(
            "the affine must be finite, with voxel sides of 0.001 to 1000 mm, axes that are not parallel and an origin "
            f"within 1 km, got {affine.tolist()}"
        )


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
