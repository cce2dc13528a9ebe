"""Segmentation metrics of one volume; `scores.py` has their names, and their means over volumes.

A volume is scored on two grids. On the *canonical* grid (resampled and cropped) Dice is what the published scripts
report; on the *original* grid of the NIfTI file Dice, HD95 and surface Dice are what a reader of the labels would see.

Conventions, the same for every metric:

- organ absent from the truth of a volume: no score of that volume (nan in arrays, None in `CaseScores`, null in JSON),
  as with MONAI's `ignore_empty=True`; where it is predicted all the same, it is a false positive;
- organ in the truth but not predicted: missed. Dice and surface Dice are 0, so that it never drops out of their means
  (Maier-Hein et al., Metrics Reloaded, Nature Methods 2024). It has no HD95, which would say how large the volume is:
  the rate of missed organs stands beside HD95.

Prediction and truth hold class numbers: 0 is background, 1 to classes - 1 are organs.
"""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from scipy import ndimage
from torch import Tensor

from ssl_ray.evaluate.scores import CaseScores, Scores
from ssl_ray.evaluate.surface import Labels, surface_scores

MIDDLE = 1e-8
"""Share by which the grid of a file shrinks towards the last canonical centre, when its labels are looked up there: an
original voxel in the middle between two canonical ones takes the upper one, and one on the outer face of the last takes
that. Otherwise rounding would decide, in its own way on every machine, and where one spacing is half the other, of
every second voxel. With 1,000 voxels along an axis it moves none by more than 1e-5, and one on the last face by 5e-9,
which is far more than float64 rounds."""


def evaluate_canonical(case: str, prediction: Tensor, truth: Tensor, classes: int) -> CaseScores:
    """Dice on the canonical grid only: cheap enough for every validation of a training."""
    return CaseScores(case, _scores(dice(confusion(prediction, truth, classes))))


def evaluate(
    case: str,
    prediction: Tensor,
    truth: Tensor,
    canonical_affine: ArrayLike,
    original_truth: Labels,
    original_affine: ArrayLike,
    *,
    classes: int,
    tolerance: float,
    subject: str = "",
) -> CaseScores:
    """All scores of one volume of a subject, on both grids; the tolerance of surface Dice is in mm.

    `prediction` (uint8) and `truth`, both (X, Y, Z), lie on the canonical grid and on one device; `original_truth` has
    the grid of the NIfTI file. Affines are 4x4, voxel indices -> mm. All truths are integers in 0..classes-1.
    """
    predicted = to_original_grid(prediction.cpu().numpy(), canonical_affine, original_truth.shape, original_affine)
    scored = evaluate_original(case, predicted, original_truth, original_affine, classes, tolerance)
    canonical = evaluate_canonical(case, prediction, truth, classes)
    return replace(scored, dice=canonical.dice, subject=subject)


def evaluate_original(
    case: str, prediction: Labels, truth: Labels, affine: ArrayLike, classes: int, tolerance: float
) -> CaseScores:
    """The scores on the grid of a NIfTI file, that of both label maps (X, Y, Z); the tolerance is in mm."""
    counts = confusion(torch.as_tensor(prediction), torch.as_tensor(truth), classes)
    true, found = counts.sum(1) > 0, counts.sum(0) > 0
    hd95, surface_dice = surface_scores(prediction, truth, classes, np.asarray(affine, float), tolerance)
    return CaseScores(
        case,
        None,
        original_dice=_scores(dice(counts)[1:]),
        original_hd95=_scores(hd95),
        original_surface_dice=_scores(surface_dice),
        false_positives=[None if organ else bool(extra) for organ, extra in zip(true[1:], found[1:], strict=True)],
    )


def to_original_grid(
    prediction: Labels, canonical_affine: ArrayLike, original_shape: Sequence[int], original_affine: ArrayLike
) -> NDArray[np.uint8]:
    """Nearest-neighbour resampling of a label volume through 4x4 affines, as nibabel's `resample_from_to(order=0)`.

    Unlike with nibabel's default, a canonical voxel reaches to its faces and not only to its centre (scipy's mode
    `grid-constant`): a slice of the file that lies up to half a voxel beyond the last canonical centre keeps its label.
    Many last slices lie just there, as MONAI rounds the number of voxels half to even. What lies outside the canonical
    grid is 0 (background). Orientation, rotation and spacing may all differ.
    """
    to_canonical = np.linalg.inv(np.asarray(canonical_affine, float)) @ np.asarray(original_affine, float)
    to_canonical[:3] *= 1 - MIDDLE
    to_canonical[:3, 3] += MIDDLE * (np.array(prediction.shape) - 1)
    resampled: NDArray[np.uint8] = ndimage.affine_transform(
        prediction, to_canonical, output_shape=tuple(original_shape), order=0, mode="grid-constant", cval=0
    )
    return resampled


def confusion(prediction: Tensor, truth: Tensor, classes: int) -> NDArray[np.float64]:
    """Voxels by true class and predicted class, (classes, classes), of two volumes (X, Y, Z) on the same device."""
    pairs = (truth.int() * classes + prediction).flatten()
    counts: NDArray[np.float64] = torch.bincount(pairs, minlength=classes**2).double().cpu().numpy()
    return counts.reshape(classes, classes)


def dice(counts: NDArray[np.float64]) -> NDArray[np.float64]:
    """Dice of every class of a confusion, (classes,), background first; nan where it is absent from the truth."""
    true, predicted = counts.sum(1), counts.sum(0)
    scores = np.full(len(counts), np.nan)
    np.divide(2 * counts.diagonal(), true + predicted, out=scores, where=true > 0)
    return scores


def _scores(values: NDArray[np.float64]) -> Scores:
    return tuple(None if np.isnan(value) else float(value) for value in values)
