"""Random numbers that are addressed, not drawn in turn."""

import hashlib

import numpy as np
from numpy.typing import NDArray


def generator(seed: int, stream: int, index: int) -> np.random.Generator:
    """The generator of place `index` in a stream of a seed; the streams of one seed do not overlap.

    Counter-based (Salmon et al., SC 2011): any index costs the same, none depends on another.
    """
    return np.random.Generator(np.random.Philox(key=[seed, stream], counter=[0, 0, 0, index]))


def words_of(seed: int, indices: NDArray[np.int64], view: int, count: int) -> NDArray[np.uint64]:
    """`count` random words for one view of each of the samples (B,): (B, count), rows by (seed, index, view) alone."""
    words = np.empty((len(indices), count), np.uint64)
    for row, index in zip(words, indices, strict=True):
        row[:] = np.random.PCG64(np.random.SeedSequence(seed, spawn_key=(int(index), view))).random_raw(count)
    return words


def number(*address: object) -> int:
    """A number in 0..2⁶³-1 that depends on its address alone, e.g. `(seed, "draw", run, subject)`."""
    return int.from_bytes(hashlib.sha256(repr(address).encode()).digest()[:8]) >> 1


def run_seed(seed: int, stage: str, run: int) -> int:
    """The seed of a stage in run `run` of a study; in run 0 it is the study's own."""
    return number(seed, stage, run) if run else seed
