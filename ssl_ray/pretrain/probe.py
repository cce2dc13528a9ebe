"""Whether the encoder learns what a segmentation needs, in the course of its pretraining: a linear probe of its tokens.

The loss alone does not say. The probe selects nothing, and no weight depends on it.
"""

import math
import time
from dataclasses import replace

import numpy as np
import numpy.typing as npt
import torch
from einops import rearrange
from torch import Tensor, distributed, nn

from ssl_ray.data.patch import open_array, read_patch
from ssl_ray.data.store import Store, Volume
from ssl_ray.networks.protocol import Encoder
from ssl_ray.pretrain.job import Job
from ssl_ray.pretrain.learner import scale
from ssl_ray.pretrain.samples import Sample
from ssl_ray.random import generator
from ssl_ray.training.parallel import gathered
from ssl_ray.training.precision import autocast

_PATCHES = 4
"""Of a labelled volume, each around a labelled voxel."""
_MOST_TIME = 0.03
"""Share of a training's time that the probe may take; a validation at which it would take more goes without."""
_PENALTIES = 10.0 ** np.arange(-6, 2.5, 0.5)
"""Candidates of the ridge, in multiples of the tokens' mean variance."""
_PLACE = 4  # random numbers of one seed for different purposes must not overlap; 1 to 3 are those of the samples


