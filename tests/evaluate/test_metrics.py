"""Metrics against MONAI and nibabel, on oblique and anisotropic grids."""

import json
import re
from dataclasses import asdict

import nibabel as nib
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from mlflow.utils.validation import _validate_metric_name
from monai.metrics import DiceMetric, compute_dice, compute_hausdorff_distance, compute_surface_dice
from monai.networks.utils import one_hot
from nibabel.affines import apply_affine, voxel_sizes
from nibabel.processing import resample_from_to
from scipy import ndimage
from scipy.spatial.transform import Rotation
from torch import Tensor

from ssl_ray.evaluate.metrics import dice, evaluate, evaluate_canonical, to_original_grid
from ssl_ray.evaluate.scores import PUBLISHED_DICE, CaseScores, Scores, aggregate, organ_keys
from ssl_ray.evaluate.surface import surface_scores

SHAPE = (30, 26, 14)
SPACING = (0.8, 1.1, 2.5)


def blobs(seed: int, classes: int, shape: tuple[int, ...] = SHAPE, absent: tuple[int, ...] = ()) -> np.ndarray:
    """Smooth random regions, one a class, some of which touch the border."""
    noise = np.random.default_rng(seed).normal(size=(classes, *shape))
    smooth = np.stack([ndimage.gaussian_filter(channel, 3) for channel in noise])
    smooth[list(absent)] = -np.inf
    labels: np.ndarray = smooth.argmax(0).astype(np.uint8)
    return labels


def shifted(truth: np.ndarray, voxels: int) -> np.ndarray:
    return np.roll(truth, voxels, axis=(0, 2))


def channels(labels: np.ndarray, classes: int) -> Tensor:
    onehot: Tensor = one_hot(torch.from_numpy(labels)[None, None].long(), classes)
    return onehot  # (1, classes, X, Y, Z)


def oblique(seed: int, spacing: tuple[float, float, float], axes: tuple[int, int, int]) -> np.ndarray:
    """A rotated affine whose columns are permuted and partly flipped."""
    random = np.random.default_rng(seed)
    rotation = Rotation.from_euler("xyz", random.uniform(-25, 25, 3), degrees=True).as_matrix()
    affine = np.eye(4)
    affine[:3, :3] = (rotation @ np.diag(random.choice([-1, 1], 3)))[:, axes] @ np.diag(spacing)
    affine[:3, 3] = random.uniform(-40, 40, 3)
    return affine


def centred(affine: np.ndarray, shape: tuple[int, ...], centre: tuple[float, float, float]) -> np.ndarray:
    """The affine, moved so that the middle of the grid lies at the centre in mm."""
    moved = affine.copy()
    moved[:3, 3] = np.array(centre) - affine[:3, :3] @ ((np.array(shape) - 1) / 2)
    return moved


def ball(affine: np.ndarray, shape: tuple[int, ...], centre: tuple[float, float, float], radius: float) -> np.ndarray:
    points = apply_affine(affine, np.moveaxis(np.indices(shape), 0, -1))
    inside: np.ndarray = np.linalg.norm(points - centre, axis=-1) <= radius
    return inside.astype(np.uint8)


def numbers(scores: Scores | None) -> np.ndarray:
    """The scores as floats, nan for None."""
    return np.array(scores, dtype=float)


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10_000), st.sets(st.integers(0, 5), max_size=4), st.sets(st.integers(0, 5), max_size=4))
def test_dice_is_monais(seed: int, not_in_truth: set[int], not_predicted: set[int]) -> None:
    """Every class equals MONAI's `compute_dice(ignore_empty=True)`, absent ones included."""
    truth = blobs(seed, 6, (12, 10, 8), tuple(not_in_truth))
    prediction = blobs(seed + 1, 6, (12, 10, 8), tuple(not_predicted))
    reference = compute_dice(channels(prediction, 6), channels(truth, 6), include_background=True, ignore_empty=True)
    scores = dice(torch.from_numpy(prediction), torch.from_numpy(truth), 6)
    assert scores.dtype == np.float64
    np.testing.assert_allclose(scores, reference[0].numpy(), rtol=1e-6)


