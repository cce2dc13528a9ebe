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

from ssl_ray.config.schema import Preparation
from ssl_ray.data.resample import canonical_grid
from ssl_ray.evaluate.metrics import confusion, dice, evaluate, evaluate_canonical, to_original_grid
from ssl_ray.evaluate.scores import PUBLISHED_DICE, CaseScores, Scores, aggregate, organ_keys, sided
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


def grid(spacing: tuple[float, ...]) -> np.ndarray:
    """The affine of a grid along the axes of RAS+."""
    return np.diag([*spacing, 1.0])


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
    scores = dice(confusion(torch.from_numpy(prediction), torch.from_numpy(truth), 6))
    assert scores.dtype == np.float64
    np.testing.assert_allclose(scores, reference[0].numpy(), rtol=1e-6)


def test_dice_with_the_most_classes() -> None:
    """256 classes in uint8 do not overflow."""
    truth = torch.arange(256, dtype=torch.uint8).repeat(8).reshape(8, 16, 16)
    np.testing.assert_array_equal(dice(confusion(truth, truth, 256)), np.ones(256))
    prediction = truth.clone()
    prediction[truth == 255] = 254
    scores = dice(confusion(prediction, truth, 256))
    assert scores[254] == pytest.approx(2 / 3)
    assert scores[255] == 0


@pytest.mark.parametrize("seed", range(4))
def test_original_grid_is_nibabels(seed: int) -> None:
    """Between oblique, anisotropic, permuted and flipped grids, labels equal `resample_from_to(order=0)`."""
    permutations = [(0, 1, 2), (2, 0, 1), (1, 0, 2), (0, 2, 1)]
    canonical = centred(oblique(seed, (1.5, 1.5, 2.0), permutations[seed]), SHAPE, (5, 3, -2))
    original = centred(oblique(seed + 50, SPACING, permutations[-seed]), (40, 33, 17), (2, 4, 1))
    labels = blobs(seed, 6)
    resampled = to_original_grid(labels, canonical, (40, 33, 17), original)

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


@pytest.mark.parametrize("seed", range(4))
def test_in_the_middle_between_two_voxels_no_rounding_decides(seed: int) -> None:
    """With twice the spacing, every second voxel of an oblique scan lies there: the upper one wins, on any machine.

    The last one has none above it, and takes its own.
    """
    original = oblique(seed, SPACING, (2, 0, 1))
    canonical = original @ np.diag([2.0, 2, 2, 1])
    labels = blobs(seed, 6)
    shape = tuple(2 * side for side in SHAPE)
    noise = 1e-11 * np.random.default_rng(seed).normal(size=(4, 4)) * [[1], [1], [1], [0]]
    found = to_original_grid(labels, canonical, shape, original)
    np.testing.assert_array_equal(found, to_original_grid(labels, canonical + noise, shape, original))
    upper = np.minimum((np.indices(shape) + 1) // 2, np.array(SHAPE)[:, None, None, None] - 1)
    np.testing.assert_array_equal(found, labels[tuple(upper)])


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from([0.7, 1.0, 1.25, 1.5, 2.5, 3.0, 5.0]),
    st.sampled_from([1.0, 1.4, 1.5, 2.0, 2.5, 4.0]),
    st.integers(2, 80),
    st.integers(0, 100),
)
def test_no_slice_of_a_file_is_lost(there: float, here: float, slices: int, seed: int) -> None:
    """Canonical grids of all ones give ones to the last voxel, whatever number of voxels MONAI rounds to.

    Spacings are in mm, and in headers in float32; of 12 slices 5 mm apart, the last one lies half a voxel beyond the
    last centre of a grid of 2 mm.
    """
    straight = np.diag([-1.0, 1.1, there, 1]).astype(np.float32).astype(float)
    for affine in (straight, oblique(seed, (1.0, 1.1, there), (0, 1, 2))):
        canonical = canonical_grid((9, 7, slices), affine, Preparation(spacing=(1, 2.2, here), hu_window=(0, 1)))
        back = to_original_grid(np.ones(canonical.shape, np.uint8), canonical.affine, (9, 7, slices), affine)
        np.testing.assert_array_equal(back, 1)


