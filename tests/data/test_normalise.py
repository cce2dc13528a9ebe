"""The canonical volume is what MONAI's own chain gives, in 8 or 16 bits."""

import math
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import monai.transforms as mt
import nibabel as nib
import numpy as np
import numpy.typing as npt
import pytest
import torch
from nibabel.affines import apply_affine, voxel_sizes
from scipy import ndimage
from volumes import REAL, oblique_affine, organ_labels, smooth_ct, write_nifti

from ssl_ray.config.schema import Preparation
from ssl_ray.data.nifti import Nifti, read_label, read_nifti
from ssl_ray.data.normalisations.intensities import measure
from ssl_ray.data.normalisations.window.settings import Window
from ssl_ray.data.normalise import prepare
from ssl_ray.errors import UserError
from ssl_ray.phantom.cohort import synthesize

SHAPE = (22, 26, 19)


AFFINE = oblique_affine((0.8, 1.1, 2.5), 25)


PRETRAINING = Preparation(spacing=(2, 2, 2), hu_window=(-57, 164), orientation=None)


FINETUNING = Preparation(spacing=(1.5, 1.5, 2), hu_window=(-175, 250), orientation="RAS")


@pytest.mark.parametrize("preparation", [PRETRAINING, FINETUNING], ids=["pretraining", "finetuning"])
@pytest.mark.parametrize("degrees", [0, 25, 60])
@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize("spacing", [(0.8, 1.1, 2.5), (3.0, 1.0, 1.0)])
def test_prepare_is_monais_own_chain(
    tmp_path: Path, preparation: Preparation, degrees: float, flip: bool, spacing: tuple[float, float, float]
) -> None:
    """Images agree with MONAI's transforms to half a stored level, labels, affine and crop exactly.

    MONAI is given the rotation as it was before the header rounded it. Where a label's voxel lies in the middle between
    two of the file, MONAI's own noise decides between them.
    """
    affine = oblique_affine(spacing, degrees, flip)
    files = {
        "image": write_nifti(tmp_path / "image.nii.gz", smooth_ct(SHAPE), affine),
        "label": write_nifti(tmp_path / "label.nii.gz", organ_labels(SHAPE), affine),
    }
    low, high = preparation.normalise.hu_window
    scan = read_nifti(files["image"])
    rotated = {"affine": torch.from_numpy(oblique_affine(voxel_sizes(scan.affine), degrees, flip))}
    chain: list[Any] = [mt.LoadImaged(list(files)), mt.EnsureChannelFirstd(list(files))]
    chain.append(mt.Lambdad(list(files), lambda data: data.meta.update(rotated) or data))
    if preparation.orientation:
        labels = (("L", "R"), ("P", "A"), ("I", "S"))
        chain.append(mt.Orientationd(list(files), axcodes=preparation.orientation, labels=labels))
    chain += [
        mt.Spacingd(list(files), pixdim=preparation.spacing, mode=("bilinear", "nearest")),
        mt.ScaleIntensityRanged("image", a_min=low, a_max=high, b_min=0.0, b_max=1.0, clip=True),
        mt.CropForegroundd(list(files), source_key="image"),
    ]
    expected = mt.Compose(chain)({name: str(path) for name, path in files.items()})

    prepared = prepare(scan, read_label(files["label"]), preparation)
    assert prepared.label is not None
    image = expected["image"][0].numpy().astype(np.float64)
    assert prepared.image.shape == image.shape
    assert np.abs(prepared.image - image * prepared.levels).max() <= 0.5 + 1e-6 * prepared.levels  # float32 in MONAI
    places = apply_affine(np.linalg.solve(scan.affine, prepared.affine), np.moveaxis(np.indices(image.shape), 0, -1))
    between = (np.abs(places % 1 - 0.5) < 1e-6).any(axis=-1)
    assert between.mean() < 0.9
    np.testing.assert_array_equal(prepared.label[~between], expected["label"][0].numpy()[~between])
    np.testing.assert_allclose(prepared.affine, expected["image"].affine.numpy(), atol=1e-5)
    assert prepared.image.flags.c_contiguous
    assert prepared.label.flags.c_contiguous