class Probe:
    """Ridge regression from frozen tokens to the organs' shares of their voxels, and the rank of these tokens.

    The patches are the same every time and as they were scanned; where there are several workers, each takes its part.
    """

    def __init__(self, job: Job, encoder: Encoder, model: nn.Module, device: torch.device, dtype: torch.dtype) -> None:
        """`model` is what is trained around the `encoder`; it may be sharded. Reads the labels of all patches."""
        assert job.labelled
        self._began, self._last = time.monotonic(), 0.0
        side, store, settings = job.training.table.patch_size, job.training.store, job.recipe.settings
        volumes = (*job.labelled.fitted, *job.labelled.tested)
        self._feed = replace(job.training, keys=tuple(one.key for one in volumes), ids=tuple(one.id for one in volumes))
        self._samples: list[Sample] = []
        shares = []
        for number in range(_PATCHES * len(volumes)):
            volume = volumes[number // _PATCHES]
            sample = Sample(number // _PATCHES, _origin(store, volume, side, number))
            label = read_patch(open_array(store, volume.key, "label"), sample.origin, side)
            self._samples.append(sample)
            shares.append(organ_shares(label, encoder.token, job.labelled.classes))
        self._shares = torch.from_numpy(np.stack(shares)).to(device)  # (patches, tokens, organs)
        self._fitted = _PATCHES * len(job.labelled.fitted)
        self._patches_at_once = settings.microbatch or settings.batch_size
        self._model, self._device, self._dtype = model, device, dtype
        self._tokens = gathered(model, lambda patches: encoder.encode(encoder.embed(patches)))
        self._spent = time.monotonic() - self._began

    @property
    def due(self) -> bool:
        """Whether there is time for it, by this rank's clock; all ranks must do what one of them says."""
        return self._spent + self._last <= _MOST_TIME * (time.monotonic() - self._began)

    @torch.no_grad()
    def measure(self, rank: int, world: int) -> dict[str, float]:
        """`probe_r2`, where an organ is in both parts, and `probe_rank`; all ranks must ask.

        R² is the mean over organs, on volumes that the regression has not seen: 1 for a perfect one, 0 for one that is
        no better than the mean share.
        """
        began = time.monotonic()
        self._model.eval()
        parts = range(self._fitted), range(self._fitted, len(self._samples))
        products = torch.stack([self._products(part, rank, world) for part in parts])
        self._model.train()
        if world > 1:
            distributed.all_reduce(products)
        organs = self._shares.shape[2]
        r2 = ridge_r2(products[0], products[1], organs)
        found = {"probe_rank": effective_rank(products.sum(0)[1:-organs, 1:-organs])}
        self._last = time.monotonic() - began
        self._spent += self._last
        return found if math.isnan(r2) else found | {"probe_r2": r2}

    def _products(self, part: range, rank: int, world: int) -> Tensor:
        """Sum over this rank's tokens of v vᵀ, v = (1, token, shares): all that the regression needs of them."""
        mine, size, total = part[rank::world], max(1, self._patches_at_once // world), torch.zeros(())
        for start in range(0, -(-len(part) // world), size):
            # A rank without patches left repeats the first with no weight, as with `shard` the others wait for it.
            numbers = list(mine[start : start + size]) or [part[0]]
            stored = torch.from_numpy(self._feed.read([self._samples[number] for number in numbers]))
            patches = scale(stored.to(self._device), self._feed.levels)
            # Compiled parts are for the shapes of a training step.
            with autocast(self._device, self._dtype), torch.compiler.set_stance("force_eager"):
                tokens = self._tokens(patches)  # (patches, tokens, hidden)
            rows = torch.cat([torch.ones_like(tokens[..., :1]), tokens, self._shares[numbers]], dim=2)
            rows = rows.flatten(0, 1).double()
            total = total.to(rows) + rows.T @ rows * (start < len(mine))
        return total


def organ_shares(label: npt.NDArray[np.uint8], token: tuple[int, int, int], classes: int) -> npt.NDArray[np.float32]:
    """Labels (X, Y, Z) -> (tokens, classes - 1): the share of a token's voxels that each organ has."""
    x, y, z = token
    voxels = rearrange(label, "(x p) (y q) (z r) -> (x y z) (p q r)", p=x, q=y, r=z)
    return np.stack([(voxels == organ).mean(1, dtype=np.float32) for organ in range(1, classes)], 1)


def ridge_r2(fitted: Tensor, tested: Tensor, organs: int) -> float:
    """R² of a ridge regression, fitted on some tokens and tested on others; mean over the organs that both have.

    Each part is the sum over its tokens of v vᵀ, v = (1, token, shares of the organs), float64. The penalty is that
    with the least generalised cross-validation error (Golub, Heath and Wahba, 1979) on the fitted tokens, over all
    organs; nan where no organ varies in both parts.
    """
    count, mean = fitted[0, 0], fitted[0, 1:] / fitted[0, 0]
    spread = fitted[1:, 1:] / count - torch.outer(mean, mean)
    own = spread.diagonal()[-organs:]
    truth = tested.diagonal()[-organs:] - tested[0, -organs:] ** 2 / tested[0, 0]  # squares about the mean
    known = (own > 1e-12) & (truth > 1e-12)
    if not known.any():
        return math.nan
    values, vectors = torch.linalg.eigh(spread[:-organs, :-organs])
    values = values.clamp(min=0)
    along = vectors.T @ spread[:-organs, -organs:]  # (hidden, organs)
    penalties = torch.from_numpy(_PENALTIES).to(values)[:, None] * (values.mean() + 1e-9)
    shrunk = values + penalties  # (penalties, hidden)
    error = own - ((shrunk + penalties) / shrunk**2) @ along**2  # mean squares, (penalties, organs)
    left = (1 - (1 + (values / shrunk).sum(1)) / count).clamp(min=1e-6)  # share of the degrees of freedom
    best = (error / own)[:, known].sum(1).div(left**2).argmin()
    weights = vectors @ (along / shrunk[best][:, None])
    offset = mean[-organs:] - mean[:-organs] @ weights
    residual = torch.cat([-offset[None], -weights, torch.eye(organs).to(weights)])
    wrong = (residual * (tested @ residual)).sum(0)
    return float((1 - wrong / truth)[known].mean())


def effective_rank(products: Tensor) -> float:
    """RankMe of tokens with this sum of x xᵀ (hidden, hidden): at most their width, 1 where all lie on a line.

    The exponential of the entropy of the normalised singular values (Garrido et al., ICML 2023, equation 1).
    """
    singular = torch.linalg.eigvalsh(products).clamp(min=0).sqrt()
    share = singular / singular.sum() + 1e-7
    return float((-share * share.log()).sum().exp())


def _origin(store: Store, volume: Volume, side: tuple[int, int, int], index: int) -> tuple[int, int, int]:
    """Of a patch around a labelled voxel that is drawn, or around any where there is none."""
    random, found = generator(0, _PLACE, index), open_array(store, volume.key, "foreground")
    chosen = found[random.integers(len(found))] if len(found) else random.integers(math.prod(volume.shape))
    room = np.maximum(np.array(volume.shape) - side, 0)
    x, y, z = np.clip(np.unravel_index(chosen, volume.shape) - np.array(side) // 2, 0, room)
    return int(x), int(y), int(z)
