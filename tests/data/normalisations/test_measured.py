"""`percentile` and `zscore` store what MONAI's transforms give, over a body that is told from the air around it."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import monai.transforms as mt
import nibabel as nib
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file
from volumes import Array, oblique_affine, organ_labels, write_nifti

from ssl_ray.config.schema import Preparation
from ssl_ray.data.nifti import Nifti, read_nifti
from ssl_ray.data.normalisations.intensities import measure, otsu
from ssl_ray.data.normalisations.percentile.settings import Percentile
from ssl_ray.data.normalisations.zscore.settings import ZScore
from ssl_ray.data.normalise import VERSION, CanonicalVolume, metadata, prepare
from ssl_ray.errors import UserError
from ssl_ray.networks.weight_files import load_metadata
from ssl_ray.phantom.cohort import synthesize

AFFINE = np.diag([8.0, 8, 8, 1])
KINDS = [Percentile(), ZScore(), ZScore(over="all")]
Settings = Percentile | ZScore


@pytest.fixture(scope="module")
def scans() -> list[tuple[Array, Array]]:
    """T1 and T2 of three patients, (X, Y, Z) float32, each with the HU that a CT has there."""
    found = []
    for index in range(3):
        hu = np.asarray(synthesize(4, index, spacing=8)[0].dataobj, np.float32)
        *weightings, _ = synthesize(4, index, spacing=8, modality="MRI")
        found += [(np.asarray(one.dataobj, np.float32), hu) for one in weightings]
    return found


def whole(settings: Settings) -> Preparation:
    """On the grid of the scan, uncropped."""
    return Preparation(spacing=8, orientation=None, normalise=settings, crop_foreground=False)


def seen(prepared: CanonicalVolume) -> Array:
    return prepared.image.astype(np.float32) / prepared.levels


def monais(voxels: Array, settings: Settings) -> Array:
    """All of `voxels` by MONAI's transform of the kind."""
    if isinstance(settings, Percentile):
        transform: Any = mt.ScaleIntensityRangePercentiles(*settings.percentiles, 0, 1, clip=True)
    else:
        transform = mt.NormalizeIntensity()
    return np.asarray(transform(voxels[None].copy()))[0]


@pytest.mark.parametrize("settings", KINDS, ids=str)
def test_what_the_network_sees_is_what_monai_gives(scans: list[tuple[Array, Array]], settings: Settings) -> None:
    """Of all voxels, or of those of the body, to half a stored level; values beyond the ends are at them."""
    for voxels, _ in scans:
        found = seen(prepare(Nifti(voxels, AFFINE), None, whole(settings)))
        counted = voxels > (-np.inf if settings == ZScore(over="all") else measure(voxels, settings).floor)
        expected = np.clip(monais(voxels[counted], settings), *settings.storage.ends)
        np.testing.assert_allclose(found[counted], expected, atol=0.5 / settings.storage.levels + 1e-5)
        assert counted.mean() > 0.2


def test_zscores_of_the_body_are_monais_of_what_is_not_zero(scans: list[tuple[Array, Array]]) -> None:
    """With the air set to 0, `NormalizeIntensity(nonzero=True)` gives the body's voxels the same values."""
    for voxels, _ in scans:
        body = voxels > measure(voxels, ZScore()).floor
        expected = np.asarray(mt.NormalizeIntensity(nonzero=True)(np.where(body, voxels, 0)[None]))[0]
        found = seen(prepare(Nifti(voxels, AFFINE), None, whole(ZScore())))
        np.testing.assert_allclose(found[body], expected[body].clip(-8, 8), atol=5e-4)


def test_normalised_and_resampled_by_monai(tmp_path: Path, scans: list[tuple[Array, Array]]) -> None:
    """Oriented, normalised on the scan's own grid and then resampled by MONAI's chain, an oblique scan is the same."""
    path = write_nifti(tmp_path / "scan.nii.gz", scans[0][0], oblique_affine((7.0, 8.5, 9.0), 20, flip=True))
    chain = [
        mt.LoadImaged("image"),
        mt.EnsureChannelFirstd("image"),
        mt.Orientationd("image", axcodes="RAS", labels=(("L", "R"), ("P", "A"), ("I", "S"))),
        mt.NormalizeIntensityd("image"),
        mt.Spacingd("image", pixdim=(8, 8, 8), mode="bilinear"),
    ]
    expected = mt.Compose(chain)({"image": str(path)})["image"][0].numpy().clip(-8, 8)
    preparation = Preparation(spacing=8, normalise=ZScore(over="all"), crop_foreground=False)
    found = seen(prepare(read_nifti(path), None, preparation))
    assert found.shape == expected.shape
    np.testing.assert_allclose(found, expected, atol=2e-3)


