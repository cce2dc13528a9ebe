"""Image and label of the store lie on one grid, whatever the label's own affine says of the same voxels."""

from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from nibabel.affines import apply_affine, voxel_sizes
from scipy.spatial.transform import Rotation
from volumes import Array, organ_labels, smooth_ct, stored

from ssl_ray.config.schema import Preparation
from ssl_ray.data.datalist import Case
from ssl_ray.data.nifti import Nifti, on_image_grid
from ssl_ray.data.normalise import prepare
from ssl_ray.data.prepare import prepare_case
from ssl_ray.data.store import Store

SIDES = st.floats(1.0, 3.0) | st.sampled_from([1.0, 1.5, 2.0, 3.0])
SPACINGS = st.tuples(SIDES, SIDES, SIDES)
AXES = ["".join(axes) for axes in ("RAS", "LPS", "LAS", "PIR", "ASL", "SAL")]


def organs(shape: tuple[int, ...]) -> Array:
    """Two ellipsoids, away from the rim of air that is cropped."""
    places = np.moveaxis(np.indices(shape), 0, -1) / (np.array(shape) - 1)
    labels = np.zeros(shape, np.uint8)
    for value, centre in enumerate(((0.35, 0.4, 0.6), (0.65, 0.6, 0.4)), 1):
        labels[((places - centre) ** 2).sum(-1) < 0.045] = value
    return labels


def centroids(label: Array, affine: Array) -> Array:
    """In mm, (labels, 3)."""
    return np.array([apply_affine(affine, np.argwhere(label == value)).mean(0) for value in (1, 2)])


@given(
    turn=st.tuples(*[st.floats(-180, 180)] * 3),
    spacing=SPACINGS,
    target=SPACINGS,
    shape=st.tuples(*[st.integers(16, 30)] * 3),
    oblique=st.booleans(),
    single=st.booleans(),
    orientation=st.sampled_from([None, "RAS", "LPS"]),
    label_axes=st.sampled_from(AXES),
    noise=st.integers(0, 2**32 - 1),
)
@settings(max_examples=30, deadline=None)
def test_image_and_label_have_one_grid(
    turn: Any,
    spacing: Any,
    target: Any,
    shape: Any,
    oblique: bool,
    single: bool,
    orientation: Any,
    label_axes: Any,
    noise: int,
) -> None:
    """Equal shapes, each organ within half a voxel of where the file has it, and float noise changes no voxel."""
    rotation = Rotation.from_euler("xyz", turn if oblique else np.round(np.array(turn) / 90) * 90, degrees=True)
    affine = nib.affines.from_matvec(rotation.as_matrix() * spacing, (-117.0, 23.5, 401.25))
    if single:  # as the headers of NIfTI-1 hold it
        affine = affine.astype(np.float32).astype(np.float64)
    image, truth = Nifti(smooth_ct(shape).astype(np.float32), affine), organs(shape)
    axes = nib.orientations.axcodes2ornt(label_axes)
    written = nib.Nifti1Image(truth, affine)
    written = written.as_reoriented(nib.orientations.ornt_transform(nib.io_orientation(affine), axes))
    noisy = written.affine.copy()
    noisy[:3] += np.random.default_rng(noise).uniform(-1e-6, 1e-6, (3, 4))
    preparation = Preparation(spacing=target, hu_window=(-175, 250), orientation=orientation)
    label = on_image_grid(image, Nifti(np.asarray(written.dataobj, np.float32), noisy), Path("label.nii"))
    found = prepare(image, label, preparation)
    assert found.label is not None
    assert found.label.shape == found.image.shape
    exact = prepare(image, Nifti(truth.astype(np.float32), affine), preparation).label
    np.testing.assert_array_equal(found.label, exact)
    apart = centroids(found.label, found.affine) - centroids(truth, affine)
    moved = apart @ np.linalg.inv(affine[:3, :3]).T  # in voxels of the file
    stored_sides = np.abs(np.linalg.inv(affine[:3, :3]) @ found.affine[:3, :3]).max(axis=1)
    assert (np.abs(moved) <= 0.5 * np.maximum(1, stored_sides) + 1e-3).all()


def test_a_label_has_as_many_slices_as_its_image() -> None:
    """At 3 -> 2 mm, half of all slice counts end at .5, where MONAI's rounding of a label's own affine may go apart."""
    preparation = Preparation(spacing=2, hu_window=(-175, 250), orientation="RAS", crop_foreground=False)
    for slices in range(60, 120):
        image = Nifti(smooth_ct((8, 7, slices)).astype(np.float32), np.diag([3.0, 3, 3, 1]))
        off = -2e-7 if slices % 4 < 2 else 2e-7  # the way that rounds apart
        label = Nifti(organ_labels((8, 7, slices)).astype(np.float32), np.diag([3.0, 3, 3 + off, 1]))
        found = prepare(image, on_image_grid(image, label, Path("label.nii")), preparation)
        assert found.label is not None
        assert found.label.shape == found.image.shape


@pytest.mark.parametrize("axes", ["RAS", "LPS", "PIR"])
def test_foreground_of_the_store_is_foreground(store: Store, tmp_path: Path, axes: str) -> None:
    """From files: a label off by 2e-7 mm and with axes of its own lies where its image shows it, voxel by voxel."""
    shape = (12, 14, 70)
    truth = organ_labels(shape)
    image = np.where(truth > 0, 60 * truth.astype(np.int16), -500).astype(np.int16)
    image[:2] = image[-2:] = -1000
    affine = np.diag([3.0, 3, 3, 1])
    nib.save(nib.Nifti2Image(image, affine), tmp_path / "image.nii.gz")
    near = nib.Nifti2Image(truth, affine + np.diag([0, 0, 2e-7, 0]))
    turn = nib.orientations.ornt_transform(nib.io_orientation(affine), nib.orientations.axcodes2ornt(axes))
    nib.save(near.as_reoriented(turn), tmp_path / "label.nii")
    preparation = Preparation(spacing=3, hu_window=(-175, 250), orientation="RAS")
    volume, _ = prepare_case(Case("one", tmp_path / "image.nii.gz", tmp_path / "label.nii"), preparation, store)
    arrays = stored(store, volume)
    assert arrays["label"].shape == arrays["image"].shape == volume.shape
    hu = arrays["image"] / volume.levels * 425 - 175
    inside = hu.ravel()[arrays["foreground"]]
    np.testing.assert_allclose(inside, 60.0 * arrays["label"].ravel()[arrays["foreground"]], atol=0.1)
    np.testing.assert_allclose(voxel_sizes(np.array(volume.affine)), 3)
