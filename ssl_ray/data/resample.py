"""Resampling one volume to its canonical grid, as MONAI's `Orientation` and `Spacing` do it.

MONAI interpolates in three dimensions at once, in float64, at the coordinates of every voxel. But its new grid has the
axes of the old one, whatever their obliquity: source coordinates are a permutation, a scale and a shift of the new
ones. So three interpolations in one dimension give the same, and what the crop to the foreground will cut off need not
be computed: that takes a tenth of the time. The grid itself is MONAI's, and so is the rare volume that this cannot do.
Labels take the nearest voxel along each axis of their image's grid, in a tenth of the time of scipy's affine transform.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt
import torch
from monai.data import MetaTensor
from monai.transforms import Orientation, Spacing
from scipy.linalg import polar

from ssl_ray.config.schema import Preparation
from ssl_ray.data.nifti import Nifti

AXIS_CODES = (("L", "R"), ("P", "A"), ("I", "S"))
"""The codes of an orientation name where an axis points to, in nibabel's convention."""

_UNCHANGED = 1e-3
"""MONAI takes affines that are closer than this for the same (`AFFINE_TOL`), and does not resample."""
_STRAIGHT = 1e-7
"""Voxels by which shear may move a coordinate."""
ROUNDED = 5e-5
"""How far rounding moves a header's direction cosines from those of a rotation; float32 alone does by up to 1e-5."""


@dataclass(frozen=True)
class VoxelGrid:
    """The canonical grid of a volume, which MONAI would resample to.

    Its axis j runs along axis `axes[j]` of the source, where its index i lies at `scale[j] * i + shift[j]` voxels; not
    so where it is not `straight`, as after a sheared scan. `affine` (4, 4) maps its voxels to mm.
    """

    affine: npt.NDArray[np.float64]
    shape: tuple[int, ...]
    axes: tuple[int, ...]
    scale: tuple[float, ...]
    shift: tuple[float, ...]
    straight: bool


def by_monai(volume: Nifti, preparation: Preparation, mode: Literal["bilinear", "nearest"]) -> Nifti:
    """The volume oriented and resampled by MONAI's own transforms."""
    data = MetaTensor(torch.from_numpy(volume.voxels)[None], affine=torch.from_numpy(volume.affine))
    if preparation.orientation:
        data = Orientation(preparation.orientation, labels=AXIS_CODES)(data)
    data = Spacing(preparation.spacing, mode=mode)(data)
    return Nifti(data[0].numpy(), data.affine.numpy().astype(np.float64))


def canonical_grid(shape: Sequence[int], affine: npt.NDArray[np.float64], preparation: Preparation) -> VoxelGrid:
    """The grid of a source whose `shape` is in voxels, and whose `affine` (4, 4) maps voxels to mm."""
    exact = _right_angled(affine)
    there = MetaTensor(torch.empty(1).expand(1, *shape), affine=torch.from_numpy(exact))
    if preparation.orientation:
        there = Orientation(preparation.orientation, labels=AXIS_CODES, lazy=True)(there)
    turned, sides = there.peek_pending_affine().numpy(), tuple(there.peek_pending_shape())
    there = Spacing(preparation.spacing, mode="bilinear", lazy=True)(there)
    target, new = there.peek_pending_affine().numpy(), tuple(int(side) for side in there.peek_pending_shape())
    step = np.linalg.solve(turned, target)
    if new == sides and (np.allclose(turned, target, atol=_UNCHANGED) or np.allclose(step, np.eye(4), atol=_UNCHANGED)):
        target = turned
    source = np.linalg.solve(exact, target)
    axes = np.abs(source[:3, :3]).argmax(axis=0)
    scale = source[axes, [0, 1, 2]]
    shear = np.abs(source[:3, :3])
    shear[axes, [0, 1, 2]] = 0
    straight = sorted(axes) == [0, 1, 2] and bool((shear @ new <= _STRAIGHT).all())
    target = target + (affine - exact) @ source  # the new voxels lie in the file's own, where the file says
    return VoxelGrid(target, new, tuple(axes.tolist()), tuple(scale), tuple(source[axes, 3]), straight)


