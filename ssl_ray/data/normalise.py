"""A volume as it comes from the scanner -> the canonical volume that is stored: oriented, resampled, windowed, cropped.

The result is what MONAI's own chain of deterministic transforms gives (`Orientation`, `Spacing`,
`ScaleIntensityRange`, `CropForeground`), rounded to 8 or 16 bits.
"""

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from ssl_ray.config.schema import Preparation
from ssl_ray.data.nifti import Nifti
from ssl_ray.errors import UserError

VERSION = 4
"""Part of the key in the store: raise it whenever `prepare` gives another result for the same input."""

_MOST_VOXELS = 2**29
"""Voxels of a resampled volume, more than a whole body at 1 mm: an affine in the wrong unit would fill the memory."""
_LEAST_INSIDE, _LEAST_RANGE, _MOST_DENSE, _LEAST_LIGHT = 0.005, 0.03, 0.05, 0.01
"""What tells a CT in HU from other volumes, as shares: of the voxels, those inside the HU window; of the window, what
99 % of the voxels span; of the voxels, those above 700 HU (dense bone, metal) and those at -900 to -30 (lung, fat). 54
real CT of head, neck and torso and 6 synthetic ones, cropped to the body or not, have at least 0.060 and 1 in the
windows -57..164 and -175..250, at most 0.030, and at least 0.012. With 1024 added: at least 0.085, at most 0.0001.
"""
_MOST_LOW, _MANY_ZEROS = -30, 0.2
"""HU that the lowest thousandth of a CT does not exceed, as more than that is lung, fat or air; MR with a few voxels
slightly below 0 does. And the share of voxels that are 0 only where a background was set to it.
"""


@dataclass(frozen=True)
class CanonicalVolume:
    """A volume on its canonical grid.

    `image` (X, Y, Z) holds 0 to `levels` for the window's lower to upper HU; `affine` (4, 4) maps its voxels to mm.
    """

    image: npt.NDArray[np.uint8] | npt.NDArray[np.uint16]
    label: npt.NDArray[np.uint8] | None
    levels: int
    affine: npt.NDArray[np.float64]


def levels(window: tuple[float, float]) -> int:
    """Largest stored value: 255 where the HU window has at most 256 integer levels, else 65535."""
    return 255 if window[1] - window[0] <= 255 else 65535


def prepare(image: Nifti, label: Nifti | None, preparation: Preparation) -> CanonicalVolume:
    """Bring an image, and its label as `on_image_grid` gives it, to the canonical grid.

    Refused are an image that is no CT in HU by its values, and one whose new grid would be too large.
    """
    # Imported here, as MONAI takes seconds to import and a run that finds all volumes in the store does without.
    from ssl_ray.data.resample import by_monai, canonical_grid, nearest, resample

    target = canonical_grid(image.voxels.shape, image.affine, preparation)
    if math.prod(target.shape) > _MOST_VOXELS:
        shape = f"{' x '.join(map(str, target.shape))} voxels at spacing {list(preparation.spacing)}"
        raise UserError(f"{shape} are more than {_MOST_VOXELS}: is the affine in mm?")
    check_contrast(image.voxels, preparation.hu_window)
    low, high = preparation.hu_window
    if target.straight:
        voxels, first = resample(image.voxels, target, low if preparation.crop_foreground else None)
        affine = target.affine.copy()
    else:
        found = by_monai(image, preparation, "bilinear")
        voxels, affine, first = found.voxels, found.affine, np.zeros(3, np.int64)
    start, end = np.zeros(3, np.int64), np.array(target.shape)
    if preparation.crop_foreground:
        body = [np.flatnonzero((voxels > low).any(axis=others)) for others in ((1, 2), (0, 2), (0, 1))]
        if not all(map(len, body)):
            raise UserError(f"no voxel lies above {low:g} HU, the lower end of the window: nothing to crop to")
        start, end = first + [hit[0] for hit in body], first + [hit[-1] + 1 for hit in body]
    affine[:3, 3] += affine[:3, :3] @ start
    top = levels(preparation.hu_window)
    # The order of operations of MONAI's `ScaleIntensityRange`, so that float32 rounds as it does there.
    scaled = np.clip((voxels[_slices(start - first, end - first)] - np.float32(low)) / np.float32(high - low), 0, 1)
    stored = (scaled * np.float32(top)).round().astype(np.uint8 if top == 255 else np.uint16, order="C")
    stored_label = None
    if label and target.straight:
        stored_label = nearest(label.voxels, target, start, end).copy()
    elif label:
        whole_label = by_monai(label, preparation, "nearest").voxels
        stored_label = whole_label[_slices(start, end)].astype(np.uint8, order="C")
    assert stored_label is None or stored_label.shape == stored.shape
    return CanonicalVolume(stored, stored_label, top, affine)


def check_contrast(voxels: npt.NDArray[np.float32], window: tuple[float, float]) -> None:
    """Refuse what its values show to be no CT in HU: it would be stored as a volume without contrast, or at an edge."""
    low, high = window
    sample = voxels[tuple(slice(None, None, 1 + side // 64) for side in voxels.shape)]
    inside = float(((sample > low) & (sample < high)).mean())
    span = float(np.ptp(np.percentile(np.clip(sample, low, high), (0.5, 99.5)))) / (high - low)
    light, dense = float(((sample > -900) & (sample < -30)).mean()), float((sample > 700).mean())
    if inside < _LEAST_INSIDE:
        cause = "is it HU with another offset or unit, or no CT?"
    elif span < _LEAST_RANGE:
        cause = "was it scaled, to 0..1 or by mean and deviation?"
    elif low < 0 and dense > _MOST_DENSE and light < _LEAST_LIGHT:
        cause = f"{dense:.0%} lie above 700 HU and {light:.0%} where fat and lung do: is it HU + 1024?"
    elif low < 0 and np.percentile(sample, 0.1) > _MOST_LOW:
        cause = "hardly a value is below -30 HU: is it a label map, MR, a picture of 8 bits or a CT scaled to one?"
        if (sample == 0).mean() > _MANY_ZEROS:
            cause += " Or was the background of a CT set to 0? Set it to -1000"
    else:
        return
    least, most = float(voxels.min()), float(voxels.max())
    if least == most:
        cause = "there is nothing in it"
    raise UserError(
        f"not a CT in HU: the values are {least:g} to {most:g}, {inside:.1%} of them inside the window {low:g} to "
        f"{high:g}; {cause}"
    )


def _slices(start: npt.NDArray[np.int64], end: npt.NDArray[np.int64]) -> tuple[slice, ...]:
    return tuple(slice(a, b) for a, b in zip(start, end, strict=True))