def test_reoriented_grid_gives_back_every_label() -> None:
    """Labels that only changed their orientation return exactly, to the border."""
    original = oblique(3, SPACING, (2, 0, 1))
    labels = blobs(3, 6)
    canonical = nib.as_closest_canonical(nib.Nifti1Image(labels, original))
    assert canonical.shape != SHAPE
    stored = np.ascontiguousarray(canonical.dataobj)
    np.testing.assert_array_equal(to_original_grid(stored, canonical.affine, SHAPE, original), labels)


def monais_surface_scores(
    prediction: np.ndarray, truth: np.ndarray, classes: int, spacing: tuple[float, ...], tolerance: float
) -> tuple[np.ndarray, np.ndarray]:
    """HD95 between border voxels and area-weighted surface Dice, organ by organ."""
    both = channels(prediction, classes), channels(truth, classes)
    hd95 = compute_hausdorff_distance(*both, percentile=95, spacing=spacing)[0]
    tolerances = [tolerance] * (classes - 1)
    return hd95.numpy(), compute_surface_dice(*both, tolerances, spacing=spacing, use_subvoxels=True)[0].numpy()


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("tolerance", [0.5, 1.0, 2.5, 9.0])
@pytest.mark.parametrize(
    ("shape", "spacing"),
    [(SHAPE, SPACING), ((31, 22, 9), (0.8, 0.8, 5.0)), ((8, 25, 30), (6.0, 0.5, 0.7)), ((20, 18, 22), (1.0, 1.0, 1.0))],
)
def test_surface_scores_are_monais(
    seed: int, tolerance: float, shape: tuple[int, int, int], spacing: tuple[float, float, float]
) -> None:
    """On anisotropic grids, with organs at the border, for surfaces some neighbours and some organs apart."""
    truth, prediction = blobs(seed, 5, shape), blobs(seed, 5, shape)
    prediction = np.where(blobs(seed + 9, 3, shape) == 1, shifted(blobs(seed + 5, 5, shape), 1), prediction)
    assert set(np.unique(truth[0])) - {0}
    found = surface_scores(prediction.astype(np.uint8), truth, 5, grid(spacing), tolerance)
    for ours, monais in zip(found, monais_surface_scores(prediction, truth, 5, spacing, tolerance), strict=True):
        np.testing.assert_allclose(ours, monais, rtol=1e-5)
    assert (found[1] > 0).all()
    assert (found[1] < 1).any() or tolerance == 9


def test_surfaces_of_stray_voxels_are_monais_in_any_order_of_memory() -> None:
    """Single voxels in corners and organs one voxel thick, as C and as NIfTI lays them out."""
    truth, prediction = blobs(1, 4), blobs(1, 4)
    truth[:, :, 0] = 0
    truth[:, 5, 3] = 2
    prediction[0, 0, 0], prediction[-1, 0, -1], prediction[15, -1, 0] = 1, 2, 3
    scores = surface_scores(prediction, truth, 4, grid(SPACING), 2.0)
    np.testing.assert_allclose(scores, monais_surface_scores(prediction, truth, 4, SPACING, 2.0), rtol=1e-5)
    other = surface_scores(prediction, np.asfortranarray(truth), 4, grid(SPACING), 2.0)
    np.testing.assert_array_equal(other, scores)


def test_a_slice_too_many_is_one_face_of_a_cube_however_thick_slices_are() -> None:
    """Five of six faces are right: 0.84 by area at 0.8 x 0.8 x 5 mm, where counting border voxels gives 0.65."""
    truth = np.zeros((60, 60, 14), np.uint8)
    truth[5:55, 5:55, 3:11] = 1
    prediction = truth.copy()
    prediction[5:55, 5:55, 11] = 1
    spacing = (0.8, 0.8, 5.0)
    assert surface_scores(prediction, truth, 2, grid(spacing), 2.0)[1] == pytest.approx(5 / 6, abs=0.01)
    both = channels(prediction, 2), channels(truth, 2)
    assert compute_surface_dice(*both, [2.0], spacing=spacing).item() == pytest.approx(0.65, abs=0.01)


