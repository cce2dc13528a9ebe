"""How often the report's statistics are right: whole studies, drawn by the thousand from truths that are known.

Differences scatter as they were seen to: between patients with a standard deviation of 0.04, from training run to
training run by 0 to 0.04, and by 0.03 for what neither explains; in `experiments/results/`, other ways, too (`SEEN`).
"""

import itertools
import math
import warnings

import numpy as np
import pytest
from scipy import stats

from ssl_ray.report.statistics import (
    ALPHA,
    MOST_PATIENTS,
    MOST_RUNS,
    Array,
    Estimate,
    Verdict,
    beyond,
    candidates,
    estimate,
    holm,
    judge,
    mean_squares,
    multiplier,
    needed,
    standard_error,
)

REPEATS = 10_000
PATIENT, REST = 0.04, 0.03
RUN_SPREADS = (0.0, 0.01, 0.02, 0.04)
SEEN = ((0.04, 0.03), (0.007, 0.055), (0.05, 0.08))
"""Standard deviations between patients, and of the rest."""
SHAPES = [*itertools.product((3, 5, 10), (6, 12, 40))]
MARGIN = 0.02


def drawn(
    random: np.random.Generator,
    runs: int,
    patients: int,
    run_spread: float,
    rest: float | Array = REST,
    patient: float = PATIENT,
) -> Array:
    """Differences without effect: (REPEATS, runs, patients)."""
    by_run = random.normal(0, run_spread, (REPEATS, runs, 1))
    by_patient = random.normal(0, patient, (REPEATS, 1, patients))
    return by_run + by_patient + random.normal(0, rest, (REPEATS, runs, patients))


def covers(found: Estimate, truth: float | Array = 0.0) -> float:
    """Share of the intervals that hold the truth."""
    return float(np.mean((found.low <= truth) & (truth <= found.high)))


@pytest.mark.parametrize(("runs", "patients"), [*SHAPES, (3, 3), (10, 3)])
def test_the_interval_holds_the_truth_as_often_as_it_says(runs: int, patients: int) -> None:
    """95 % is said: at least 94 % in every setting, so that without effect at most 6 % of all studies are clear."""
    random = np.random.default_rng([runs, patients])
    for run_spread, (patient, rest) in itertools.product(RUN_SPREADS, SEEN):
        found = estimate(drawn(random, runs, patients, run_spread, rest, patient))
        assert covers(found) >= 0.94, (run_spread, patient, rest)
        assert np.mean(found.p < ALPHA) <= 0.06, (run_spread, patient, rest)


def test_runs_that_are_not_normal_are_covered_less() -> None:
    """One in five is another, as in `experiments/real_ct.yaml`: three cannot know, and 80 % hold the truth."""
    random = np.random.default_rng(13)
    seen = np.array([-0.003, 0.0, 0.125, 0.036, -0.014])
    runs = random.choice(seen - seen.mean(), (REPEATS, 3, 1))
    assert 0.75 <= covers(estimate(runs + drawn(random, 3, 40, 0))) <= 0.85


@pytest.mark.parametrize(("runs", "patients"), [(2, 6), (2, 12), (2, 40), (10, 2)])
def test_two_runs_or_two_patients_are_too_few_to_conclude_from(runs: int, patients: int) -> None:
    """Their intervals hold the truth some 90 % of the time at worst: shown, but never a clear verdict."""
    random = np.random.default_rng([runs, patients])
    assert all(covers(estimate(drawn(random, runs, patients, spread))) >= 0.89 for spread in RUN_SPREADS)
    found = Estimate(0.3, 0.2, 0.4, 0.001)
    assert {judge(found, (runs, patients), adjusted, MARGIN) for adjusted in (0.001, 0.2)} == {Verdict.UNKNOWN}
    assert judge(Estimate(0.0, -0.01, 0.01, 0.9), (runs, patients), 0.9, MARGIN) is Verdict.UNKNOWN


@pytest.mark.parametrize(("runs", "patients"), [(3, 12), (3, 40), (10, 12)])
def test_one_pretraining_is_covered_as_that_pretraining(runs: int, patients: int) -> None:
    """What one pretraining is worth, more or less than another, is part of the truth; so the report names it."""
    random = np.random.default_rng([1, runs, patients])
    this_one = random.normal(0, 0.02, (REPEATS, 1, 1))
    for run_spread in RUN_SPREADS:
        differences = drawn(random, runs, patients, run_spread) + this_one
        assert covers(estimate(differences), this_one[:, 0, 0]) >= 0.93, run_spread


