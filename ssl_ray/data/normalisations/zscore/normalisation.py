"""As MONAI's `NormalizeIntensity`."""

import numpy as np
import numpy.typing as npt

from ssl_ray.data.normalisations.intensities import Intensities, of_body
from ssl_ray.data.normalisations.zscore.settings import ZScore


def measure(voxels: npt.NDArray[np.float32], settings: ZScore) -> Intensities:
    """The mean becomes 0, what is a standard deviation above it 1."""
    values, floor = of_body(voxels)
    counted = values if settings.over == "body" else voxels
    mean, deviation = (float(statistic(counted, dtype=np.float64)) for statistic in (np.mean, np.std))
    return Intensities(mean, mean + deviation, floor)
