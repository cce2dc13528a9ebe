"""Segmentation metrics of one volume; `scores` has their names, and their means over volumes.

A volume is scored on two grids. On the *canonical* grid (resampled and cropped) Dice is what the published scripts
report; on the *original* grid of the NIfTI file Dice, HD95 and surface Dice are what a reader of the labels would see.

Conventions, the same for every metric:

- organ absent from the truth of a volume: the organ does not count for that volume (nan here, null in JSON), whatever
  was predicted, as in MONAI's `ignore_empty=True`;
- organ in the truth but not predicted: the worst value, so that a missed organ never drops out of a mean
  (Maier-Hein et al., Metrics Reloaded, Nature Methods 2024): Dice 0, surface Dice 0, HD95 the volume's diagonal in mm.

Prediction and truth hold class numbers: 0 is background, 1 to classes - 1 are organs.
"""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
from monai.inferers import sliding_window_inference
from nibabel.affines import voxel_sizes
from numpy.typing import ArrayLike, NDArray
from scipy import ndimage
from torch import Tensor, nn

from ssl_ray.evaluate.scores import CaseScores, Scores
from ssl_ray.evaluate.surface import Volume, surface_scores


def predict(
    model: nn.Module,
    image: Tensor,
    patch_size: Sequence[int],
    classes: int,
    *,
    sliding_window_batch: int,
    overlap: float,
    autocast: torch.dtype | None = None,
) -> Tensor:
    """Segment one volume with MONAI's sliding window: mean of the logits of overlapping windows, then argmax.

    Windows are computed on the model's device, `sliding_window_batch` at a time, and put together on the image's
    device, which needs about 4 * (classes + 1) bytes a voxel: leave the image on the CPU where that is too much for
    the GPU. The model predicts in eval mode and is left in the mode it came in.

    Args:
        model: (B, 1, *patch_size) float32 -> (B, classes, *patch_size) logits.
        image: (X, Y, Z) float32 in 0..1; padded with 0 by MONAI where it is smaller than the patch.
        patch_size: voxels.
        classes: organs + background, at most 256.
        sliding_window_batch: windows a forward pass.
        overlap: of neighbouring windows, share of the patch side, 0 <= overlap < 1.
        autocast: dtype of mixed precision, e.g. `torch.bfloat16`; None: as the model is.

    Returns:
        (X, Y, Z) uint8 on the image's device.

    Raises:
        ValueError: the model has another number of classes.
    """
    device = next(model.parameters()).device

    def logits(windows: Tensor) -> Tensor:
        with torch.autocast(device.type, dtype=autocast, enabled=autocast is not None):
            output: Tensor = model(windows)
        if output.shape[1] != classes:
            raise ValueError(f"the model predicts {output.shape[1]} classes, but the cohort has {classes}")
        return output

    training = model.training
    model.eval()
    try:
        with torch.inference_mode():
            volume = sliding_window_inference(
                image[None, None],
                tuple(patch_size),
                sliding_window_batch,
                logits,
                overlap=overlap,
                sw_device=device,
                device=image.device,
            )
    finally:
        model.train(training)
    # plane by plane: indices of the whole volume would add 8 bytes a voxel; max, as argmax takes 3 times as long here
    return torch.stack([plane.max(0).indices.to(torch.uint8) for plane in volume[0].unbind(1)])


def dice(prediction: Tensor, truth: Tensor, classes: int) -> NDArray[np.float64]:
    """Dice of every class, (classes,), background first; nan where the class is absent from the truth.

    Args:
        prediction: (X, Y, Z) integers in 0..classes-1, on the same device as the truth.
        truth: (X, Y, Z) integers in 0..classes-1.
        classes: organs + background.
    """
    pairs = (truth.int() * classes + prediction).flatten()
    confusion = torch.bincount(pairs, minlength=classes**2).reshape(classes, classes).double().cpu().numpy()
    true, predicted = confusion.sum(1), confusion.sum(0)
    scores = np.full(classes, np.nan)
    np.divide(2 * confusion.diagonal(), true + predicted, out=scores, where=true > 0)
    return scores


def to_original_grid(
    prediction: Tensor | NDArray[np.uint8],
    canonical_affine: ArrayLike,
    original_shape: Sequence[int],
    original_affine: ArrayLike,
) -> NDArray[np.uint8]:
    """Nearest-neighbour resampling of a label volume through the affines, as nibabel's `resample_from_to(order=0)`.

    Unlike nibabel's default, a canonical voxel reaches to its faces and not only to its centre (`grid-constant`): where
    the last slice of the file lies less than half a voxel beyond the last canonical centre, it keeps its label.

    Args:
        prediction: (X, Y, Z) uint8 on the canonical grid.
        canonical_affine: 4x4, voxel indices of the canonical grid -> mm.
        original_shape: voxels of the NIfTI file.
        original_affine: 4x4, voxel indices of the NIfTI file -> mm; orientation, rotation and spacing may all differ.

    Returns:
        uint8 of the original shape; 0 (background) outside the canonical grid.
    """
    labels = prediction.cpu().numpy() if isinstance(prediction, Tensor) else prediction
    to_canonical = np.linalg.inv(np.asarray(canonical_affine, float)) @ np.asarray(original_affine, float)
    resampled: NDArray[np.uint8] = ndimage.affine_transform(
        labels, to_canonical, output_shape=tuple(original_shape), order=0, mode="grid-constant", cval=0
    )
    return resampled


def evaluate_canonical(case: str, prediction: Tensor, truth: Tensor, classes: int) -> CaseScores:
    """Dice on the canonical grid only: the cheap score for validation in the course of training."""
    return CaseScores(case, _scores(dice(prediction, truth, classes)))


def evaluate(
    case: str,
    prediction: Tensor,
    truth: Tensor,
    canonical_affine: ArrayLike,
    original_truth: Volume,
    original_affine: ArrayLike,
    *,
    classes: int,
    tolerance: float,
) -> CaseScores:
    """All scores of one volume, on both grids.

    Args:
        case: its id.
        prediction: (X, Y, Z) uint8 on the canonical grid.
        truth: (X, Y, Z) integers on the canonical grid, on the prediction's device.
        canonical_affine: 4x4, voxel indices -> mm.
        original_truth: integers in 0..classes-1 on the grid of the NIfTI file.
        original_affine: 4x4, voxel indices -> mm.
        classes: organs + background.
        tolerance: mm, of surface Dice.
    """
    predicted = to_original_grid(prediction, canonical_affine, original_truth.shape, original_affine)
    spacing = voxel_sizes(np.asarray(original_affine, float))
    surface = surface_scores(predicted, original_truth, classes, spacing, tolerance)
    return replace(
        evaluate_canonical(case, prediction, truth, classes),
        original_dice=_scores(dice(torch.as_tensor(predicted), torch.as_tensor(original_truth), classes)[1:]),
        original_hd95=_scores(surface.hd95),
        original_surface_dice=_scores(surface.surface_dice),
    )


def _scores(values: NDArray[np.float64]) -> Scores:
    return tuple(None if np.isnan(value) else float(value) for value in values)
