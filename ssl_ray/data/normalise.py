"""A scan as it comes from the scanner -> the canonical volume that is stored: oriented, resampled, normalised, cropped.

The result is what MONAI's own chain of deterministic transforms gives (`Orientation`, `Spacing`,
`ScaleIntensityRange`, `CropForeground`), rounded to 8 or 16 bits.
"""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import reduce
from operator import or_
from typing import Any

import numpy as np
import numpy.typing as npt

from ssl_ray.config.common import Storage
from ssl_ray.config.schema import Preparation
from ssl_ray.data.nifti import Nifti
from ssl_ray.data.normalisations.intensities import Intensities, measure
from ssl_ray.errors import UserError

VERSION = 5
"""Part of the key in the store: raise it whenever `prepare` gives another result for the same input."""

_MOST_VOXELS = 2**29
"""Voxels of a resampled volume, more than a whole body at 1 mm: an affine in the wrong unit would fill the memory."""


@dataclass(frozen=True)
class CanonicalVolume:
    """A volume on its canonical grid.

    `image` is (X, Y, Z), or (C, X, Y, Z) of several channels; it holds `levels` where a network sees 1. For each
    channel, `intensities` are the scan's own that became 0 and 1, and what is stored of the body is more than `body`.
    `affine` (4, 4) maps voxels to mm.
    """

    image: npt.NDArray[np.uint8] | npt.NDArray[np.uint16] | npt.NDArray[np.int16]
    label: npt.NDArray[np.uint8] | None
    levels: int
    affine: npt.NDArray[np.float64]
    intensities: tuple[tuple[float, float], ...]
    body: tuple[int, ...]


def metadata(preparation: Preparation) -> dict[str, str]:
    """For a file of weights: how the scans were prepared that they learned from, and others must be."""
    return {"preparation": json.dumps({"version": VERSION, **preparation.model_dump(mode="json")})}


def prepare(
    image: Nifti, label: Nifti | None, preparation: Preparation, others: Sequence[Nifti] = ()
) -> CanonicalVolume:
    """Bring an image, its label and its other channels, these as `on_image_grid` gives them, to the canonical grid.

    Refused are values that are none of the normalisation's kind, and an image whose new grid would be too large.
    """
    # Imported here, as MONAI takes seconds to import and a run that finds all volumes in the store does without.
    from ssl_ray.data.resample import by_monai, canonical_grid, nearest, resample

    target = canonical_grid(image.voxels.shape, image.affine, preparation)
    if math.prod(target.shape) > _MOST_VOXELS:
        shape = f"{' x '.join(map(str, target.shape))} voxels at spacing {list(preparation.spacing)}"
        raise UserError(f"{shape} are more than {_MOST_VOXELS}: is the affine in mm?")
    scans = (image, *others)
    found = [measure(scan.voxels, preparation.normalise) for scan in scans]
    if target.straight:
        # Each of several channels would leave out margins of its own.
        above = found[0].floor if preparation.crop_foreground and not others else None
        channels, firsts = zip(*(resample(scan.voxels, target, above) for scan in scans), strict=True)
        affine, first = target.affine.copy(), firsts[0]
    else:
        whole = [by_monai(scan, preparation, "bilinear") for scan in scans]
        channels, affine, first = tuple(one.voxels for one in whole), whole[0].affine, np.zeros(3, np.int64)
    start, end = np.zeros(3, np.int64), np.array(target.shape)
    if preparation.crop_foreground:
        inside = reduce(or_, (voxels > one.floor for voxels, one in zip(channels, found, strict=True)))
        body = [np.flatnonzero(inside.any(axis=axes)) for axes in ((1, 2), (0, 2), (0, 1))]
        if not all(map(len, body)):
            raise UserError(f"no voxel lies above {found[0].floor:g}, where the body begins: nothing to crop to")
        start, end = first + [hit[0] for hit in body], first + [hit[-1] + 1 for hit in body]
    affine[:3, 3] += affine[:3, :3] @ start
    kept, box = preparation.normalise.storage, _slices(start - first, end - first)
    stored = [_stored(voxels[box], one, kept) for voxels, one in zip(channels, found, strict=True)]
    stored_label = None
    if label and target.straight:
        stored_label = nearest(label.voxels, target, start, end).copy()
    elif label:
        whole_label = by_monai(label, preparation, "nearest").voxels
        stored_label = whole_label[_slices(start, end)].astype(np.uint8, order="C")
    assert stored_label is None or stored_label.shape == stored[0].shape
    return CanonicalVolume(
        np.stack(stored) if others else stored[0],
        stored_label,
        kept.levels,
        affine,
        tuple((one.zero, one.one) for one in found),
        tuple(int(_stored(np.float32(one.floor), one, kept)) for one in found),
    )


def _stored(voxels: Any, found: Intensities, kept: Storage) -> Any:
    """Float32 intensities as integers, by the operations of MONAI's `ScaleIntensityRange`, to round as it does."""
    scaled = np.asarray(voxels - np.float32(found.zero))
    scaled /= np.float32(found.one - found.zero)
    np.clip(scaled, *kept.ends, out=scaled)
    scaled *= np.float32(kept.levels)
    return scaled.round(out=scaled).astype(kept.dtype, order="C")


def _slices(start: npt.NDArray[np.int64], end: npt.NDArray[np.int64]) -> tuple[slice, ...]:
    return tuple(slice(a, b) for a, b in zip(start, end, strict=True))
