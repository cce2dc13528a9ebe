"""As MONAI's `ScaleIntensityRangePercentiles` to 0..1, clipped, of the body alone."""

import numpy as np
import numpy.typing as npt

from ssl_ray.data.normalisations.intensities import Intensities, of_body
from ssl_ray.data.normalisations.percentile.settings import Percentile


def measure(voxels: npt.NDArray[np.float32], settings: Percentile) -> Intensities:
    """The percentiles become 0 and 1."""
    body, floor = of_body(voxels)
    low, high = np.percentile(body, settings.percentiles).tolist()
    return Intensities(low, high, floor)