def _right_angled(affine: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """The affine (4, 4) with exactly orthogonal axes, where they are so up to a header's rounding; else as it is.

    `Spacing` lays its first voxel on the source's where axes are orthogonal to 1e-8. Elsewhere its grid is off by half
    the difference of the spacings, and the first of thick slices would lie outside of it.
    """
    sides = np.linalg.norm(affine[:3, :3], axis=0)
    apart = polar(affine[:3, :3] / sides)[0] - affine[:3, :3] / sides
    exact = affine.copy()
    exact[:3, :3] += apart * sides * (np.abs(apart).max() <= ROUNDED)
    return exact


def resample(
    voxels: npt.NDArray[np.float32], grid: VoxelGrid, above: float | None
) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.int64]]:
    """Interpolate `voxels` (X, Y, Z) linearly on the grid; beyond the source's edge its last voxel is repeated.

    Returns a box of the resampled volume, and the grid's index of its first voxel (3). Margins that hold no value above
    `above` may be left out of it, none where `above` is None; the box is empty where no value is above.
    """
    data = torch.from_numpy(voxels.T)  # a NIfTI's x is the fastest axis in memory
    reach = [(0, side) for side in data.shape] if above is None else _reach(data, above)
    places: dict[int, npt.NDArray[np.float64]] = {}  # key: axis of `data`
    first = []
    for side, axis, scale, shift in zip(grid.shape, grid.axes, grid.scale, grid.shift, strict=True):
        dim = 2 - axis
        place = np.clip(scale * np.arange(side) + shift, 0, data.shape[dim] - 1)
        used = np.flatnonzero((place > reach[dim][0] - 1) & (place < reach[dim][1]))
        if not used.size:
            return np.zeros((0, 0, 0), np.float32), np.zeros(3, np.int64)
        places[dim] = place[used[0] : used[-1] + 1]
        first.append(int(used[0]))
    # The axis that shrinks most comes first: it leaves the least for the others.
    for dim in sorted(places, key=lambda dim: len(places[dim]) / data.shape[dim]):
        data = _along(data, dim, places[dim])
    return data.numpy().T.transpose(grid.axes), np.array(first, np.int64)


def nearest(
    voxels: npt.NDArray[np.float32],
    grid: VoxelGrid,
    start: npt.NDArray[np.int64],
    end: npt.NDArray[np.int64],
) -> npt.NDArray[np.uint8]:
    """The label map `voxels` (X, Y, Z) on the grid's voxels from `start` to before `end` (3): the nearest value.

    A place in the middle between two voxels takes the even one, where MONAI's noise decides: that is no shift.
    """
    data = voxels.T.astype(np.uint8)
    for axis, scale, shift, first, last in zip(grid.axes, grid.scale, grid.shift, start, end, strict=True):
        place = np.rint(scale * np.arange(first, last) + shift).clip(0, voxels.shape[axis] - 1)
        data = data.take(place.astype(np.int64), axis=2 - axis)
    return data.T.transpose(grid.axes)


def _reach(data: torch.Tensor, above: float) -> list[tuple[int, int]]:
    """First and last + 1 index along each axis where any value is above `above`."""
    ranges = []
    seen = data.amax(dim=0)
    for peaks in (data.flatten(1).amax(dim=1), seen.amax(dim=1), seen.amax(dim=0)):
        hit = (peaks > above).nonzero()
        ranges.append((int(hit[0]), int(hit[-1]) + 1) if len(hit) else (0, 0))
    return ranges


def _along(data: torch.Tensor, axis: int, place: npt.NDArray[np.float64]) -> torch.Tensor:
    """Linear interpolation of `data` at the places (in voxels) along one axis."""
    low = np.minimum(place.astype(np.int64), data.shape[axis] - 1)
    high = np.minimum(low + 1, data.shape[axis] - 1)
    weight = torch.from_numpy((place - low).astype(np.float32))
    near, far = (data.index_select(axis, torch.from_numpy(index)) for index in (low, high))
    shape = [1, 1, 1]
    shape[axis] = -1
    # `lerp` between equal values gives exactly that value, so a voxel at the window's lower end does not rise above it.
    return near.lerp_(far, weight.view(shape))
