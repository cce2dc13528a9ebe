"""How far the surfaces of predicted and true organs lie apart."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from monai.metrics.utils import create_table_neighbour_code_to_surface_area
from numpy.typing import NDArray
from scipy.spatial import KDTree

Labels = NDArray[np.integer[Any]]
"""Class numbers (X, Y, Z)."""
Places = NDArray[np.int64]
"""Places in a volume with a border of `BORDER` voxels around it, as indices into its flat array; no place twice."""

REACH = 2
"""Voxels along an axis: neighbours up to there are looked at one by one, before a tree is built for the others."""
BORDER = REACH + 1
"""Voxels around a volume, as a surface element may lie one before the first voxel."""


def surface_scores(
    prediction: Labels, truth: Labels, classes: int, spacing: Sequence[float], tolerance: float
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """HD95 in mm and surface Dice, each (classes - 1,), organ 1 first, nan where the organ is absent from the truth.

    HD95 is the larger of the two directed 95th percentiles of the distances between border voxels, those that erosion
    removes (MONAI's `compute_hausdorff_distance(percentile=95)`); nan where the organ was missed, too.

    Surface Dice is the share of the area of both surfaces that lies within the tolerance, in mm, of the other one; 0
    where the organ was missed. A surface is made of elements in the middle of 8 voxels, each with an area in mm2: the
    definition of DeepMind and of MONAI's `compute_surface_dice(use_subvoxels=True)`. Counting voxels would give a face
    between thick slices the weight of many.

    Both volumes lie on the original grid, whose voxels have the sides `spacing` in mm (in an oblique one:
    `nibabel.affines.voxel_sizes`).
    """
    hd95, surface_dice = np.full(classes - 1, np.nan), np.full(classes - 1, np.nan)
    table, kernel = create_table_neighbour_code_to_surface_area(tuple(spacing))
    areas, weights = table.double().numpy(), kernel.numpy().astype(np.uint8).ravel()
    distances = _Distances(truth.shape, np.asarray(spacing, float))
    surfaces = zip(*(_surfaces(volume, classes, weights) for volume in (prediction, truth)), strict=True)
    for organ, ((borders, elements, codes), (true_borders, true_elements, true_codes)) in enumerate(surfaces):
        if not len(true_borders):
            continue
        if not len(borders):
            surface_dice[organ] = 0.0
            continue
        apart = distances.between(borders, true_borders), distances.between(true_borders, borders)
        hd95[organ] = max(np.percentile(directed, 95) for directed in apart)
        pairs = (elements, true_elements), (true_elements, elements)
        near = np.concatenate([distances.between(*pair, 1.001 * tolerance) <= tolerance for pair in pairs])
        surface_dice[organ] = np.average(near, weights=areas[np.concatenate([codes, true_codes])])
    return hd95, surface_dice


class _Distances:
    """Distances in mm between places of a volume whose voxels have the sides (3,)."""

    def __init__(self, shape: Sequence[int], sides: NDArray[np.float64]) -> None:
        self.shape, self.sides = [length + 2 * BORDER for length in shape], sides
        self.marks = np.zeros(np.prod(self.shape), bool)
        steps = np.indices((2 * REACH + 1,) * 3).reshape(3, -1).T - REACH
        moves = steps @ [self.shape[1] * self.shape[2], self.shape[2], 1]
        lengths = np.linalg.norm(steps * sides, axis=1)
        # All steps that are shorter than this are among those within the reach.
        self.known = BORDER * min(sides)
        self.steps = sorted((length, move) for length, move in zip(lengths, moves, strict=True) if length < self.known)

    def between(self, places: Places, others: Places, bound: float = np.inf) -> NDArray[np.float32]:
        """Distance of each place to the nearest of the others, where that is below the bound; else inf.

        MONAI rounds to float32, too. Without it, whether two places exactly one tolerance apart are within it would
        depend on where in the volume they lie.
        """
        found, left = np.full(len(places), np.inf, np.float32), np.arange(len(places))
        self.marks[others] = True
        for length, move in self.steps:
            if length < bound:
                met = self.marks[places[left] + move]
                found[left[met]], left = length, left[~met]
        self.marks[others] = False
        if len(left) and self.known < bound:
            # The distances are exact with any tree; scipy's default one takes half as long again.
            tree = KDTree(self._millimetres(others), leafsize=32, balanced_tree=False, compact_nodes=False)
            found[left] = tree.query(self._millimetres(places[left]), distance_upper_bound=bound)[0]
        return found

    def _millimetres(self, places: Places) -> NDArray[np.float64]:
        points: NDArray[np.float64] = np.transpose(np.unravel_index(places, self.shape)) * self.sides
        return points


def _surfaces(
    volume: Labels, classes: int, weights: NDArray[np.uint8]
) -> list[tuple[Places, Places, NDArray[np.uint8]]]:
    """Of every organ its border voxels, its surface elements, and the code of each element.

    Border voxels have a face to another class or to the outside. An element lies at the first of its 8 voxels, and its
    code is the sum of the `weights` (8,) of those that are of the organ.

    One pass over the volume finds all organs. MONAI goes organ by organ in a box around truth and prediction, and one
    stray voxel that was predicted far away makes that box the whole volume.
    """
    padded = np.pad(np.ascontiguousarray(volume), BORDER)
    border = np.zeros(padded.shape, bool)
    for axis in range(3):
        values, marks = padded.swapaxes(0, axis), border.swapaxes(0, axis)
        differ = values[1:] != values[:-1]
        marks[1:] |= differ
        marks[:-1] |= differ
    border &= padded > 0
    voxels, flat = np.flatnonzero(border), padded.ravel()

    cube = np.indices((2, 2, 2)).reshape(3, 8).T @ [padded[0].size, padded[0, 0].size, 1]
    touched = np.zeros(flat.shape, bool)
    for move in cube:
        touched[voxels - move] = True
    candidates = np.flatnonzero(touched)
    corners = [flat[candidates + move] for move in cube]
    parts = []
    for number, organs in enumerate(corners):
        # An organ that has several of the 8 voxels is looked at once, at its first one.
        first = np.flatnonzero(np.logical_and.reduce([organs > 0, *(organs != other for other in corners[:number])]))
        own = [other[first] == organs[first] for other in corners]
        parts.append((organs[first], candidates[first], np.tensordot(weights, own, 1)))
    organs, places, codes = (np.concatenate(part) for part in zip(*parts, strict=True))
    outer = codes < 255
    elements = _by_organ(organs[outer], classes, places[outer], codes[outer])
    return list(zip(*_by_organ(flat[voxels], classes, voxels), *elements, strict=True))


def _by_organ(organs: Labels, classes: int, *values: NDArray[Any]) -> list[list[NDArray[Any]]]:
    """Each array of values, split into those of organ 1, 2, ..."""
    ends, order = np.cumsum(np.bincount(organs, minlength=classes))[:-1], np.argsort(organs, kind="stable")
    return [np.split(value[order], ends)[1:] for value in values]
