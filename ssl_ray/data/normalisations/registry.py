"""The kinds of normalisation, and what each measures of a scan."""

import numpy as np
import numpy.typing as npt

from ssl_ray.config.schema import Normalise
from ssl_ray.data.normalisations.intensities import Intensities
from ssl_ray.data.normalisations.percentile import normalisation as percentile
from ssl_ray.data.normalisations.window import normalisation as window
from ssl_ray.data.normalisations.zscore import normalisation as zscore
from ssl_ray.errors import UserError

_KINDS = {"window": window, "percentile": percentile, "zscore": zscore}


def measure(voxels: npt.NDArray[np.float32], settings: Normalise) -> Intensities:
    """What one channel (X, Y, Z) is normalised by; a UserError if by its values it is none of the kind."""
    found: Intensities = _KINDS[settings.kind].measure(voxels, settings)
    if not found.zero < found.one:
        raise UserError(f"no scan to normalise: {found.zero:g} would be both 0 and 1")
    return found
