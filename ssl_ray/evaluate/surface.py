"""How far the surfaces of predicted and true organs lie apart."""

from typing import Any

import numpy as np
from monai.metrics.utils import create_table_neighbour_code_to_surface_area
from nibabel.affines import voxel_sizes
from numpy.typing import NDArray
from scipy.spatial import KDTree

Labels = NDArray[np.integer[Any]]
"""Class numbers (X, Y, Z)."""
Points = NDArray[np.float64]
"""Places (N, 3) in a volume in mm, along its axes or, where these are sheared, in space."""
_STRAIGHT = 1e-4
"""Cosine between axes that counts as a right angle: headers in float32 shear a rotation by up to 1e-5."""


def surface_scores(
    prediction: Labels, truth: Labels, classes: int, affine: NDArray[np.float64], tolerance: float
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """HD95 in mm and surface Dice, each (classes - 1,), organ 1 first, nan where the organ is absent from the truth.

    HD95 is the larger of the two directed 95th percentiles of the distances between border voxels, those that erosion
    removes (MONAI's `compute_hausdorff_distance(percentile=95)`); nan where the organ was missed, too.

    Surface Dice is the share of the area of both surfaces that lies within the tolerance, in mm, of the other one; 0
    where the organ was missed. A surface is made of elements in the middle of 8 voxels, each with an area in mm2: the
    definition of DeepMind and of MONAI's `compute_surface_dice(use_subvoxels=True)`. Counting voxels would give a face
    between thick slices the weight of many.

    Both volumes lie on the original grid, whose `affine` (4, 4) maps voxels to mm. On a sheared one (a tilted gantry)
    distances are right, too, but areas, by which surface Dice is weighted, are those of voxels with right angles.
    """
    hd95, surface_dice = np.full(classes - 1, np.nan), np.full(classes - 1, np.nan)
    spacing = voxel_sizes(affine)
    units = affine[:3, :3] / spacing
    sheared = (np.abs(units.T @ units - np.eye(3)) > _STRAIGHT).any()
    to_mm = affine[:3, :3].T if sheared else np.diag(spacing)
    table, kernel = create_table_neighbour_code_to_surface_area(tuple(spacing))
    areas, weights = table.double().numpy(), kernel.numpy().astype(np.uint8).ravel()
    surfaces = zip(*(_surfaces(volume, classes, weights, to_mm) for volume in (prediction, truth)), strict=True)
    for organ, ((borders, elements, codes), (true_borders, true_elements, true_codes)) in enumerate(surfaces):
        if not len(true_borders):
            continue
        if not len(borders):
            surface_dice[organ] = 0.0
            continue
        apart = _distances(borders, true_borders), _distances(true_borders, borders)
        hd95[organ] = max(np.percentile(directed, 95) for directed in apart)
        pairs = (elements, true_elements), (true_elements, elements)
        near = np.concatenate([_distances(*pair, 1.001 * tolerance) <= tolerance for pair in pairs])
        surface_dice[organ] = np.average(near, weights=areas[np.concatenate([codes, true_codes])])
    return hd95, surface_dice


def _distances(points: Points, others: Points, bound: float = np.inf) -> NDArray[np.float32]:
    """Distance in mm of each point to the nearest of the others, where that is below the bound; else inf.

    MONAI rounds to float32, too. Without it, whether two points exactly one tolerance apart are within it would depend
    on where in the volume they lie.
    """
    # The distances are exact with any tree; scipy's default one takes half as long again.
    tree = KDTree(others, leafsize=32, balanced_tree=False, compact_nodes=False)
    return np.asarray(tree.query(points, distance_upper_bound=bound)[0], np.float32)


def _surfaces(
    volume: Labels, classes: int, weights: NDArray[np.uint8], to_mm: NDArray[np.float64]
) -> list[tuple[Points, Points, NDArray[np.uint8]]]:
    """Of every organ its border voxels, its surface elements, and the code of each element.

    Border voxels have a face to another class or to the outside. An element lies at the first of its 8 voxels, and its
    code is the sum of the `weights` (8,) of those that are of the organ. Indices times `to_mm` (3, 3) are places in mm.

    One pass over the volume finds all organs. MONAI goes organ by organ in a box around truth and prediction, and one
    stray voxel that was predicted far away makes that box the whole volume.
    """
    padded = np.pad(np.ascontiguousarray(volume), 1)  # a surface element may lie one before the first voxel
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
    at, elements = (np.transpose(np.unravel_index(p, padded.shape)) @ to_mm for p in (voxels, places[outer]))
    surfaces = _by_organ(organs[outer], classes, elements, codes[outer])
    return list(zip(*_by_organ(flat[voxels], classes, at), *surfaces, strict=True))


def _by_organ(organs: Labels, classes: int, *values: NDArray[Any]) -> list[list[NDArray[Any]]]:
    """Each array of values, split into those of organ 1, 2, ..."""
    ends, order = np.cumsum(np.bincount(organs, minlength=classes))[:-1], np.argsort(organs, kind="stable")
    return [np.split(value[order], ends)[1:] for value in values]