def test_the_body_is_told_from_the_air(scans: list[tuple[Array, Array]]) -> None:
    """Under a bias field, at any scale: fat and soft tissue lie above the threshold, air does not.

    Measured: 98 % and none. Otsu's threshold of the values themselves would have 57 to 96 % of the tissue above it.
    """
    for voxels, hu in scans:
        above = voxels > measure(voxels, Percentile()).floor
        assert above[(hu > -150) & (hu < 250)].mean() > 0.96
        assert above[hu < -950].mean() < 0.01


def test_a_real_brain_is_told_from_the_zeros_around_it() -> None:
    """In the functional MRI that nibabel ships, all but a dark rim, of less than a third of its median, is body."""
    path = Path(nib.__file__).parent / "tests" / "data" / "example4d.nii.gz"
    brain = np.asarray(nib.load(path).dataobj, np.float32)[..., 0]
    body = brain > measure(brain, Percentile()).floor
    assert not body[brain == 0].any()
    assert body[brain > 0.3 * np.median(brain[brain > 0])].all()
    assert body.sum() > 0.9 * (brain > 0).sum()


@pytest.mark.parametrize("settings", KINDS, ids=str)
def test_the_unit_does_not_matter(scans: list[tuple[Array, Array]], settings: Settings) -> None:
    """A scan of other units is stored as the same integers, but for rounding; its crop is the same box."""
    preparation = whole(settings).model_copy(update={"crop_foreground": True})
    for voxels, _ in scans[:2]:
        one, other = (prepare(Nifti(voxels * np.float32(unit), AFFINE), None, preparation) for unit in (1, 0.0037))
        assert one.image.shape == other.image.shape
        assert np.abs(one.image.astype(np.int64) - other.image).max() <= 2
        assert one.intensities[0][1] == pytest.approx(other.intensities[0][1] / 0.0037, rel=1e-5)


@pytest.mark.parametrize("settings", [Percentile(), ZScore()], ids=str)
def test_the_crop_is_the_box_of_the_body(scans: list[tuple[Array, Array]], settings: Settings) -> None:
    """It is the box of the voxels above the threshold, and `body` tells them by what is stored."""
    for voxels, _ in scans:
        found = prepare(Nifti(voxels, AFFINE), None, whole(settings).model_copy(update={"crop_foreground": True}))
        above = voxels > measure(voxels, settings).floor
        box = tuple(slice(hits.min(), hits.max() + 1) for hits in np.nonzero(above))
        assert found.image.shape == above[box].shape
        stored_body = found.image > found.body[0]
        assert not (stored_body & ~above[box]).any()
        assert stored_body.sum() > 0.99 * above.sum()


TISSUES = (110, 260, 330, 560, 800)  # of the prostate in T2: muscle, marrow, the gland, fat, bladder


def parts(noise: float = 20) -> Array:
    """Tissues beside each other, without air, in the noise of a magnitude image."""
    random = np.random.default_rng(0)
    clean = np.repeat(TISSUES, (9, 5, 4, 8, 4))[None, :, None] * np.ones((30, 1, 12))
    return np.asarray(np.hypot(*(random.normal(mean, noise) for mean in (clean, clean * 0))), np.float32)


@pytest.mark.parametrize("settings", KINDS, ids=str)
def test_without_air_all_voxels_are_measured(settings: Settings) -> None:
    """In a small field of view no tissue is taken for the air: the network sees what MONAI gives."""
    found = seen(prepare(Nifti(parts(), AFFINE), None, whole(settings)))
    expected = np.clip(monais(parts(), settings), *settings.storage.ends)
    np.testing.assert_allclose(found, expected, atol=2e-3)


@pytest.mark.parametrize("settings", [Percentile(), ZScore()], ids=str)
def test_where_the_background_was_set_to_0_the_rest_is_body(settings: Settings) -> None:
    """A brain without its skull: dark ventricles are not taken for the air, and the body is what is not 0."""
    voxels = np.zeros((40, 40, 20), np.float32)
    inside = np.s_[5:-5, 5:-5, 4:-4]
    voxels[inside] = parts()
    voxels[15:25, 15:25, 5:15] *= 0.05
    body = voxels > measure(voxels, settings).floor
    assert (body == (voxels > 0)).all()
    found = seen(prepare(Nifti(voxels, AFFINE), None, whole(settings)))
    expected = np.clip(monais(voxels[inside], settings), *settings.storage.ends)
    np.testing.assert_allclose(found[inside], expected, atol=2e-3)


