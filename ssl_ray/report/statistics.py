"""Statistics of two trainings that were scored on the same volumes."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import stats

_RESAMPLES = 9999
_ALPHA = 0.05


@dataclass(frozen=True)
class Difference:
    """Pretrained minus random over the same volumes, from `difference`."""

    values: NDArray[np.float64]
    """The difference of every volume, as mean over seeds."""
    low: float
    high: float
    """95 % interval of the mean over volumes; nan for fewer than two volumes."""
    p: float
    """Two-sided sign-flip permutation test of no difference but by chance; 1 for fewer than two volumes."""
    by_seed: NDArray[np.float64]
    """The difference of every seed that both arms have, as mean over volumes."""

    @property
    def mean(self) -> float:
        """Mean over volumes."""
        return float(self.values.mean())

    @property
    def excludes_zero(self) -> bool:
        """Whether the interval lies on one side of 0."""
        return self.low > 0 or self.high < 0

    @property
    def seeds_agree(self) -> bool:
        """Whether every seed has the sign of the mean."""
        return bool(np.all(np.sign(self.by_seed) == np.sign(self.mean)))

    @property
    def clear(self) -> bool:
        """The interval excludes 0, the test agrees, and so does every seed.

        A bootstrap over few volumes gives intervals that are too short: with two volumes that both gain, the
        interval always excludes 0. The exact test cannot reach 5 % with fewer than six volumes. Neither sees how much
        another seed would change the training.
        """
        return self.excludes_zero and self.p < _ALPHA and self.seeds_agree


def interval(values: NDArray[np.float64]) -> tuple[float, float]:
    """95 % percentile bootstrap interval of the mean (`scipy.stats.bootstrap`), nan for fewer than two values."""
    if len(values) < 2:
        return float("nan"), float("nan")
    if np.allclose(values, values[0], rtol=0, atol=1e-12):
        return float(values.mean()), float(values.mean())
    found = stats.bootstrap(
        (values,), np.mean, n_resamples=_RESAMPLES, confidence_level=1 - _ALPHA, method="percentile", random_state=0
    ).confidence_interval
    return float(found.low), float(found.high)


def difference(values: NDArray[np.float64], by_seed: NDArray[np.float64]) -> Difference:
    """Interval and test for paired differences, one a volume; the same values give the same answer."""
    p = 1.0
    if len(values) > 1:
        # "samples" with one sample means that signs are flipped; up to 13 volumes scipy tries all flips and p is exact.
        flips = {"permutation_type": "samples", "n_resamples": _RESAMPLES, "random_state": 0}
        p = float(stats.permutation_test((values,), np.mean, **flips).pvalue)
    return Difference(values, *interval(values), p, by_seed)