def test_dice_with_the_most_classes() -> None:
    """256 classes in uint8 do not overflow."""
    truth = torch.arange(256, dtype=torch.uint8).repeat(8).reshape(8, 16, 16)
    np.testing.assert_array_equal(dice(truth, truth, 256), np.ones(256))
    prediction = truth.clone()
    prediction[truth == 255] = 254
    scores = dice(prediction, truth, 256)
    assert scores[254] == pytest.approx(2 / 3)
    assert scores[255] == 0


@pytest.mark.parametrize("seed", range(4))
def test_original_grid_is_nibabels(seed: int) -> None:
    """Between oblique, anisotropic, permuted and flipped grids, labels equal `resample_from_to(order=0)`."""
    permutations = [(0, 1, 2), (2, 0, 1), (1, 0, 2), (0, 2, 1)]
    canonical = centred(oblique(seed, (1.5, 1.5, 2.0), permutations[seed]), SHAPE, (5, 3, -2))
    original = centred(oblique(seed + 50, SPACING, permutations[-seed]), (40, 33, 17), (2, 4, 1))
    labels = blobs(seed, 6)
    resampled = to_original_grid(torch.from_numpy(labels), canonical, (40, 33, 17), original)

    image = nib.Nifti1Image(labels, canonical)
    faces = resample_from_to(image, ((40, 33, 17), original), order=0, mode="grid-constant")
    np.testing.assert_array_equal(resampled, np.asarray(faces.dataobj))
    assert resampled.dtype == np.uint8

    indices = apply_affine(np.linalg.inv(canonical) @ original, np.moveaxis(np.indices((40, 33, 17)), 0, -1))
    between_centres = ((indices >= 0) & (indices <= np.array(SHAPE) - 1)).all(-1)
    centres = resample_from_to(image, ((40, 33, 17), original), order=0)
    np.testing.assert_array_equal(resampled[between_centres], np.asarray(centres.dataobj)[between_centres])
    assert between_centres.mean() > 0.3

    nearest = np.rint(indices).astype(int)
    inside = ((nearest >= 0) & (nearest < SHAPE)).all(-1)
    expected = np.zeros((40, 33, 17), np.uint8)
    expected[inside] = labels[tuple(nearest[inside].T)]
    np.testing.assert_array_equal(resampled, expected)


def test_last_slice_beyond_the_last_canonical_centre_keeps_its_label() -> None:
    """An original slice 0.4 canonical voxels beyond the last centre is inside that voxel; 0.6 beyond is background."""
    canonical = np.diag([1.0, 1.0, 2.0, 1.0])
    labels = np.ones((4, 4, 5), np.uint8)  # centres at 0..8 mm
    for last, label in ((8.8, 1), (9.2, 0)):
        original = np.diag([1.0, 1.0, last, 1.0])
        np.testing.assert_array_equal(to_original_grid(labels, canonical, (4, 4, 2), original)[..., 1], label)


def test_reoriented_grid_gives_back_every_label() -> None:
    """Labels that only changed their orientation return exactly, to the border."""
    original = oblique(3, SPACING, (2, 0, 1))
    labels = blobs(3, 6)
    canonical = nib.as_closest_canonical(nib.Nifti1Image(labels, original))
    assert canonical.shape != SHAPE
    stored = np.ascontiguousarray(canonical.dataobj)
    np.testing.assert_array_equal(to_original_grid(stored, canonical.affine, SHAPE, original), labels)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("tolerance", [1.0, 2.5])
