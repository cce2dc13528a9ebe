"""As MONAI's `NormalizeIntensity`, by mean and standard deviation of the body or of all voxels."""

import numpy as np
import numpy.typing as npt

from ssl_ray.data.normalisations.body import measured
from ssl_ray.data.normalisations.registry import Intensities, Storage
from ssl_ray.data.normalisations.zscore.settings import ZScore


def storage(settings: ZScore) -> Storage:
    """16 bits from one end of the clipped range to the other; an even number of levels, so that 0 is one of them."""
    return Storage("uint16", 65534, (-settings.clip, settings.clip))


def measure(voxels: npt.NDArray[np.float32], settings: ZScore) -> Intensities:
    """`clip` standard deviations below and above the mean become the two ends."""
    values, floor = measured(voxels, settings.over)
    mean, reach = float(values.mean(dtype=np.float64)), settings.clip * float(values.std(dtype=np.float64))
    return Intensities(mean - reach, mean + reach, floor)
