"""How far the surfaces of predicted and true organs lie apart."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.spatial import KDTree

Labels = NDArray[np.integer[Any]]
"""Class numbers (X, Y, Z)."""


def surface_scores(
    prediction: Labels, truth: Labels, classes: int, spacing: Sequence[float], tolerance: float
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """HD95 in mm and surface Dice, each (classes - 1,), organ 1 first, nan where the organ is absent from the truth.

    The definitions are MONAI's. A surface is the set of voxels that erosion removes. HD95 is the larger of the two
    directed 95th percentiles (`compute_hausdorff_distance(percentile=95)`); surface Dice is the share of the voxels of
    both surfaces that lie within the tolerance, in mm, of the other one (`compute_surface_dice`). Both volumes lie on
    the original grid, whose voxels have the sides `spacing` in mm (in an oblique one: `nibabel.affines.voxel_sizes`).
    """
    hd95, surface_dice = np.full(classes - 1, np.nan), np.full(classes - 1, np.nan)
    pairs = zip(_surfaces(prediction, classes), _surfaces(truth, classes), strict=True)
    for organ, (predicted, true) in enumerate(pairs):
        if not len(true):
            continue
        if not len(predicted):
            hd95[organ], surface_dice[organ] = np.linalg.norm(np.multiply(truth.shape, spacing)), 0.0
            continue
        points = predicted * np.asarray(spacing, float), true * np.asarray(spacing, float)
        # MONAI rounds to float32, too. Without it, whether two voxels exactly one tolerance apart are within it would
        # depend on where in the volume they lie.
        distances = [_to_nearest(*points).astype(np.float32), _to_nearest(*points[::-1]).astype(np.float32)]
        hd95[organ] = max(np.percentile(directed, 95) for directed in distances)
        surface_dice[organ] = np.mean(np.concatenate(distances) <= tolerance)
    return hd95, surface_dice


def _surfaces(volume: Labels, classes: int) -> list[NDArray[np.int64]]:
    """The surface of every organ as voxels (N, 3): those with a face to another class or to the outside.

    One pass over the volume finds all organs. MONAI goes organ by organ in a box around truth and prediction, and one
    stray voxel that was predicted far away makes that box the whole volume.
    """
    volume = np.ascontiguousarray(volume)
    surface = np.zeros(volume.shape, bool)
    for axis in range(3):
        values, marks = np.moveaxis(volume, axis, 0), np.moveaxis(surface, axis, 0)
        differ = values[1:] != values[:-1]
        marks[1:] |= differ
        marks[:-1] |= differ
        marks[0] = marks[-1] = True
    surface &= volume > 0
    voxels, organs = np.argwhere(surface), volume[surface]
    ends = np.cumsum(np.bincount(organs, minlength=classes))[:-1]
    return np.split(voxels[np.argsort(organs, kind="stable")], ends)[1:]


def _to_nearest(points: NDArray[np.float64], others: NDArray[np.float64]) -> NDArray[np.float64]:
    """Distance of each point (N, 3) to the nearest of the others (M, 3)."""
    # The distances are exact with any tree; scipy's default one takes half as long again.
    found: NDArray[np.float64] = KDTree(others, leafsize=32, balanced_tree=False, compact_nodes=False).query(points)[0]
    return found