def test_surface_scores_are_monais_on_the_whole_grid(seed: int, tolerance: float) -> None:
    """HD95 and surface Dice in the cropped boxes equal MONAI's on the uncropped volume, organs at the border too."""
    truth, prediction = blobs(seed, 5), blobs(seed, 5)
    prediction = np.where(blobs(seed + 9, 3) == 1, blobs(seed + 5, 5), prediction).astype(np.uint8)
    assert set(np.unique(truth[0])) - {0}
    found_hd95, found_dice = surface_scores(prediction, truth, 5, SPACING, tolerance)
    one, two = channels(prediction, 5), channels(truth, 5)
    hd95 = compute_hausdorff_distance(one, two, percentile=95, spacing=SPACING)[0].numpy()
    np.testing.assert_allclose(found_hd95, hd95, rtol=1e-5)
    surface_dice = compute_surface_dice(one, two, [tolerance] * 4, spacing=SPACING)[0].numpy()
    np.testing.assert_allclose(found_dice, surface_dice, rtol=1e-6)
    assert (found_dice > 0).all()
    assert (found_dice < 1).all()


def test_surfaces_of_stray_voxels_are_monais_in_any_order_of_memory() -> None:
    """Single voxels in corners and organs one voxel thick, as C and as NIfTI lays them out."""
    truth, prediction = blobs(1, 4), blobs(1, 4)
    truth[:, :, 0] = 0
    truth[:, 5, 3] = 2
    prediction[0, 0, 0], prediction[-1, 0, -1], prediction[15, -1, 0] = 1, 2, 3
    scores = surface_scores(prediction, truth, 4, SPACING, 2.0)
    hd95 = compute_hausdorff_distance(channels(prediction, 4), channels(truth, 4), percentile=95, spacing=SPACING)
    np.testing.assert_allclose(scores[0], hd95[0].numpy(), rtol=1e-6)
    other = surface_scores(prediction, np.asfortranarray(truth), 4, SPACING, 2.0)
    np.testing.assert_array_equal(other, scores)


@pytest.mark.parametrize("axis", range(3))
def test_distances_are_in_millimetres_along_each_axis(axis: int) -> None:
    """A plate moved by 3 voxels is 3 spacings away: HD95 says so, and surface Dice flips at that tolerance."""
    truth = np.zeros(SHAPE, np.uint8)
    prediction = truth.copy()
    truth.swapaxes(0, axis)[4] = 1
    prediction.swapaxes(0, axis)[7] = 1
    distance = 3 * SPACING[axis]
    below = surface_scores(prediction, truth, 2, SPACING, distance - 0.01)
    above = surface_scores(prediction, truth, 2, SPACING, distance + 0.01)
    assert below[0] == pytest.approx([distance])
    assert [*below[1], *above[1]] == [0, 1]


def test_absent_and_missed_organs() -> None:
    """An organ outside the truth never counts; a missed one has the worst value of each metric."""
    truth = np.zeros((10, 20, 30), np.uint8)
    prediction = truth.copy()
    truth[2:5, 2:5, 2:5] = 1  # organ 1 missed
    prediction[6:9, 6:9, 6:9] = 2  # organ 2 invented
    truth[1:4, 10:15, 10:15] = prediction[1:4, 10:15, 10:15] = 3
    scores = evaluate(
        "case",
        torch.from_numpy(prediction),
        torch.from_numpy(truth),
        np.diag([1, 2, 2, 1]),
        truth,
        np.diag([1, 2, 2, 1]),
        classes=5,
        tolerance=2.0,
    )
    assert scores.dice[1:] == scores.original_dice == (0, None, 1, None)
    diagonal = np.sqrt(10**2 + 40**2 + 60**2)
    np.testing.assert_allclose(numbers(scores.original_hd95), [diagonal, np.nan, 0, np.nan])
    assert scores.original_surface_dice == (0, None, 1, None)
    means = aggregate([scores], ["a", "b", "c", "d"])
    assert means["dice_foreground"] == means["original_dice_foreground"] == means["original_surface_dice"] == 0.5
    assert means["original_hd95/c"] == 0
    assert not any(name.endswith(("/b", "/d")) for name in means)


def test_truth_scores_perfectly_through_a_reoriented_grid() -> None:
    """Where the canonical grid holds the same voxels in another order, the truth scores 1, 0 mm and 1."""
    original = oblique(8, SPACING, (1, 2, 0))
    truth = blobs(8, 4)
    canonical = nib.as_closest_canonical(nib.Nifti1Image(truth, original))
    labels = torch.from_numpy(np.ascontiguousarray(canonical.dataobj))
    scores = evaluate("case", labels, labels, canonical.affine, truth, original, classes=4, tolerance=1.0)
    assert scores.dice == (1,) * 4
    assert (scores.original_dice, scores.original_hd95, scores.original_surface_dice) == ((1,) * 3, (0,) * 3, (1,) * 3)