@pytest.mark.parametrize(("runs", "size"), [(3, 6), (3, 12), (5, 6), (10, 12)])
def test_draws_that_overlap_speak_for_their_pool(runs: int, size: int) -> None:
    """Runs share labelled volumes, up to half of them: the truth is the mean over all draws from this pool of 24.

    Of another pool it would say too much (seen: 82 to 96 % covered where draws are a quarter of the pool), so the
    report says which pool it is about.
    """
    random, pool, patients = np.random.default_rng([2, runs, size]), 24, 12
    for run_spread in RUN_SPREADS[1:]:
        volumes = random.normal(0, run_spread * math.sqrt(size), (REPEATS, 1, pool))
        order = np.argsort(random.random((REPEATS, runs, pool)), -1)[..., :size]
        by_draw = np.take_along_axis(np.broadcast_to(volumes, (REPEATS, runs, pool)), order, -1).mean(-1)
        differences = drawn(random, runs, patients, 0.01) + by_draw[..., None]
        assert covers(estimate(differences), volumes.mean((-2, -1))) >= 0.93, run_spread


@pytest.mark.parametrize(("patient", "rest"), SEEN)
def test_three_label_counts_are_one_study(patient: float, rest: float) -> None:
    """Without effect, Holm calls at most 5 % of the studies clear at any count on average, and 7 % in every setting."""
    random, false = np.random.default_rng(3), []
    for (runs, patients), run_spread in itertools.product([(3, 6), (3, 12), (5, 12), (3, 40)], RUN_SPREADS):
        # Patients that gain from pretraining at 6 labels tend to do so at 12: half of their variance is common.
        common = random.normal(0, patient * math.sqrt(0.5), (REPEATS, 1, patients))
        own = random.normal(0, patient * math.sqrt(0.5), (3, REPEATS, 1, patients))
        found = [estimate(common + own[k] + drawn(random, runs, patients, run_spread, rest, 0)) for k in range(3)]
        adjusted = holm(np.stack([one.p for one in found], -1))
        false.append(np.mean((adjusted < ALPHA).any(-1)))
        assert false[-1] <= 0.07, (runs, patients, run_spread)
    assert np.mean(false) <= 0.05


def test_a_failed_run_costs_a_run_and_no_more() -> None:
    """One run of four that the arms do not share is left out of both: three are left, and hold what they say."""
    random = np.random.default_rng(4)
    for patients, run_spread in itertools.product((6, 40), RUN_SPREADS):
        differences = drawn(random, 4, patients, run_spread)
        kept = np.argsort(random.random((REPEATS, 4)), -1)[:, :3]
        found = estimate(np.take_along_axis(differences, kept[..., None], 1))
        assert covers(found) >= 0.93, (patients, run_spread)
        assert np.mean(found.p < ALPHA) <= 0.07


@pytest.mark.parametrize("patients", [6, 12, 40])
def test_patients_with_two_volumes_count_once(patients: int) -> None:
    """Every second patient was scanned twice, so that his mean scatters less: not the same as one more patient."""
    random = np.random.default_rng([5, patients])
    rest = np.where(np.arange(patients) % 2, REST, REST / math.sqrt(2))
    for run_spread in RUN_SPREADS:
        found = estimate(drawn(random, 3, patients, run_spread, rest))
        assert covers(found) >= 0.93, run_spread
        assert np.mean(found.p < ALPHA) <= 0.07


def test_a_true_effect_is_covered_and_found() -> None:
    """A gain of 0.05 is found by three runs on 40 patients where runs scatter by 0.01, and never called a loss."""
    random = np.random.default_rng(6)
    found = estimate(drawn(random, 3, 40, 0.01) + 0.05)
    clear = (found.p < ALPHA) & (found.low > 0)
    assert np.mean(clear) >= 0.9
    assert not np.any(found.high < 0)
    assert covers(found, 0.05) >= 0.93


def test_what_would_settle_it_does() -> None:
    """With the runs that were asked for, a difference of the margin is seen about 80 % of the time."""
    random, spread = np.random.default_rng(7), 0.015
    levels = [np.linspace(-1, 1, count) for count in (3, 40)]
    # A study whose mean squares are the true variances, to the digit.
    exact = [level / level.std(ddof=1) for level in levels]
    noise = random.normal(0, 1, (3, 40))
    noise -= noise.mean(0) + noise.mean(1, keepdims=True) - noise.mean()
    noise *= REST / math.sqrt((noise**2).sum() / (2 * 39))
    by_run = math.sqrt(spread**2 + REST**2 / 40) * exact[0][:, None]
    by_patient = math.sqrt(PATIENT**2 + REST**2 / 3) * exact[1]
    more, scored = needed(by_run + by_patient + noise, 0.03)
    assert more is not None
    assert more < (needed(by_run + by_patient + noise, 0.03, questions=3)[0] or 0), "Holm asks more of each of three"
    for runs, seen in ((more, 0.78), (more - 1, 0.0)):
        power = np.mean(estimate(drawn(random, runs, 40, spread) + 0.03).p < ALPHA)
        assert seen <= power <= (1 if seen else 0.8)
    assert scored is None  # three runs alone scatter too much for any number of patients


