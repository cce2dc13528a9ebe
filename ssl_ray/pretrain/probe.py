"""Whether the encoder learns what a segmentation needs, in the course of its pretraining: a linear probe of its tokens.

The loss alone does not say. The probe selects nothing, and no weight depends on it.
"""

import math
import time
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, distributed
from torch.nn import functional

from ssl_ray.data.patch import crop_origin, open_array, read_patch
from ssl_ray.pretrain.job import Labelled
from ssl_ray.pretrain.learner import PretrainingLearner
from ssl_ray.pretrain.samples import Sample
from ssl_ray.random import generator
from ssl_ray.training.precision import autocast

_PATCHES = 4  # of a labelled volume, each around a labelled voxel
_MOST_TIME = 0.03
"""Share of a training's time that the probe may take; a validation at which it would take more goes without."""
_PENALTIES = 10.0 ** np.arange(-6, 2.5, 0.5)  # candidates, in multiples of the tokens' mean variance
_PLACES = 4  # random numbers of one seed for different purposes must not overlap; 1 to 3 are those of the samples


class Probe:
    """Ridge regression from frozen tokens to the organs' shares of their voxels, and the rank of these tokens.

    The patches are the same every time, as they were scanned, and each rank takes its share of them.
    """

    def __init__(self, learner: PretrainingLearner, labelled: Labelled) -> None:
        """Read the labels of all patches."""
        self._began, self._last = time.monotonic(), 0.0
        self._learner, feed, volumes = learner, learner.job.training, (*labelled.fitted, *labelled.tested)
        self._feed = replace(feed, keys=tuple(one.key for one in volumes))
        self._samples: list[Sample] = []
        random, shares = generator(0, _PLACES, 0), []
        for number, volume in enumerate(volumes):
            label, found = (open_array(feed.store, volume.key, name) for name in ("label", "foreground"))
            for chosen in random.choice(found if len(found) else label.size, _PATCHES):
                centre = [int(place) for place in np.unravel_index(chosen, label.shape)]
                self._samples.append(Sample(number, crop_origin(centre, label.shape, feed.table.patch_size)))
                patch = read_patch(label, self._samples[-1].origin, feed.table.patch_size)
                shares.append(organ_shares(patch, learner.task.encoder.token, labelled.classes))
        self._shares = torch.stack(shares).to(learner.device)  # (patches, tokens, organs)
        self._fitted = _PATCHES * len(labelled.fitted)
        self._spent = time.monotonic() - self._began

    @property
    def due(self) -> bool:
        """Whether there is time for it, by this rank's clock; all ranks must do what one of them says."""
        return self._spent + self._last <= _MOST_TIME * (time.monotonic() - self._began)

    @torch.no_grad()
    def measure(self) -> dict[str, float]:
        """`probe_r2`, where any organ varies, and `probe_rank`; all ranks must ask.

        R² is on volumes that the regression has not seen: 1 if it is perfect, 0 if it is no better than the mean share.
        """
        began = time.monotonic()
        halves = self._fitted // 2  # of patches, and so of patients
        parts = slice(halves), slice(halves, self._fitted), slice(self._fitted, None)
        products = torch.stack([self._products(self._samples[part], self._shares[part]) for part in parts])
        if self._learner.world > 1:
            distributed.all_reduce(products)
        organs = self._shares.shape[2]
        r2, rank = ridge_r2(products, organs), effective_rank(products.sum(0)[1:-organs, 1:-organs])
        self._last = time.monotonic() - began
        self._spent += self._last
        return {"probe_rank": rank} | ({} if math.isnan(r2) else {"probe_r2": r2})

    def _products(self, samples: Sequence[Sample], shares: Tensor) -> Tensor:
        """Sum over this rank's tokens of v vᵀ, v = (1, token, shares): all that the regression needs of them."""
        learner, total = self._learner, torch.zeros((), dtype=torch.float64, device=self._learner.device)
        for indices, counted, patches in learner.read(self._feed, samples):
            # Other shapes than in training: compiling for them would cost more than it saves.
            with autocast(learner.device, learner.dtype), torch.compiler.set_stance("force_eager"):
                tokens = learner.task.tokens(patches)
            rows = torch.cat([torch.ones_like(tokens[..., :1]), tokens, shares[indices]], dim=2).flatten(0, 1).double()
            total = total + rows.T @ rows * (counted > 0)
        return total


def organ_shares(label: npt.NDArray[np.uint8], token: int, classes: int) -> Tensor:
    """Labels (X, Y, Z) -> (tokens, classes - 1): the share of a token's voxels that each organ has."""
    organs = torch.from_numpy(label) == torch.arange(1, classes)[:, None, None, None]  # (organs, X, Y, Z)
    return functional.avg_pool3d(organs.float(), token).flatten(1).T


def ridge_r2(parts: Tensor, organs: int) -> float:
    """R² on the last part of a ridge regression fitted on the two before, with the penalty that is best between these.

    Each part is the sum over its tokens of v vᵀ, v = (1, token, shares of the organs): (3, width, width) float64. An
    organ counts in units of its spread in the first two. Nan where none varies there, or none in the last.
    """
    first, second, tested = parts
    spread, truth = (_centred(part).diagonal()[-organs:] for part in (first + second, tested))
    units = torch.where(spread > 1e-9, 1 / spread, 0.0)
    between = ridge_errors(first, second, organs) + ridge_errors(second, first, organs)
    wrong = ridge_errors(first + second, tested, organs)[(between * units).sum(1).argmin()]
    whole = float((truth * units).sum())
    return 1 - float((wrong * units).sum()) / whole if whole > 1e-9 else math.nan


def ridge_errors(fitted: Tensor, tested: Tensor, organs: int) -> Tensor:
    """Sums of squares (penalties, organs) that ridge regressions fitted on one part leave on another."""
    mean, spread = fitted[0, 1:] / fitted[0, 0], _centred(fitted) / fitted[0, 0]
    values, vectors = torch.linalg.eigh(spread[:-organs, :-organs])
    penalties = torch.from_numpy(_PENALTIES).to(values)[:, None] * (values.mean() + 1e-9)
    along = vectors.T @ spread[:-organs, -organs:]  # (hidden, organs)
    weights = vectors @ (along / (values.clamp(min=0) + penalties)[..., None])  # (penalties, hidden, organs)
    offset = mean[-organs:] - mean[:-organs] @ weights
    own = torch.eye(organs).to(weights).expand(len(weights), -1, -1)
    residual = torch.cat([-offset[:, None], -weights, own], dim=1)
    return (residual * (tested @ residual)).sum(1)


def _centred(products: Tensor) -> Tensor:
    """The same sums about the mean, without the first row and column."""
    return products[1:, 1:] - torch.outer(products[0, 1:], products[0, 1:]) / products[0, 0]


def effective_rank(products: Tensor) -> float:
    """RankMe of tokens with this sum of x xᵀ (hidden, hidden): at most their width, 1 where all lie on a line.

    The exponential of the entropy of the normalised singular values (Garrido et al., ICML 2023, equation 1).
    """
    singular = torch.linalg.eigvalsh(products).clamp(min=0).sqrt()
    share = singular / singular.sum() + 1e-7
    return float((-share * share.log()).sum().exp())
