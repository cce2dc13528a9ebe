"""What an MRI shows of a body that was drawn in HU: two weightings, a bias field, noise, and no unit.

Contrasts are only like those of MRI: tissues are told apart by their HU, so that contrast medium shows as more water.
"""

from typing import Any

import numpy as np
import numpy.typing as npt
from scipy.ndimage import gaussian_filter

Array = npt.NDArray[Any]

_HU = (-1000, -850, -103, 0, 40, 110, 210, 420)
"""Air, lung, fat, water, muscle, enhanced blood, marrow, bone."""
CONTRASTS = {"t1": (0, 0.06, 1, 0.2, 0.45, 0.6, 0.5, 0.1), "t2": (0, 0.05, 0.7, 1, 0.3, 0.5, 0.35, 0.05)}
"""By weighting, the signal of each of them."""


def weighted(hu: Array, rng: np.random.Generator) -> list[Array]:
    """The images of a body (X, Y, Z) in HU, int16: of a scale that is anyone's guess, with Rician noise."""
    from monai.transforms import RandBiasField  # takes seconds to import, and CT does without

    made = []
    for signals in CONTRASTS.values():
        field = RandBiasField(prob=1, coeff_range=(-0.25, 0.25)).set_random_state(int(rng.integers(2**31)))
        clean = gaussian_filter(np.interp(hu, _HU, signals), rng.uniform(0.3, 0.6))
        shaded = np.asarray(field(clean[None].astype(np.float32)))[0]
        noise = rng.uniform(0.01, 0.03) * rng.standard_normal((2, *hu.shape), np.float32)
        scale = np.exp(rng.uniform(np.log(200), np.log(5000)))
        made.append(np.round(scale * np.hypot(shaded + noise[0], noise[1])).clip(0, 32767).astype(np.int16))
    return made