def test_no_number_of_runs_makes_up_for_few_patients() -> None:
    """Six patients who differ by 0.04 do not show 0.02; three runs that agree exactly lack patients alone."""
    patients = np.array([-0.05, -0.03, -0.01, 0.01, 0.03, 0.06])
    more, scored = needed(np.stack([patients, patients + 0.001, patients - 0.001]), MARGIN)
    assert more is None
    assert scored is not None
    assert 6 < scored < MOST_PATIENTS
    runs = np.array([-0.2, 0.0, 0.2])
    assert needed(runs[:, None] + np.linspace(-0.001, 0.001, 8), MARGIN) == (MOST_RUNS + 1, None)


def test_numbers_agree_with_an_analysis_of_variance_by_hand() -> None:
    """Three runs, two patients, worked out on paper; many matrices at once give what each gives alone."""
    differences = np.array([[0.01, 0.05], [0.03, 0.05], [0.02, 0.08]])
    error, freedom = standard_error(mean_squares(differences), 3, 2)
    # means: runs 0.03, 0.04, 0.05; patients 0.02, 0.06; all 0.04. MS: runs 0.0002, patients 0.0024, rest 0.0002
    assert estimate(differences).mean == pytest.approx(0.04)
    assert error == pytest.approx(math.sqrt(0.0024 / 6))
    assert freedom == pytest.approx(0.0024**2 / (0.0002**2 / 2 + 0.0024**2 / 1 + 0.0002**2 / 2), abs=0.01)
    many = estimate(np.random.default_rng(8).normal(0, 1, (4, 5, 3, 6)))
    one = np.random.default_rng(8).normal(0, 1, (4, 5, 3, 6))[2, 1]
    error, freedom = standard_error(mean_squares(one), 3, 6)
    assert many.p[2, 1] == pytest.approx(estimate(one).p)
    assert many.p[2, 1] == pytest.approx(2 * stats.t.sf(abs(one.mean()) / error, freedom))


