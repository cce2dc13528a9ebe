"""Random numbers that are addressed, not drawn in turn."""

import numpy as np


def generator(seed: int, stream: int, index: int) -> np.random.Generator:
    """The generator of place `index` in a stream of a seed; the streams of one seed do not overlap.

    Counter-based (Salmon et al., SC 2011): any index costs the same, none depends on another.
    """
    return np.random.Generator(np.random.Philox(key=[seed, stream], counter=[0, 0, 0, index]))
