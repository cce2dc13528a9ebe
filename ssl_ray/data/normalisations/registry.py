"""The kinds of normalisation by name. The module of each has the two functions below, for settings of its own."""

from dataclasses import dataclass
from importlib import import_module
from typing import Any, Literal

import numpy.typing as npt
from numpy import float32

from ssl_ray.config.schema import Normalise
from ssl_ray.errors import UserError

_KINDS = {
    "window": "ssl_ray.data.normalisations.window.normalisation",
    "percentile": "ssl_ray.data.normalisations.percentile.normalisation",
    "zscore": "ssl_ray.data.normalisations.zscore.normalisation",
}


@dataclass(frozen=True)
class Storage:
    """Intensities are stored as 0 to `levels`, which the network sees as `seen[0]` to `seen[1]`, linearly."""

    dtype: Literal["uint8", "uint16"]
    levels: int
    seen: tuple[float, float] = (0.0, 1.0)


@dataclass(frozen=True)
class Intensities:
    """Of one channel of a scan, in its own unit: what is stored as 0 and as `levels`, and what the body lies above."""

    low: float
    high: float
    floor: float


def storage(settings: Normalise) -> Storage:
    """What is stored, the same of all volumes."""
    stored: Storage = _module(settings).storage(settings)
    return stored


def measure(voxels: npt.NDArray[float32], settings: Normalise) -> Intensities:
    """What one channel (X, Y, Z) of a scan is normalised by; a UserError if it is none of the kind by its values."""
    found: Intensities = _module(settings).measure(voxels, settings)
    if not found.low < found.high:
        raise UserError(f"no scan to normalise: {found.low:g} would be both its lowest and its highest value")
    return found


def _module(settings: Normalise) -> Any:
    return import_module(_KINDS[settings.kind])
