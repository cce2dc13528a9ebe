"""NIfTI -> canonical array: orientation, spacing, HU window, crop to foreground.

The file is read defensively, because one bad volume among thousands must be named and not crash or stall a run; the
preparation itself gives what MONAI's own chain of deterministic transforms gives.
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

from ssl_ray.config.schema import Preparation
from ssl_ray.storage.files import read_file
from ssl_ray.text import shown

VERSION = 3
"""Part of the cache key: raise it whenever `prepare` gives another result for the same input."""

AXIS_CODES = (("L", "R"), ("P", "A"), ("I", "S"))
"""The codes of an orientation name where an axis points to, in nibabel's convention."""
_DEFLATE_RATIO = 1032
"""No deflate stream inflates by more (RFC 1951: 258 bytes from 2 bits), so a header that promises more lies."""
_MOST_READ = 2**31
"""Voxels of a file, more than a photon-counting CT of a whole body: a kilobyte can promise any number."""
_MOST_BEFORE = 2**26
"""Bytes of header extensions in a gzip, which may hold a thousand times its size."""
_MOST_VOXELS = 2**29
"""Of a resampled volume, more than a whole body at 1 mm: one affine in the wrong unit must not exhaust the memory."""
_CHUNK = 2**24
"""Bytes inflated at a time: what a lying header promises is never allocated at once."""


@dataclass(frozen=True)
class Nifti:
    """Voxels (X, Y, Z) as float32 in HU or label values, and the voxel-to-world affine (4, 4) in mm, RAS+."""

    voxels: npt.NDArray[np.float32]
    affine: npt.NDArray[np.float64]


@dataclass(frozen=True)
class CanonicalVolume:
    """A volume on its canonical grid.

    `image` (X, Y, Z) holds 0..`levels` for the window's lower to upper HU; `label` (X, Y, Z) uint8 or None; `affine`
    of this grid; `box` is the foreground box (start, end) in voxels of the resampled grid that the crop came from.
    """

    image: npt.NDArray[np.uint8] | npt.NDArray[np.uint16]
    label: npt.NDArray[np.uint8] | None
    levels: int
    affine: npt.NDArray[np.float64]
    box: tuple[tuple[int, ...], tuple[int, ...]]
    original_shape: tuple[int, ...]
    original_affine: npt.NDArray[np.float64]


def levels(window: tuple[float, float]) -> int:
    """Largest stored value: 255 where the window has at most 256 integer HU levels, else 65535."""
    return 255 if window[1] - window[0] <= 255 else 65535


def read_nifti(path: Path, content: bytes | None = None) -> Nifti:
    """Read one volume.

    Args:
        path: a .nii or .nii.gz file.
        content: its bytes, where the caller has them already.

    Raises:
        ValueError: when the file is not a whole, finite 3D volume with an invertible affine; names file and rule.
    """
    place = shown(path, 5000)
    try:
        raw = read_file(path) if content is None else content
    except OSError as error:
        raise ValueError(f"{place}: cannot read: {error.strerror}") from error
    try:
        image = _parse(raw)
        with np.errstate(over="ignore"):  # told below
            voxels = image.get_fdata(dtype=np.float32, caching="unchanged").reshape(image.shape[:3])
    except EOFError as error:
        raise ValueError(f"{place}: truncated gzip: {error}") from error
    except (HeaderDataError, ImageFileError, isal_zlib.error, OSError, OverflowError, ValueError) as error:
        raise ValueError(f"{place}: {' '.join(str(error).split())}") from error
    if not np.isfinite(voxels).all():
        count = int(voxels.size - np.isfinite(voxels).sum())
        raise ValueError(f"{place}: {count} of {voxels.size} voxels are not finite (NaN or infinite)")
    return Nifti(voxels, np.asarray(image.affine, dtype=np.float64))


def read_label(path: Path, content: bytes | None = None) -> Nifti:
    """`read_nifti` for a label map.

    Raises:
        ValueError: also for values that are not integers in 0..255.
    """
    label = read_nifti(path, content)
    low, high = float(label.voxels.min()), float(label.voxels.max())
    if low < 0 or high > 255 or not np.array_equal(label.voxels, np.rint(label.voxels)):
        raise ValueError(
            f"{shown(path, 5000)}: label values must be integers in 0..255, got values from {low:g} to {high:g}"
        )
    return label


