"""Brings a predicted label volume from the canonical grid back to the grid of its NIfTI file."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import ndimage
from torch import Tensor


def to_original_grid(
    prediction: Tensor | NDArray[np.uint8],
    canonical_affine: ArrayLike,
    original_shape: Sequence[int],
    original_affine: ArrayLike,
) -> NDArray[np.uint8]:
    """Nearest-neighbour resampling of a label volume through the affines, as nibabel's `resample_from_to(order=0)`.

    Unlike with nibabel's default, a canonical voxel reaches to its faces and not only to its centre (scipy's mode
    `grid-constant`): a slice of the file that lies less than half a voxel beyond the last canonical centre keeps its
    label.

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
