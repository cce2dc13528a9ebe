"""The canonical volume is what MONAI's own chain gives, in 8 or 16 bits."""

import math
import tracemalloc
from pathlib import Path
from typing import Any

import monai.transforms as mt
import nibabel as nib
import numpy as np
import pytest
from nibabel.affines import apply_affine, voxel_sizes
from volumes import oblique_affine, organ_labels, smooth_ct, write_nifti

from ssl_ray.config.schema import Preparation
from ssl_ray.data.nifti import Nifti, read_label, read_nifti
from ssl_ray.data.normalise import levels, prepare

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
    """Images agree with MONAI's transforms to half a stored level, labels, affine and crop exactly."""
    affine = oblique_affine(spacing, degrees, flip)
    files = {
        "image": write_nifti(tmp_path / "image.nii.gz", smooth_ct(SHAPE), affine),
        "label": write_nifti(tmp_path / "label.nii.gz", organ_labels(SHAPE), affine),
    }
    low, high = preparation.hu_window
    chain: list[Any] = [mt.LoadImaged(list(files)), mt.EnsureChannelFirstd(list(files))]
    if preparation.orientation:
        labels = (("L", "R"), ("P", "A"), ("I", "S"))
        chain.append(mt.Orientationd(list(files), axcodes=preparation.orientation, labels=labels))
    chain += [
        mt.Spacingd(list(files), pixdim=preparation.spacing, mode=("bilinear", "nearest")),
        mt.ScaleIntensityRanged("image", a_min=low, a_max=high, b_min=0.0, b_max=1.0, clip=True),
        mt.CropForegroundd(list(files), source_key="image"),
    ]
    expected = mt.Compose(chain)({name: str(path) for name, path in files.items()})

    prepared = prepare(read_nifti(files["image"]), read_label(files["label"]), preparation)
    assert prepared.label is not None
    image = expected["image"][0].numpy().astype(np.float64)
    assert prepared.image.shape == image.shape
    assert np.abs(prepared.image - image * prepared.levels).max() <= 0.5 + 1e-6 * prepared.levels  # float32 in MONAI
    np.testing.assert_array_equal(prepared.label, expected["label"][0].numpy())
    np.testing.assert_allclose(prepared.affine, expected["image"].affine.numpy(), atol=1e-9)
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
    assert levels(window) == top
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


def test_a_volume_without_foreground_is_refused() -> None:
    """A volume that is all below the window has nothing to crop to; uncropped it is all zero."""
    air = Nifti(np.full((5, 5, 5), -1000, np.float32), AFFINE)
    with pytest.raises(ValueError, match="no voxel lies above -57 HU"):
        prepare(air, None, PRETRAINING)
    assert prepare(air, None, PRETRAINING.model_copy(update={"crop_foreground": False})).image.max() == 0


def test_an_affine_in_the_wrong_unit_does_not_exhaust_the_memory() -> None:
    """A volume that its affine makes metres wide is refused before it is resampled."""
    volume = Nifti(np.zeros((64, 64, 64), np.float32), np.diag([900.0, 900.0, 900.0, 1.0]))
    tracemalloc.start()
    with pytest.raises(ValueError, match=r"5\.76e\+04 x 5\.76e\+04 x 5\.76e\+04 mm are .* voxels at spacing"):
        prepare(volume, None, PRETRAINING)
    assert tracemalloc.get_traced_memory()[1] < 2**22
    tracemalloc.stop()