def check_same_grid(image: Nifti, label: Nifti, place: Path) -> None:
    """Refuse a label on another grid than its image.

    Raises:
        ValueError: for another shape, or affines whose corner voxels lie more than 0.1 voxel apart.
    """
    if image.voxels.shape != label.voxels.shape:
        raise ValueError(f"{place}: the label has shape {label.voxels.shape}, its image {image.voxels.shape}")
    corners = np.array([*np.ndindex(2, 2, 2)]) * (np.array(image.voxels.shape) - 1)
    apart = nib.affines.apply_affine(image.affine, corners) - nib.affines.apply_affine(label.affine, corners)
    worst, voxel = float(np.linalg.norm(apart, axis=1).max()), float(nib.affines.voxel_sizes(image.affine).min())
    if worst > 0.1 * voxel:
        raise ValueError(f"{place}: the label's affine puts its voxels up to {worst:.3g} mm from those of its image")


def prepare(image: Nifti, label: Nifti | None, preparation: Preparation) -> CanonicalVolume:
    """What MONAI's deterministic transforms give, in 8 or 16 bits.

    Raises:
        ValueError: when nothing of the volume lies above the window's lower end, or the new grid would be too large.
    """
    extent = np.array(image.voxels.shape) * nib.affines.voxel_sizes(image.affine)
    grid = float(np.maximum(extent / preparation.spacing, 1).prod())
    if grid > _MOST_VOXELS:
        raise ValueError(
            f"{' x '.join(f'{side:.4g}' for side in extent)} mm are {grid:.3g} voxels at spacing "
            f"{list(preparation.spacing)}, more than {_MOST_VOXELS}: is the affine in mm?"
        )
    from ssl_ray.data.resample import canonical_grid, resample  # MONAI: seconds that a full cache does not pay

    low, high = preparation.hu_window
    target = canonical_grid(image.voxels.shape, image.affine, preparation)
    if target is None:
        found = _monai(image, preparation, "bilinear")
        voxels, affine, first = found.voxels, found.affine, np.zeros(3, np.int64)
        whole = voxels.shape
    else:
        voxels, first = resample(image.voxels, target, low if preparation.crop_foreground else None)
        affine, whole = target.affine.copy(), target.shape
    start, end = np.zeros(3, np.int64), np.array(whole)
    if preparation.crop_foreground:
        body = [np.flatnonzero((voxels > low).any(axis=others)) for others in ((1, 2), (0, 2), (0, 1))]
        if not all(map(len, body)):
            raise ValueError(f"no voxel lies above {low:g} HU, the lower end of the window: nothing to crop to")
        start, end = first + [hit[0] for hit in body], first + [hit[-1] + 1 for hit in body]
    box = tuple(slice(a, b) for a, b in zip(start - first, end - first, strict=True))
    affine[:3, 3] += affine[:3, :3] @ start
    top = levels(preparation.hu_window)
    # The order of MONAI's `ScaleIntensityRange`, so that float32 rounds as it does there.
    scaled = np.clip((voxels[box] - np.float32(low)) / np.float32(high - low), 0, 1)
    stored = (scaled * np.float32(top)).round().astype(np.uint8 if top == 255 else np.uint16, order="C")
    stored_label = None
    if label:
        inside = tuple(slice(a, b) for a, b in zip(start, end, strict=True))
        stored_label = _monai(label, preparation, "nearest").voxels[inside].astype(np.uint8, order="C")
    corners = tuple(map(int, start)), tuple(map(int, end))
    return CanonicalVolume(stored, stored_label, top, affine, corners, image.voxels.shape, image.affine)


def _monai(volume: Nifti, preparation: Preparation, mode: str) -> Nifti:
    """Oriented and resampled by MONAI's own transforms."""
    import monai.transforms as mt
    import torch
    from monai.data import MetaTensor

    data = MetaTensor(torch.from_numpy(volume.voxels)[None], affine=torch.from_numpy(volume.affine))
    if preparation.orientation:
        data = mt.Orientation(preparation.orientation, labels=AXIS_CODES)(data)
    data = mt.Spacing(preparation.spacing, mode=mode)(data)
    return Nifti(data[0].numpy(), data.affine.numpy().astype(np.float64))


