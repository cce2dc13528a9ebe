"""Three interpolations in one dimension are MONAI's one in three."""

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from monai.data import MetaTensor
from monai.transforms import Orientation, Spacing
from nibabel.affines import apply_affine
from volumes import oblique_affine, smooth_ct

from ssl_ray.config.schema import Preparation
from ssl_ray.data.resample import AXIS_CODES, canonical_grid, resample
from ssl_ray.evaluate.metrics import to_original_grid

sides = st.floats(0.4, 4.0)


def monai(voxels: Any, affine: Any, preparation: Preparation) -> Any:
    data = MetaTensor(torch.from_numpy(voxels)[None], affine=torch.from_numpy(affine))
    if preparation.orientation:
        data = Orientation(preparation.orientation, labels=AXIS_CODES)(data)
    return Spacing(preparation.spacing, mode="bilinear")(data)


@given(
    order=st.permutations([0, 1, 2]),
    signs=st.tuples(*[st.sampled_from([-1.0, 1.0])] * 3),
    spacing=st.tuples(sides, sides, sides),
    target=st.tuples(sides, sides, sides),
    orientation=st.sampled_from([None, "RAS", "LPS"]),
    fortran=st.booleans(),
)
@settings(max_examples=60)
def test_any_stored_axes(order: Any, signs: Any, spacing: Any, target: Any, orientation: Any, fortran: bool) -> None:
    """Whatever the order, the direction and the spacing of the stored axes: MONAI's values, shape and affine."""
    affine = np.eye(4)
    affine[:3, :3] = np.eye(3)[:, order] * signs * spacing
    affine[:3, 3] = (-17.0, 23.5, 101.25)
    voxels = smooth_ct((9, 12, 8)).astype(np.float32)
    voxels = np.asfortranarray(voxels) if fortran else voxels
    preparation = Preparation(spacing=target, hu_window=(-57, 164), orientation=orientation)
    expected = monai(voxels, affine, preparation)
    grid = canonical_grid(voxels.shape, affine, preparation)
    found, first = resample(voxels, grid, None)
    assert first.tolist() == [0, 0, 0]
    assert found.shape == tuple(expected.shape[1:]) == grid.shape
    np.testing.assert_allclose(grid.affine, expected.affine.numpy(), atol=1e-9)
    np.testing.assert_allclose(found, expected[0].numpy(), atol=1e-3)  # HU; float32 has steps of 6e-5 at 700 HU


def test_what_is_left_out_holds_nothing_above() -> None:
    """The box stands where it says it does, and all values beyond it are at most the given one."""
    voxels = smooth_ct((30, 26, 20)).astype(np.float32)
    preparation = Preparation(spacing=(1.3, 0.7, 2.0), hu_window=(300, 600))
    grid = canonical_grid(voxels.shape, np.diag([1.0, -1.0, 1.5, 1.0]), preparation)
    whole, _ = resample(voxels, grid, None)
    box, first = resample(voxels, grid, 300.0)
    inside = tuple(slice(a, a + n) for a, n in zip(first, box.shape, strict=True))
    assert box.size < whole.size
    np.testing.assert_allclose(whole[inside], box, atol=1e-3)
    assert (whole > 300).any()
    assert (whole > 300).sum() == (whole[inside] > 300).sum()
    assert resample(voxels, grid, 5000.0)[0].size == 0


def test_constant_stays_constant() -> None:
    """A volume at the window's lower end does not rise above it by rounding: no foreground out of nothing."""
    voxels = np.full((17, 13, 11), -57, np.float32)
    preparation = Preparation(spacing=(1.1, 0.9, 1.7), hu_window=(-57, 164))
    grid = canonical_grid(voxels.shape, np.diag([0.7, 0.7, 3.0, 1.0]), preparation)
    assert (resample(voxels, grid, None)[0] == -57).all()


@pytest.mark.parametrize("shear", [0.0, 1e-3])
def test_a_sheared_grid_is_left_to_monai(shear: float) -> None:
    """Obliquity alone is straight; where the source's axes are not orthogonal, there is no such grid."""
    affine = oblique_affine((0.8, 1.1, 2.5), 25)
    affine[:3, 1] += shear * affine[:3, 0]
    grid = canonical_grid((22, 26, 19), affine, Preparation(spacing=2, hu_window=(-57, 164)))
    assert grid.straight != bool(shear)
    if grid.straight:
        middle = (np.array(grid.shape) - 1) / 2
        source = np.zeros(3)
        source[list(grid.axes)] = np.array(grid.scale) * middle + grid.shift
        np.testing.assert_allclose(apply_affine(affine, source), apply_affine(grid.affine, middle), atol=1e-6)


@pytest.mark.parametrize(("thick", "target"), [(5, 1), (5, 2), (3, 1), (2, 3)])
@pytest.mark.parametrize("orientation", [None, "RAS"])
@pytest.mark.parametrize("digits", [None, 5])
def test_no_slice_of_an_oblique_scan_is_lost(thick: float, target: float, orientation: Any, digits: int | None) -> None:
    """Every voxel of the file lies in the prepared grid, though a header holds rotations in float32 or few digits."""
    preparation = Preparation(spacing=(1.5, 1.5, target), hu_window=(-57, 164), orientation=orientation)
    for slices in range(8, 24):
        affine = oblique_affine((1, 1, 1), 3 * slices - 35, flip=slices % 3 == 0)
        affine[:3, :3] = affine[:3, :3].round(digits) if digits else affine[:3, :3]
        affine = (affine * [0.7, 0.8, thick, 1]).astype(np.float32).astype(float)
        grid = canonical_grid((12, 11, slices), affine, preparation)
        assert to_original_grid(np.ones(grid.shape, np.uint8), grid.affine, (12, 11, slices), affine).all(), slices