@pytest.mark.parametrize("seed", range(3))
def test_truth_scores_well_through_a_resampled_rotated_grid(seed: int) -> None:
    """A ball of 15 mm through a 1.5 x 1.5 x 2 mm grid: Dice above 0.94, HD95 at most one canonical diagonal (2.92 mm),
    surface Dice 1 at that tolerance; ten millimetres off in one affine, none of it holds. Missed altogether, HD95 is
    the diagonal of the original volume.
    """
    centre = (4.0, -7.0, 11.0)
    canonical = centred(oblique(seed, (1.5, 1.5, 2.0), (0, 1, 2)), (26, 26, 20), centre)
    original = centred(oblique(seed + 20, SPACING, (2, 0, 1)), (50, 38, 18), centre)
    labels = torch.from_numpy(ball(canonical, (26, 26, 20), centre, 15))
    truth = ball(original, (50, 38, 18), centre, 15)
    diagonal = float(np.linalg.norm(voxel_sizes(canonical)))
    scores = evaluate("ball", labels, labels, canonical, truth, original, classes=2, tolerance=diagonal)
    assert scores.dice == (1, 1)
    assert numbers(scores.original_dice)[0] > 0.94
    assert numbers(scores.original_hd95)[0] <= diagonal
    assert scores.original_surface_dice == (1,)

    missed = evaluate("ball", labels * 0, labels, canonical, truth, original, classes=2, tolerance=diagonal)
    rotated_spacing = np.linalg.norm(original[:3, :3], axis=0)
    assert numbers(missed.original_hd95)[0] == pytest.approx(np.linalg.norm(np.multiply(truth.shape, rotated_spacing)))

    canonical[0, 3] += 10
    moved = evaluate("ball", labels, labels, canonical, truth, original, classes=2, tolerance=diagonal)
    assert numbers(moved.original_dice)[0] < 0.8
    assert numbers(moved.original_hd95)[0] > diagonal
    assert numbers(moved.original_surface_dice)[0] < 1


def volumes() -> list[tuple[np.ndarray, np.ndarray]]:
    """Predictions and truths of several sizes, with absent and missed organs."""
    absent = [(), (1,), (2, 4), (1, 2, 3, 4, 5)]
    shapes = [SHAPE, (20, 24, 12), (16, 16, 16), (18, 14, 10)]
    truths = [blobs(i, 6, shape, gone) for i, (shape, gone) in enumerate(zip(shapes, absent, strict=True))]
    return [(np.where(shifted(truth, i + 1) == 5, 0, shifted(truth, i + 1)), truth) for i, truth in enumerate(truths)]


def canonical_cases() -> list[CaseScores]:
    return [
        evaluate_canonical(f"case {i}", torch.from_numpy(prediction), torch.from_numpy(truth), 6)
        for i, (prediction, truth) in enumerate(volumes())
    ]


ORGANS = ["spleen", "left kidney", "gall-bladder", "IVC", "Leber"]


@pytest.mark.parametrize(("name", "background"), [("dice_with_background", True), ("dice_foreground", False)])
def test_mean_dice_is_dice_metrics(name: str, background: bool) -> None:
    """Over volumes with absent organs, one of them without any, the mean equals `DiceMetric.aggregate()`."""
    metric = DiceMetric(include_background=background, reduction="mean", get_not_nans=False)
    for prediction, truth in volumes():
        metric(channels(prediction, 6), channels(truth, 6))
    assert aggregate(canonical_cases(), ORGANS)[name] == pytest.approx(metric.aggregate().item(), rel=1e-6)