def _parse(raw: bytes) -> Any:
    """A nibabel image over checked bytes; nothing is kept that the header does not account for."""
    compressed = raw[:2] == b"\x1f\x8b"
    with igzip.open(io.BytesIO(raw)) if compressed else io.BytesIO(raw) as stream:
        head = stream.read(544)
        second = 540 in (int.from_bytes(head[:4], order) for order in ("little", "big"))
        kind = nib.Nifti2Image if second else nib.Nifti1Image
        if len(head) < (least := kind.header_class.single_vox_offset):
            raise ValueError(f"not a NIfTI file: {len(head)} bytes of header, expected at least {least}")
        # The block alone: extensions may be longer than what has been read so far.
        header = kind.header_class(head[: kind.header_class.sizeof_hdr], check=False)
        start, size = _check_header(header)
        if compressed:
            if size > _DEFLATE_RATIO * len(raw):
                raise ValueError(f"the header promises {size} bytes, more than {len(raw)} compressed bytes can hold")
            if start > _MOST_BEFORE:
                raise ValueError(f"vox_offset is {start}, more than {_MOST_BEFORE}")
            raw = _inflate(head, stream, size)
    if len(raw) < size:
        raise ValueError(f"truncated: {len(raw)} bytes of the {size} that the header promises")
    image = kind.from_bytes(raw)
    affine = image.affine
    if not np.isfinite(affine).all() or abs(np.linalg.det(affine[:3, :3])) < 1e-9:
        raise ValueError(f"the affine must be finite and invertible, got {np.round(affine, 3).tolist()}")
    sides = nib.affines.voxel_sizes(affine)
    skewed = abs(np.linalg.det(affine[:3, :3])) < 1e-3 * sides.prod()
    if skewed or sides.min() < 1e-3 or sides.max() > 1e3 or np.abs(affine[:3, 3]).max() > 1e6:
        raise ValueError(
            f"the affine must have voxel sides of 0.001 to 1000 mm, axes that are not parallel and an origin within "
            f"1 km, got {affine.tolist()}"
        )
    return image


def _check_header(header: Any) -> tuple[int, int]:
    """Bytes before the voxels and of the whole file, by its header."""
    start, least = float(header["vox_offset"]), header.single_vox_offset
    if header["magic"].item()[:2] == b"n+" and (not start.is_integer() or start < least):
        raise ValueError(f"vox_offset must be an integer of at least {least}, not NaN or infinite, got {start:g}")
    header.check_fix()
    if header["magic"].item()[:3] not in (b"n+1", b"n+2"):
        raise ValueError(f"not a single-file NIfTI: magic {header['magic'].item()!r}")
    shape, dtype = header.get_data_shape(), header.get_data_dtype()
    if dtype.fields or dtype.kind not in "iuf":
        raise ValueError(f"voxels must be integers or floats, got {dtype}")
    if len(shape) < 3 or any(side != 1 for side in shape[3:]):
        raise ValueError(f"must be a 3D volume, got shape {tuple(shape)}")
    if min(shape) < 1 or min(shape[:3]) < 2:
        raise ValueError(f"every axis must have at least 2 voxels, got shape {tuple(shape)}")
    count = math.prod(int(side) for side in shape)
    if count > _MOST_READ:
        raise ValueError(f"shape {tuple(shape)} are {count:.3g} voxels, more than {_MOST_READ}")
    slope, intercept = float(header["scl_slope"]), float(header["scl_inter"])
    # NaN and 0 stand for a slope that is not given (NIfTI, SPM); infinite is broken, and nibabel would not say so.
    if math.isinf(slope) or (not math.isnan(slope) and slope and not math.isfinite(intercept)):
        raise ValueError(f"scl_slope and scl_inter must be finite, got {slope} and {intercept}")
    return int(start), int(start) + count * int(dtype.itemsize)


def _inflate(head: bytes, stream: Any, size: int) -> bytes:
    """At least the first `size` bytes; read to the end of the stream, as a gzip checksum stands behind its data.

    Raises:
        ValueError: where as much again follows and more, which would be time spent on a bomb.
    """
    parts, found = [head], len(head)
    while part := stream.read(_CHUNK):
        if found < size:
            parts.append(part)
        found += len(part)
        if found > 2 * size + 4 * _CHUNK:
            raise ValueError(f"the gzip holds more than twice the {size} bytes that the header promises")
    return b"".join(parts)
