"""What a matrix of paired differences, runs x patients, says: interval, p, verdict, runs it takes, worth in labels.

Both are samples: another training run and another patient would have given other numbers. So the model is a two-way
layout without replication, both ways random: d[r, p] = delta + run r + patient p + rest (Scheffé, *The Analysis of
Variance*, 1959, chapter 7). `tests/report/test_statistics.py` holds how often its interval covers the truth.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import stats

ALPHA = 0.05
POWER = 0.8
LEAST = 3
"""Runs, and patients: with two of either, 90 % of the intervals hold the truth, so that nothing is concluded."""
MOST_RUNS, MOST_PATIENTS = 50, 1000
"""Nobody trains more, or scores more, to settle one question."""
_ENDLESS = 10**9
_STEPS = 200
"""Numbers of labels that are tried for what pretraining is worth, evenly in log."""

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Estimate:
    """Mean of the differences with its 95 % interval. Each is a number, or an array (...) over many matrices at once.

    All but the mean are nan where there is no interval: fewer than two runs or patients, or no spread at all.
    """

    mean: Any
    low: Any
    high: Any
    p: Any
    """Two-sided, of no difference."""


def mean_squares(differences: Array) -> tuple[Any, Any, Any]:
    """Mean squares of (..., runs, patients), at least two of each: between runs, between patients, of the rest."""
    runs, patients = differences.shape[-2:]
    mean = differences.mean((-2, -1), keepdims=True)
    by_run = differences.mean(-1, keepdims=True) - mean
    by_patient = differences.mean(-2, keepdims=True) - mean
    rest = differences - mean - by_run - by_patient
    return (
        patients * (by_run**2).sum((-2, -1)) / (runs - 1),
        runs * (by_patient**2).sum((-2, -1)) / (patients - 1),
        (rest**2).sum((-2, -1)) / ((runs - 1) * (patients - 1)),
    )


def standard_error(squares: tuple[Any, Any, Any], runs: Any, patients: Any) -> tuple[Any, Any]:
    """Standard error of the mean and degrees of freedom of its t distribution; nan without any spread.

    The variance is a sum of mean squares, and never less than runs or patients alone would give. Satterthwaite's (1946)
    degrees of freedom are taken back towards those of runs or patients alone, whichever are fewer, by the share of
    theirs in the sum: it is too small too often just when few runs happen to agree. Without that 92.3 % are covered in
    the worst setting of the tests; and with the share of what they add to the rest, which is nothing where they agree,
    12 % of studies with three questions are falsely clear. This way it is 95 % and 6 %.
    """
    between, among, rest = squares
    total = between + among - rest
    most = np.maximum(np.maximum(between, among), total)
    most = np.where(most > 0, most, np.nan)
    own = between**2 / (runs - 1) + among**2 / (patients - 1) + rest**2 / ((runs - 1) * (patients - 1))
    freedom = np.where(between >= most, runs - 1.0, patients - 1.0)
    freedom = np.where(total >= most, most**2 / own, freedom)
    fewer, scarce = np.minimum(runs, patients) - 1, np.where(np.less_equal(runs, patients), between, among)
    share = scarce / most
    return np.sqrt(most / (runs * patients)), np.maximum(1 / (share / fewer + (1 - share) / freedom), 1)


def estimate(differences: Array) -> Estimate:
    """Mean over runs and patients of (..., runs, patients), with the interval that carries both."""
    runs, patients = differences.shape[-2:]
    mean = differences.mean((-2, -1))
    if min(runs, patients) < 2:
        return Estimate(mean, *[np.full_like(mean, np.nan)] * 3)
    error, freedom = standard_error(mean_squares(differences), runs, patients)
    error = np.where(np.ptp(differences, (-2, -1)) < 1e-12, np.nan, error)  # equal but for rounding
    reach = stats.t.ppf(1 - ALPHA / 2, freedom) * error
    return Estimate(mean, mean - reach, mean + reach, 2 * stats.t.sf(np.abs(mean) / error, freedom))


def holm(p: Array) -> Array:
    """Adjusted p of (..., questions) that are asked together (Holm, 1979)."""
    order, count = np.argsort(p, axis=-1), p.shape[-1]
    steps = np.take_along_axis(p, order, -1) * np.arange(count, 0, -1)
    adjusted = np.minimum(np.maximum.accumulate(steps, -1), 1)
    return np.take_along_axis(adjusted, np.argsort(order, -1), -1)


class Verdict(Enum):
    """What may be said of one difference."""

    NONE = "no verdict"
    NO_DIFFERENCE = "no difference beyond the margin"
    TOO_SMALL = "a real difference, too small to matter"
    GAIN = "a clear gain"
    LOSS = "a clear loss"
    UNCORRECTED = "not clear after correction"
    UNKNOWN = "not known"


def judge(found: Estimate, shape: tuple[int, int], adjusted: float, margin: float) -> Verdict:
    """The first verdict that fits an interval from so many runs and patients, with Holm's p; higher is better."""
    if math.isnan(found.low):
        return Verdict.NONE
    enough, agreed = min(shape) >= LEAST, adjusted < ALPHA
    excludes = found.low > 0 or found.high < 0
    if enough and -margin <= found.low and found.high <= margin:
        return Verdict.TOO_SMALL if excludes and agreed else Verdict.NO_DIFFERENCE
    if enough and agreed:
        return Verdict.GAIN if found.mean > 0 else Verdict.LOSS
    return Verdict.UNCORRECTED if enough and excludes else Verdict.UNKNOWN