@pytest.mark.parametrize("axis", range(3))
def test_distances_are_in_millimetres_along_each_axis(axis: int) -> None:
    """A plate moved by 3 voxels: HD95 is 3 spacings, of surface Dice the near faces are 2 apart, the far ones 3."""
    truth = np.zeros(SHAPE, np.uint8)
    prediction = truth.copy()
    truth.swapaxes(0, axis)[4] = 1
    prediction.swapaxes(0, axis)[7] = 1
    for spacings, share in ((1.99, 0), (2.01, 0.5), (2.99, 0.5), (3.01, 1)):
        hd95, surface_dice = surface_scores(prediction, truth, 2, grid(SPACING), spacings * SPACING[axis])
        assert hd95 == pytest.approx([3 * SPACING[axis]])
        assert surface_dice == pytest.approx([share])


@pytest.mark.parametrize("degrees", [-25, 25])
def test_distances_are_those_in_space_where_a_gantry_was_tilted(degrees: float) -> None:
    """Of two single voxels, HD95 is the length of what leads from one to the other, whichever way the slices slide."""
    tilt = np.deg2rad(degrees)
    affine = oblique(1, (1.0, 1.0, 1.0), (0, 1, 2))
    affine[:3, 2] = affine[:3, :3] @ [0, 5 * np.sin(tilt), 5 * np.cos(tilt)]
    truth = np.zeros((10, 40, 12), np.uint8)
    prediction = truth.copy()
    truth[4, 8, 3] = prediction[4, 28, 7] = 1
    apart = float(np.linalg.norm(affine[:3, :3] @ [0, 20, 4]))
    for tolerance in (apart - 0.1, apart + 0.1):
        hd95, surface_dice = surface_scores(prediction, truth, 2, affine, tolerance)
        assert hd95 == pytest.approx([apart])
        assert (surface_dice == 1) == (tolerance > apart)


def test_absent_missed_and_invented_organs() -> None:
    """A missed organ is 0 in every Dice and counts as missed, without a distance; an invented one counts as such."""
    truth = np.zeros((10, 20, 30), np.uint8)
    prediction = truth.copy()
    truth[2:5, 2:5, 2:5] = 1  # organ 1 missed
    prediction[6:9, 6:9, 6:9] = 2  # organ 2 invented
    truth[1:4, 10:15, 10:15] = prediction[1:4, 10:15, 10:15] = 3
    affine = np.diag([1, 2, 2, 1])
    labels = torch.from_numpy(prediction), torch.from_numpy(truth)
    scores = evaluate("case", *labels, affine, truth, affine, classes=5, tolerance=2.0, subject="p1")
    assert scores.subject == "p1"
    assert scores.dice[1:] == scores.original_dice == scores.original_surface_dice == (0, None, 1, None)
    assert scores.original_hd95 == (None, None, 0, None)
    assert scores.missed == [True, None, False, None]
    assert scores.false_positives == [None, True, None, False]
    means = aggregate([scores], ["a", "b", "c", "d"])
    assert means["dice_foreground"] == means["original_dice_foreground"] == means["original_surface_dice"] == 0.5
    assert means["original_hd95"] == means["original_hd95/c"] == 0
    assert (means["original_miss_rate"], means["original_miss_rate/a"], means["original_miss_rate/c"]) == (0.5, 1, 0)
    assert means["original_false_positives"] == means["original_false_positives/b"] == 1
    assert means["original_false_positives/d"] == 0
    assert {name for name in means if name.endswith(("/b", "/d"))} == {f"original_false_positives/{c}" for c in "bd"}


