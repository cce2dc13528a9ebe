"""(seed, i) -> sample; step -> samples of a rank.

A pretraining run is one long table of samples, known before it starts: sample *i* is a pure function of `(seed, i)`.
Nothing is shuffled in a buffer, so a run that resumes at step *s* sees exactly what it would have seen, and the order
does not depend on the number of workers.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import numpy.typing as npt

from ssl_ray.random import generator

_ORDER, _ORIGIN, _VALIDATION = 1, 2, 3  # random numbers of one seed for different purposes must not overlap


@dataclass(frozen=True)
class Sample:
    """One patch: which volume (index into the cohort), and its origin in voxels of the padded volume."""

    volume: int
    origin: tuple[int, int, int]


@dataclass(frozen=True)
class SampleTable:
    """All samples of a run.

    Epoch *e* is the samples `[e * V * n, (e + 1) * V * n)` for V volumes and n patches a volume: every volume once, in
    an order of that epoch, its n patches next to each other so that one opened volume serves them. Step *s* trains on
    the samples `[s * B, (s + 1) * B)` for a global batch of B; rank r of W takes the r-th of W parts of them, which are
    equal or, where W does not divide B, differ by one.
    """

    seed: int
    shapes: npt.NDArray[np.int64]  # (V, 3) voxels
    patch_size: tuple[int, int, int]
    patches_per_volume: int
    batch_size: int
    epochs: int
    limit: int | None = None  # steps; None: those of the epochs

    @property
    def epoch_samples(self) -> int:
        """Samples of one epoch, V * n."""
        return len(self.shapes) * self.patches_per_volume

    @property
    def steps(self) -> int:
        """Optimizer steps of the whole run; of epochs, a remainder smaller than a batch is left out. At least 1."""
        return self.limit or max(1, self.epochs * self.epoch_samples // self.batch_size)

    def epoch(self, step: int) -> float:
        """Epochs that are complete after `step` steps."""
        return step * self.batch_size / self.epoch_samples

    def boundaries(self, every: int) -> list[int]:
        """Steps after which a multiple of `every` epochs is complete, and the last step of the run."""
        last = range(every, self.steps * self.batch_size // self.epoch_samples + 1, every)
        steps = {-(-epoch * self.epoch_samples // self.batch_size) for epoch in last}
        return sorted(steps | {self.steps})

    def sample(self, index: int) -> Sample:
        """Which patch number `index` of the run is."""
        epoch, place = divmod(index, self.epoch_samples)
        volume = int(_order(self.seed, epoch, len(self.shapes))[place // self.patches_per_volume])
        return Sample(volume, self._origin(volume, self.seed, _ORIGIN, index))

    def validation(self) -> Iterator[Sample]:
        """Fixed patches, n of every volume: the same at every validation, and in every run whatever its seed."""
        for index in range(self.epoch_samples):
            volume = index // self.patches_per_volume
            yield Sample(volume, self._origin(volume, 0, _VALIDATION, index))

    def rank_samples(self, step: int, rank: int, world: int) -> range:
        """Indices of the samples that a rank trains on in a step."""
        share, more = divmod(self.batch_size, world)
        start = step * self.batch_size + rank * share + min(rank, more)
        return range(start, start + share + (rank < more))

    def _origin(self, volume: int, seed: int, purpose: int, index: int) -> tuple[int, int, int]:
        room = np.maximum(self.shapes[volume] - self.patch_size, 0) + 1
        x, y, z = generator(seed, purpose, index).integers(0, room)
        return int(x), int(y), int(z)


@lru_cache(maxsize=4)
def _order(seed: int, epoch: int, volumes: int) -> npt.NDArray[np.int64]:
    return generator(seed, _ORDER, epoch).permutation(volumes)
