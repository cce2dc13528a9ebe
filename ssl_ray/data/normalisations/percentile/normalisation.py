"""As MONAI's `ScaleIntensityRangePercentiles` to 0..1, clipped, of the body or of all voxels."""

import numpy as np
import numpy.typing as npt

from ssl_ray.data.normalisations.body import measured
from ssl_ray.data.normalisations.percentile.settings import Percentile
from ssl_ray.data.normalisations.registry import Intensities, Storage


def storage(settings: Percentile) -> Storage:
    """16 bits: MRI has 12 or more."""
    return Storage("uint16", 65535)


def measure(voxels: npt.NDArray[np.float32], settings: Percentile) -> Intensities:
    """The percentiles become 0 and 1."""
    values, floor = measured(voxels, settings.over)
    low, high = np.percentile(values, settings.percentiles).tolist()
    return Intensities(low, high, floor)
