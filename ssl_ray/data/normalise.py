"""A scan as it comes from the scanner -> the canonical volume that is stored: oriented, resampled, normalised, cropped.

The result is what MONAI's own chain of deterministic transforms gives (`Orientation`, `Spacing`,
`ScaleIntensityRange`, `CropForeground`), rounded to 8 or 16 bits.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from ssl_ray.config.schema import Preparation
from ssl_ray.data.nifti import Nifti
from ssl_ray.data.normalisations.registry import Intensities, Storage, measure, storage
from ssl_ray.errors import UserError

VERSION = 4
"""Part of the key in the store: raise it whenever `prepare` gives another result for the same input."""

_MOST_VOXELS = 2**29
"""Voxels of a resampled volume, more than a whole body at 1 mm: an affine in the wrong unit would fill the memory."""


@dataclass(frozen=True)
class CanonicalVolume:
    """A volume on its canonical grid.

    `image` is (X, Y, Z), or (C, X, Y, Z) of several channels; it holds 0 to `levels` for what `intensities` has of each
    channel, from lower to upper, and more than `body` has of a channel only in the body. `affine` (4, 4) maps voxels to
    mm.
    """

    image: npt.NDArray[np.uint8] | npt.NDArray[np.uint16]
    label: npt.NDArray[np.uint8] | None
    levels: int
    affine: npt.NDArray[np.float64]
    intensities: tuple[tuple[float, float], ...] = ()
    body: tuple[int, ...] = (0,)


def metadata(preparation: Preparation) -> dict[str, str]:
    """For a file of weights: what a prediction needs to prepare a scan as those were that the weights learned from."""
    return {"preparation": preparation.model_dump_json(), "preparation_version": str(VERSION)}


def prepare(
    image: Nifti, label: Nifti | None, preparation: Preparation, others: Sequence[Nifti] = ()
) -> CanonicalVolume:
    """Bring an image, its other channels and its label, both as `on_image_grid` gives them, to the canonical grid.

    Refused are a channel whose values the normalisation cannot be of, and an image whose new grid would be too large.
    """
    # Imported here, as MONAI takes seconds to import and a run that finds all volumes in the store does without.
    from ssl_ray.data.resample import by_monai, canonical_grid, nearest, resample

    target = canonical_grid(image.voxels.shape, image.affine, preparation)
    if math.prod(target.shape) > _MOST_VOXELS:
        shape = f"{' x '.join(map(str, target.shape))} voxels at spacing {list(preparation.spacing)}"
        raise UserError(f"{shape} are more than {_MOST_VOXELS}: is the affine in mm?")
    channels = (image, *others)
    found = [_measure(one.voxels, preparation, number) for number, one in enumerate(channels, 1)]
    if target.straight:
        # Each channel would leave out margins of its own.
        above = found[0].floor if preparation.crop_foreground and not others else None
        boxes = [resample(one.voxels, target, above) for one in channels]
        arrays, affine, first = [voxels for voxels, _ in boxes], target.affine.copy(), boxes[0][1]
    else:
        whole = [by_monai(one, preparation, "bilinear") for one in channels]
        arrays, affine, first = [one.voxels for one in whole], whole[0].affine, np.zeros(3, np.int64)
    start, end = np.zeros(3, np.int64), np.array(target.shape)
    if preparation.crop_foreground:
        inside = np.logical_or.reduce([voxels > one.floor for voxels, one in zip(arrays, found, strict=True)])
        body = [np.flatnonzero(inside.any(axis=axes)) for axes in ((1, 2), (0, 2), (0, 1))]
        if not all(map(len, body)):
            raise UserError(f"no voxel lies above {found[0].floor:g}, where the body begins: nothing to crop to")
        start, end = first + [hit[0] for hit in body], first + [hit[-1] + 1 for hit in body]
    affine[:3, 3] += affine[:3, :3] @ start
    kept, box = storage(preparation.normalise), _slices(start - first, end - first)
    stored = [_stored(voxels[box], one, kept) for voxels, one in zip(arrays, found, strict=True)]
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
        intensities=tuple((one.low, one.high) for one in found),
        body=tuple(int(_stored(np.float32(one.floor), one, kept)) for one in found),
    )


def _measure(voxels: npt.NDArray[np.float32], preparation: Preparation, number: int) -> Intensities:
    try:
        return measure(voxels, preparation.normalise)
    except UserError as error:
        raise UserError(f"channel {number}: {error}" if preparation.channels > 1 else str(error)) from error


def _stored(voxels: Any, found: Intensities, kept: Storage) -> Any:
    """Float32 values as integers, by the operations of MONAI's `ScaleIntensityRange`, to round as it does."""
    scaled = np.clip((voxels - np.float32(found.low)) / np.float32(found.high - found.low), 0, 1)
    return (scaled * np.float32(kept.levels)).round().astype(kept.dtype, order="C")


def _slices(start: npt.NDArray[np.int64], end: npt.NDArray[np.int64]) -> tuple[slice, ...]:
    return tuple(slice(a, b) for a, b in zip(start, end, strict=True))