@pytest.mark.parametrize("settings", [Percentile(), ZScore()], ids=str)
def test_few_dark_voxels_and_padding_change_little(scans: list[tuple[Array, Array]], settings: Settings) -> None:
    """A voxel of -32768, or planes of -1000 that somebody added, are no air beside which all else is body."""
    for voxels, _ in scans:
        clean = measure(voxels, settings)
        spoilt = voxels.copy()
        spoilt[0, 0, 0] = -32768
        padded = np.pad(voxels, ((6, 0), (0, 0), (0, 0)), constant_values=-1000)
        for other in (spoilt, padded):
            np.testing.assert_allclose(measure(other, settings), clean, rtol=0.05)


@given(st.lists(st.integers(0, 5000), min_size=3, max_size=40).filter(lambda values: len(set(values)) > 1))
def test_otsu_leaves_least_variance_within_the_classes(values: list[int]) -> None:
    """Of all thresholds between square roots, tried one by one."""
    ordered = np.sort(np.array(values, np.float32))
    roots = np.sqrt(ordered - ordered[0], dtype=np.float64)

    def within(above: Array) -> float:
        return float(sum(part.size * part.var() for part in (roots[above], roots[~above])))

    best = min(within(ordered > split) for split in set(values) - {max(values)})
    assert within(ordered > otsu(ordered)) == pytest.approx(best, rel=1e-9, abs=1e-9)


NOISE = np.random.default_rng(0).normal(20, 4, (24, 24, 24)).astype(np.float32)
SPOILT: dict[str, tuple[Callable[[Array], Array], str]] = {
    "constant": (lambda noise: noise * 0 + 7, "1 distinct values, 7 to 7, and 0.00% above 7"),
    "a label map": (lambda noise: organ_labels((24, 24, 24), 14), "14 distinct values, 0 to 13, .* a label map"),
    "few bright voxels": (lambda noise: noise + 1e4 * (np.arange(24) < 1) * (noise > 25), "far brighter than all"),
}


@pytest.mark.parametrize("settings", KINDS, ids=str)
@pytest.mark.parametrize("kind", SPOILT)
def test_what_has_no_contrast_is_refused(settings: Settings, kind: str) -> None:
    """It would be stored as one grey, or not at all."""
    change, cause = SPOILT[kind]
    voxels = np.asarray(change(NOISE), np.float32)
    with pytest.raises(UserError, match=f"no scan to normalise: .*{cause}"):
        prepare(Nifti(voxels, AFFINE), None, whole(settings))


@pytest.mark.parametrize("settings", [Percentile(), ZScore()], ids=str)
def test_a_saturated_body_is_refused(settings: Settings) -> None:
    """Where every voxel of the body has one value, that would be the lowest and the highest."""
    voxels = NOISE.copy()
    voxels[6:18, 6:18, 6:18] = 4095
    with pytest.raises(UserError, match="no scan to normalise: 4095 would be both 0 and 1"):
        prepare(Nifti(voxels, AFFINE), None, whole(settings))


def test_a_mr_that_a_window_refuses_is_taken(scans: list[tuple[Array, Array]]) -> None:
    """The check for HU is that of the window alone."""
    for voxels, _ in scans:
        with pytest.raises(UserError, match="not a CT in HU"):
            prepare(Nifti(voxels, AFFINE), None, Preparation(spacing=8, hu_window=(-175, 250)))
        assert prepare(Nifti(voxels, AFFINE), None, whole(Percentile())).image.max() == 65535


@pytest.mark.parametrize("settings", KINDS, ids=str)
def test_weights_say_how_their_volumes_were_prepared(tmp_path: Path, settings: Settings) -> None:
    """All of it comes back out of a file of weights, as it was set."""
    preparation = Preparation(spacing=(1.25, 1.5, 2), orientation="LPS", normalise=settings, channels=3)
    path = tmp_path / "weights.safetensors"
    save_file({"a": torch.ones(2)}, path, metadata(preparation))
    found = json.loads(load_metadata(path)["preparation"])
    assert found.pop("version") == VERSION
    assert Preparation.model_validate(found) == preparation