def test_published_dice_is_the_mean_of_running_aggregates() -> None:
    """`published_dice` equals the tutorial's loop: aggregate after each volume, no reset, mean of what that gave."""
    metric = DiceMetric(include_background=True, reduction="mean", get_not_nans=False)
    running = []
    for prediction, truth in volumes():
        metric(channels(prediction, 6), channels(truth, 6))
        running.append(metric.aggregate().item())
    means = aggregate(canonical_cases(), ORGANS)
    assert means[PUBLISHED_DICE] == pytest.approx(np.mean(running), rel=1e-6)
    assert means[PUBLISHED_DICE] != pytest.approx(means["dice_with_background"], rel=1e-3)


def full_cases() -> list[CaseScores]:
    affine = np.diag([*SPACING, 1])
    return [
        evaluate(
            str(i), torch.from_numpy(prediction), torch.from_numpy(truth), affine, truth, affine, classes=6, tolerance=2
        )
        for i, (prediction, truth) in enumerate(volumes())
    ]


def test_order_of_the_volumes_does_not_matter() -> None:
    """Every metric but `published_dice`, which depends on the order by its definition, survives a permutation."""
    cases = full_cases()
    means = aggregate(cases, ORGANS)
    permuted = aggregate([cases[i] for i in (2, 0, 3, 1)], ORGANS)
    del means[PUBLISHED_DICE], permuted[PUBLISHED_DICE]
    assert permuted == pytest.approx(means)


def test_metrics_have_their_names_and_are_finite() -> None:
    """All names are there and valid for MLflow; an organ's mean is over the volumes that have it, the overall mean over
    volumes of their means.
    """
    cases = full_cases()
    means = aggregate(cases, ORGANS)
    fields = ("original_dice", "original_hd95", "original_surface_dice")
    names = {"dice_with_background", "published_dice", "dice_foreground", "original_dice_foreground"}
    names |= {"original_hd95", "original_surface_dice"}
    assert set(means) == names | {f"{field}/{organ}" for field in fields for organ in ORGANS}
    assert np.isfinite(list(means.values())).all()
    for name in means:
        _validate_metric_name(name)
    for field, overall in zip(
        fields, ("original_dice_foreground", "original_hd95", "original_surface_dice"), strict=True
    ):
        table = [numbers(getattr(case, field)) for case in cases]
        of_volumes = [np.nanmean(row) for row in table if not np.isnan(row).all()]
        assert len(of_volumes) == 3
        assert means[overall] == pytest.approx(np.mean(of_volumes))
        spleens = [getattr(case, field)[0] for case in cases]
        assert means[f"{field}/spleen"] == pytest.approx(np.mean([value for value in spleens if value is not None]))


def test_nothing_measured_is_left_out() -> None:
    """Without original-grid scores, and without cases, no metric is nan: it is not there."""
    assert set(aggregate(canonical_cases(), ORGANS)) == {"dice_with_background", "published_dice", "dice_foreground"}
    assert set(aggregate([CaseScores("empty", (1.0, None, None))], ["a", "b"])) == {
        "dice_with_background",
        "published_dice",
    }
    assert aggregate([], ORGANS) == {}


def test_any_organ_name_becomes_a_metric_name_of_its_own() -> None:
    """Names that MLflow refuses, or that would collide or nest, are mapped to distinct valid ones."""
    organs = ["kidney (l)", "kidney [l]", "..", "a/b", "Nebenniere, rechts", "肝脏", "v. cava", "l:r"]
    keys = organ_keys(organs)
    assert len(set(keys)) == len(organs)
    for key in keys:
        assert not re.search("[/:.]", key)
        _validate_metric_name(f"original_dice/{key}")
    assert organ_keys(ORGANS) == ORGANS


def test_scores_survive_json() -> None:
    """Standard JSON (no NaN) gives back the same value, absent organs and unmeasured grids included."""
    for case in (full_cases()[1], canonical_cases()[2]):
        again = CaseScores(**json.loads(json.dumps(asdict(case), allow_nan=False)))
        assert aggregate([again], ORGANS) == aggregate([case], ORGANS)
        assert json.dumps(asdict(again)) == json.dumps(asdict(case))