@pytest.mark.parametrize("orientation", [None, "RAS", "LPS", "LAS"])
@pytest.mark.parametrize("flip", [False, True])
def test_a_blob_stays_where_it_is_in_the_world(orientation: Any, flip: bool) -> None:
    """The affine of the canonical array maps a bright blob to the place in mm that it has in the file."""
    affine = oblique_affine((1.2, 0.9, 1.6), 20, flip)
    grid = np.indices(SHAPE).reshape(3, -1).T
    centre = apply_affine(affine, [9.3, 15.2, 8.8])
    blob = 1000 * np.exp(-0.5 * ((apply_affine(affine, grid) - centre) ** 2).sum(1) / 3.0**2)
    voxels = blob.reshape(SHAPE).astype(np.float32)
    preparation = Preparation(spacing=1.5, hu_window=(10, 1000), orientation=orientation)
    prepared = prepare(Nifti(voxels, affine), None, preparation)
    weights = prepared.image.astype(np.float64)
    place = apply_affine(prepared.affine, np.indices(weights.shape).reshape(3, -1).T)
    found = np.average(place, axis=0, weights=weights.ravel())
    assert np.linalg.norm(found - centre) < 0.15
    np.testing.assert_allclose(voxel_sizes(prepared.affine), 1.5, atol=1e-6)
    if orientation:
        assert "".join(nib.aff2axcodes(prepared.affine)) == orientation


def test_the_affine_says_where_the_crop_came_from() -> None:
    """Without the crop the same voxels stand at the same place; nothing outside of the crop is foreground."""
    image = Nifti(smooth_ct(SHAPE).astype(np.float32), AFFINE)
    cropped = prepare(image, None, FINETUNING)
    whole = prepare(image, None, FINETUNING.model_copy(update={"crop_foreground": False}))
    start = np.linalg.solve(whole.affine, cropped.affine)[:3, 3].round().astype(int)
    box = tuple(slice(a, a + side) for a, side in zip(start, cropped.image.shape, strict=True))
    np.testing.assert_array_equal(whole.image[box], cropped.image)
    assert (whole.image > 0).sum() == (cropped.image > 0).sum()
    assert min(start) > 0
    np.testing.assert_allclose(cropped.affine[:3, 3], apply_affine(whole.affine, start), atol=1e-9)


@pytest.mark.parametrize(
    ("window", "top"),
    [((-57, 164), 255), ((0, 255), 255), ((-100.5, 99.5), 255), ((0, 256), 65535), ((-175, 250), 65535)],
)
def test_integer_levels_of_the_window_are_kept(window: tuple[float, float], top: int) -> None:
    """8 bits hold a window of up to 256 integer HU levels, 16 bits a wider one: distinct HU stay distinct."""
    assert Window(hu_window=window).storage.levels == top
    count = math.floor(window[1]) - math.ceil(window[0]) + 1
    values = np.linspace(math.ceil(window[0]), math.floor(window[1]), count)
    voxels = np.broadcast_to(values[:, None, None], (count, 2, 2)).astype(np.float32)
    preparation = Preparation(spacing=1, hu_window=window, orientation=None, crop_foreground=False)
    prepared = prepare(Nifti(voxels, np.eye(4)), None, preparation)
    assert prepared.levels == top
    assert prepared.image.dtype == (np.uint8 if top == 255 else np.uint16)
    stored = prepared.image[:, 0, 0].astype(np.int64)
    assert (np.diff(stored) > 0).all()
    step = (window[1] - window[0]) / top
    assert np.abs(stored * step + window[0] - values).max() <= 0.5 * step + 1e-3


def test_a_volume_whose_foreground_the_new_grid_misses_is_refused() -> None:
    """Where no voxel of the coarser grid is above the window's lower end, there is nothing to crop to."""
    voxels = np.full((40, 40, 40), -200, np.float32)
    voxels[5::10] = 100
    coarse = PRETRAINING.model_copy(update={"spacing": (10.0, 10.0, 10.0)})
    with pytest.raises(UserError, match="no voxel lies above -57, where the body begins"):
        prepare(Nifti(voxels, np.eye(4)), None, coarse)
    assert (
        prepare(Nifti(voxels, np.eye(4)), None, coarse.model_copy(update={"crop_foreground": False})).image.max() == 0
    )