def needed(differences: Array, margin: float, questions: int = 1) -> tuple[int | None, int | None]:
    """How many runs, or patients, would show a difference of the margin with 80 % power, the other staying as it is.

    It is as good a guess as the variances are that few runs tell, and holds for the first of so many `questions` that
    Holm's correction is made for, which has to pass the strictest.

    None: no number of them alone would do; `MOST_RUNS + 1` or `MOST_PATIENTS + 1`: more than that.
    """
    runs, patients = differences.shape
    between, among, rest = map(float, mean_squares(differences))
    by_run, by_patient = max(0.0, (between - rest) / patients), max(0.0, (among - rest) / runs)

    def shows(count: Any, scored: Any) -> Any:
        error, freedom = standard_error((rest + scored * by_run, rest + count * by_patient, rest), count, scored)
        return (stats.t.ppf(1 - ALPHA / questions / 2, freedom) + stats.t.ppf(POWER, freedom)) * error <= margin

    more = np.arange(max(runs + 1, LEAST), MOST_RUNS + 1), np.arange(patients + 1, MOST_PATIENTS + 1)
    enough = shows(more[0], patients), shows(runs, more[1])
    ever = patients >= LEAST and shows(_ENDLESS, patients), runs >= LEAST and shows(runs, _ENDLESS)
    most = MOST_RUNS + 1, MOST_PATIENTS + 1
    by_runs, by_patients = (
        int(min(counts[seen], default=over)) if possible else None
        for counts, seen, over, possible in zip(more, enough, most, ever, strict=True)
    )
    return by_runs, by_patients


@dataclass(frozen=True)
class Multiplier:
    """m with its 95 % interval, nan without one; what equals an edge may lie beyond it."""

    point: float
    low: float
    high: float
    edges: tuple[float, float]
    """The fewest and the most labelled volumes of the grid, in multiples of those that are asked about."""


def candidates(sizes: Sequence[int], size: int) -> Array:
    """Multiples m of `size` within what was measured, ascending; every measured size is one of them."""
    ends = np.log(np.array(sizes) / size)
    many: Array = np.exp(np.unique(np.concatenate([np.linspace(ends[0], ends[-1], _STEPS), ends])))
    return many


def beyond(pretrained: Array, random: Array, sizes: Sequence[int], volumes: Array) -> Array:
    """Pretrained (..., R, P) minus random (..., sizes, R, P) at other numbers of labels -> (..., volumes, R, P).

    Between two measured sizes, random is interpolated linearly in the logarithm of the size.
    """
    weights = [np.interp(np.log(volumes), np.log(sizes), one) for one in np.eye(len(sizes))]
    differences: Array = pretrained[..., None, :, :] - np.einsum("km,...krp->...mrp", weights, random)
    return differences


def multiplier(pretrained: Array, random: Array, sizes: Sequence[int], size: int) -> Multiplier | None:
    """What pretraining is worth at `size` labelled volumes; None where it is not known that more labels help random.

    The point is the smallest m at which random reaches the pretrained mean; the interval are all m whose difference
    may be 0 (Fieller's way), `estimate` over runs and patients.

    Args:
        pretrained: score (runs, patients) at `size`.
        random: score (sizes, runs, patients), the same runs and patients.
        sizes: labelled volumes of the grid, ascending.
        size: one of them.
    """
    rise = estimate(random[-1] - random[0])
    if rise.mean <= 0 or rise.low <= 0:  # where there is no interval, the mean has to do
        return None
    many = candidates(sizes, size)
    found = estimate(beyond(pretrained, random, sizes, many * size))
    edges = float(many[0]), float(many[-1])
    point = _first_zero(many, found.mean)
    if np.isnan(found.low).all():
        return Multiplier(point, np.nan, np.nan, edges)
    possible = [point, *many[(found.low <= 0) & (found.high >= 0)]]
    return Multiplier(point, float(min(possible)), float(max(possible)), edges)


def _first_zero(many: Array, means: Array) -> float:
    """Where the mean difference, linear in log m between candidates, first falls to 0; an edge if it does not."""
    if not (below := np.flatnonzero(means <= 0)).size:
        return float(many[-1])
    if (after := below[0]) == 0:
        return float(many[0])
    return float(np.exp(np.interp(0, means[[after, after - 1]], np.log(many)[[after, after - 1]])))