def test_a_missed_organ_moves_the_miss_rate_and_not_hd95() -> None:
    """Over three volumes: the distances of the found organs alone, and one of four organs missed."""
    cases = [
        CaseScores("a", (1, 1, 1), (0.9, 0.8), (2.0, 4.0), (1, 1), false_positives=(None, None)),
        CaseScores("b", (1, 0, 1), (0.0, 0.7), (None, 6.0), (0, 1), false_positives=(None, None)),
        CaseScores("c", (1, None, None), (None, None), (None, None), (None, None), false_positives=(True, True)),
    ]
    means = aggregate(cases, ["spleen", "liver"])
    assert (means["original_hd95"], means["original_hd95/spleen"], means["original_hd95/liver"]) == (4.5, 2, 5)
    assert means["original_miss_rate"] == 0.25
    assert (means["original_miss_rate/spleen"], means["original_miss_rate/liver"]) == (0.5, 0)
    assert means["original_false_positives"] == pytest.approx(2 / 3)
    assert means["original_false_positives/spleen"] == 1


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
    surface Dice 1 at that tolerance; ten millimetres off in one affine, none of it holds.
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
    """All names are there and valid for MLflow, but no distance of "Leber", which was always missed. An organ's mean is
    over the volumes that have it, the overall mean over volumes of their means.
    """
    cases = full_cases()
    means = aggregate(cases, ORGANS)
    fields = ("original_dice", "original_hd95", "original_surface_dice")
    names = {"dice_with_background", "published_dice", "dice_foreground", "original_dice_foreground"}
    names |= {"original_hd95", "original_surface_dice", "original_miss_rate", "original_false_positives"}
    by_organ = {*fields, "dice", "original_miss_rate", "original_false_positives"}
    names |= {f"{name}/{organ}" for name in by_organ for organ in ORGANS} - {"original_hd95/Leber"}
    assert set(means) == names
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
    names = {"dice_with_background", "published_dice", "dice_foreground", *(f"dice/{organ}" for organ in ORGANS)}
    means, canonical = aggregate(canonical_cases(), ORGANS), np.array([numbers(one.dice) for one in canonical_cases()])
    assert set(means) == names
    assert [means[f"dice/{organ}"] for organ in ORGANS] == pytest.approx(np.nanmean(canonical[:, 1:], axis=0))
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


def test_organs_of_one_side_are_known_by_their_names() -> None:
    """Whole words, their short forms and Latin ones; not what only holds such letters."""
    one_side = ["kidney_left", "Left lung", "LeftKidney", "Parotid L", "kidney_L", "lung-r", "Rt lung", "A. dex"]
    assert sided([*one_side, "liver", "clefts", "portal vein", "sinus"]) == one_side
    foreign = "ren sinister;pulmo dextra;niere_links;linke Niere;rein gauche;rein droit;rene destro;riñon izquierdo"
    assert sided([*foreign.split(";"), "Rechteck", "Gelenk", "adroit"]) == foreign.split(";")
    assert not sided(["os pubis", "Niere re", "kidney dx", "li"]), "without a partner"
    assert not sided(["L1", "vertebrae_L1", "vertebrae_L5", "rib_l4", "lung", "lad"]), "lumbar, and no other side"


@pytest.mark.parametrize(
    "pair",
    [
        *("rkid lkid", "rad lad", "LungL LungR", "RAG LAG", "RKidney lkidney", "LV RV", "LLL RLL", "rib_l4 rib_r4"),
        *("OD OS", "niere_li niere_re", "kidney-dx kidney-sx", "dx_rene sx_rene"),
    ],
)
def test_organs_of_one_side_are_known_by_the_other_one(pair: str) -> None:
    """As BTCV abbreviates them: their names differ in the letter of the side, whichever it is of the name."""
    btcv = ["spl", "gall", "eso", "liv", "sto", "aor", "ivc", "veins", "pan", "colon", "rectum", "L1", "L2"]
    assert sided([*btcv, *pair.split()]) == pair.split()


def test_scores_survive_json() -> None:
    """Standard JSON (no NaN) gives back the same value, absent organs and unmeasured grids included."""
    for case in (full_cases()[1], canonical_cases()[2]):
        again = CaseScores(**json.loads(json.dumps(asdict(case), allow_nan=False)))
        assert aggregate([again], ORGANS) == aggregate([case], ORGANS)
        assert json.dumps(asdict(again)) == json.dumps(asdict(case))