def test_an_affine_in_the_wrong_unit_does_not_exhaust_the_memory() -> None:
    """A volume that its affine makes metres wide is refused before it is resampled."""
    volume = Nifti(np.zeros((64, 64, 64), np.float32), np.diag([900.0, 900.0, 900.0, 1.0]))
    tracemalloc.start()
    with pytest.raises(ValueError, match=r"28351 x 28351 x 28351 voxels at spacing .* are more than 536870912"):
        prepare(volume, None, PRETRAINING)
    assert tracemalloc.get_traced_memory()[1] < 2**22
    tracemalloc.stop()


def body_ct() -> npt.NDArray[np.float32]:
    """A quarter of it body (fat, water, lung, bone), with a scanner's noise, in air."""
    tissue = np.array([-1000] * 30 + [-800, -100, -100, 30, 40, 50, 60, 60, 300, 900])
    field = np.clip(ndimage.gaussian_filter(np.random.default_rng(1).random((40, 40, 40)), 2) * 12 - 5.5, 0, 0.999)
    hu = tissue[(field * len(tissue)).astype(int)] + np.random.default_rng(2).normal(0, 12, field.shape)
    return np.clip(hu, -1024, 3071).round().astype(np.float32)


SPOILT: dict[str, tuple[Callable[[Any], Any], str]] = {
    "scaled to 0..1": (lambda hu: (hu + 1024) / 4095, "scaled, to 0..1"),
    "scaled to -1..1": (lambda hu: np.clip(hu, -1000, 1000) / 1000, "scaled, to 0..1"),
    "by mean and deviation": (lambda hu: (hu - hu.mean()) / hu.std(), "scaled, to 0..1"),
    "+ 1024": (lambda hu: hu + 1024, r"is it HU \+ 1024"),
    "+ 1024, clipped": (lambda hu: np.maximum(hu + 1024, 0), r"is it HU \+ 1024"),
    "+ 1024, padded": (lambda hu: np.where(hu < -1010, -2000, hu + 1024), r"is it HU \+ 1024"),
    "- 1024": (lambda hu: np.minimum(hu, 200) - 1024, r"0\.0% of them inside the window -57 to 164"),
    "of 8 bits": (lambda hu: np.clip((hu + 175) * 0.6, 0, 255).round(), "a picture of 8 bits"),
    "MR, slightly below 0": (lambda hu: np.maximum(hu + 1000, 0) / 8 - 2, "MR"),
    "background set to 0": (lambda hu: np.where(hu < 0, 0, hu), "was the background of a CT set to 0"),
    "a label map": (lambda hu: np.maximum(hu // 5, 0) % 14, "is it a label map"),
    "constant": (lambda hu: hu * 0 + 40, "40 to 40.*there is nothing in it"),
    "constant air": (lambda hu: hu * 0 - 1000, "-1000 to -1000.*there is nothing in it"),
}


@pytest.mark.parametrize("kind", SPOILT)
def test_what_is_no_ct_in_hu_is_refused(kind: str) -> None:
    """It would be stored as one grey: the message has the range found, the window and the likely cause."""
    change, cause = SPOILT[kind]
    hu = change(body_ct()).astype(np.float32)
    for preparation in (PRETRAINING, FINETUNING.model_copy(update={"crop_foreground": False})):
        with pytest.raises(
            UserError, match=rf"the values are {hu.min():g} to {hu.max():g}, .* of them inside the window"
        ):
            prepare(Nifti(hu, AFFINE), None, preparation)
    with pytest.raises(UserError, match=cause):
        prepare(Nifti(hu, AFFINE), None, PRETRAINING)


def test_every_ct_is_accepted() -> None:
    """CT cropped to the body, clipped to a window, in the synthetic cohort, and real ones where they lie beside it."""
    real = [read_nifti(path).voxels for path in sorted(REAL.glob("*/images/*.nii.gz"))[::70]]
    phantoms = [np.asarray(synthesize(0, index)[0].dataobj, np.float32) for index in range(2)]
    body = body_ct()
    for hu in (
        body,
        np.clip(body, -57, 164),
        np.clip(body, -175, 250),
        np.where(body < -900, 0, body),
        *phantoms,
        *real,
    ):
        for window in (PRETRAINING.normalise.hu_window, FINETUNING.normalise.hu_window, (-1000.0, 1000.0)):
            assert measure(hu, Window(hu_window=window)) == (*window, window[0])