@pytest.mark.parametrize("shape", [(1, 8), (3, 1), (1, 1), (3, 8)])
def test_without_spread_there_is_no_interval(shape: tuple[int, int]) -> None:
    """One run, one patient, or differences that are all the same: a mean, and no verdict, and no warning."""
    differences = np.full(shape, 0.1) + (np.arange(8.0) if shape == (1, 8) else 0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = estimate(differences)
    assert math.isnan(found.low)
    assert math.isnan(found.p)
    assert judge(found, shape, math.nan, MARGIN) is Verdict.NONE


def test_holm_multiplies_and_never_falls() -> None:
    """The smallest p times the number of questions, the next times one less; none below the one before."""
    np.testing.assert_allclose(holm(np.array([0.04, 0.01, 0.03])), [0.06, 0.03, 0.06])
    np.testing.assert_allclose(holm(np.array([[0.9, 0.8], [0.02, 0.03]])), [[1, 1], [0.04, 0.04]])
    np.testing.assert_allclose(holm(np.array([0.03])), [0.03])


@pytest.mark.parametrize(
    ("low", "high", "adjusted", "verdict"),
    [
        (-0.01, 0.015, 0.6, Verdict.NO_DIFFERENCE),
        (0.005, 0.015, 0.01, Verdict.TOO_SMALL),
        (0.001, 0.015, 0.08, Verdict.NO_DIFFERENCE),
        (0.01, 0.05, 0.01, Verdict.GAIN),
        (-0.05, -0.01, 0.01, Verdict.LOSS),
        (0.001, 0.05, 0.09, Verdict.UNCORRECTED),
        (-0.01, 0.05, 0.3, Verdict.UNKNOWN),
    ],
)
def test_the_first_verdict_that_fits_is_said(low: float, high: float, adjusted: float, verdict: Verdict) -> None:
    """With three runs; `adjusted` is p after Holm."""
    assert judge(Estimate((low + high) / 2, low, high, adjusted), (3, 12), adjusted, MARGIN) is verdict


SIZES = (6, 12, 24)
LEVELS = np.array([0.50, 0.56, 0.62])


def scores(
    random: np.random.Generator, level: float, runs: int, patients: int, by_patient: Array, run_spread: float
) -> Array:
    """(REPEATS, runs, patients) of one arm at one number of labels; `by_patient` is what all arms share."""
    by_run = random.normal(0, run_spread, (REPEATS, runs, 1))
    return level + by_patient + by_run + random.normal(0, REST, (REPEATS, runs, patients))


@pytest.mark.parametrize("runs", [3, 5])
def test_the_multiplier_holds_the_truth(runs: int) -> None:
    """Pretrained at 6 labels is as good as random at 9: m = 1.5 is in at least 93 % of the intervals."""
    random, patients = np.random.default_rng([9, runs]), 12
    truth = float(np.interp(math.log(9), np.log(SIZES), LEVELS))
    for run_spread in RUN_SPREADS:
        common = random.normal(0, 0.1, (REPEATS, 1, patients))
        arms = [scores(random, level, runs, patients, common, run_spread) for level in (truth, *LEVELS)]
        pretrained, without = arms[0], np.stack(arms[1:], -4)
        without = np.moveaxis(without, 0, -3)
        assert covers(estimate(beyond(pretrained, without, SIZES, np.array([9.0]))[:, 0])) >= 0.93
        held = 0
        for one in range(200):
            found = multiplier(pretrained[one], without[one], SIZES, 6)
            held += found is None or found.low <= 1.5 <= found.high
        assert held >= 200 * 0.9


def test_the_multiplier_is_where_random_reaches_pretrained() -> None:
    """The point by interpolation in log n; one run has a point alone; the interval's ends stay within what was seen."""
    patients = np.linspace(-0.1, 0.1, 8)
    without = LEVELS[:, None, None] + patients + np.zeros((3, 1, 1))
    found = multiplier(0.53 + np.zeros((1, 1)) + patients, without, SIZES, 6)
    assert found is not None
    assert found.point == pytest.approx(math.sqrt(2), rel=1e-6)
    assert math.isnan(found.low)
    assert found.edges == pytest.approx((1, 4))
    assert {1.0, 2.0, 4.0} <= {round(float(m), 9) for m in candidates(SIZES, 6)}


@pytest.mark.parametrize(
    ("level", "size", "point", "ends"), [(0.9, 6, 4, (4, 4)), (0.2, 12, 0.5, (0.5, 0.5)), (0.9, 24, 1, (1, 1))]
)
def test_beyond_what_was_measured_the_multiplier_is_censored(
    level: float, size: int, point: float, ends: tuple[float, float]
) -> None:
    """Better than random with the most labels, or worse than with the fewest: an edge, and no end beyond it."""
    random = np.random.default_rng(10)
    without = LEVELS[:, None, None] + random.normal(0, 0.01, (3, 3, 8))
    found = multiplier(level + random.normal(0, 0.01, (3, 8)), without, SIZES, size)
    assert found is not None
    assert found.point == pytest.approx(point)
    assert (found.low, found.high) == pytest.approx(ends)


def test_labels_that_did_not_help_are_worth_nothing_countable() -> None:
    """Where random does not gain from more labels, and where there is one count, no multiple of them is defined."""
    random = np.random.default_rng(11)
    without = LEVELS[::-1, None, None] + random.normal(0, 0.01, (3, 3, 8))
    pretrained = 0.6 + random.normal(0, 0.01, (3, 8))
    assert multiplier(pretrained, without, SIZES, 6) is None
    assert multiplier(pretrained, without[:1], SIZES[:1], 6) is None
    unsure = LEVELS[:, None, None] + np.array([0, 0.2, -0.2])[:, None] * np.array([0, 0, 1])[:, None, None]
    assert multiplier(pretrained, unsure + np.linspace(0, 0.01, 8), SIZES, 6) is None, "its rise is not known"


@pytest.mark.parametrize(("runs", "patients", "folds"), [(3, 30, 5), (3, 12, 3), (5, 30, 5), (10, 30, 5)])
def test_in_folds_the_interval_holds_the_truth_as_well(runs: int, patients: int, folds: int) -> None:
    """Patients of a fold share a network, and each run deals them anew: that scatters the runs' means as a run does."""
    random = np.random.default_rng([12, runs, patients])
    shape = (REPEATS, runs, patients)
    dealt = np.argsort(np.argsort(random.random(shape), -1), -1) % folds
    for run_spread, fold_spread in itertools.product(RUN_SPREADS, (0.02, 0.04)):
        networks = random.normal(0, fold_spread, (REPEATS, runs, folds))
        found = estimate(drawn(random, runs, patients, run_spread) + np.take_along_axis(networks, dealt, -1))
        assert covers(found) >= 0.93, (run_spread, fold_spread)
        assert np.mean(found.p < ALPHA) <= 0.07, (run_spread, fold_spread)
