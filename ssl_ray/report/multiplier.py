"""How many times as many labels the same score takes without pretraining: "pretraining is worth m times the labels"."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ssl_ray.report.statistics import Array, estimate

_STEPS = 200
"""Candidates over the whole range, evenly in log m."""


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
    """What pretraining is worth at `size` labelled volumes; None where more labels did not help the random arm.

    The point is the smallest m at which random reaches the pretrained mean; the interval are all m whose difference
    may be 0 (Fieller's way), `estimate` over runs and patients.

    Args:
        pretrained: score (runs, patients) at `size`.
        random: score (sizes, runs, patients), the same runs and patients.
        sizes: labelled volumes of the grid, ascending.
        size: one of them.
    """
    levels = random.mean((-2, -1))
    if len(sizes) < 2 or levels[-1] <= levels[0]:
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
