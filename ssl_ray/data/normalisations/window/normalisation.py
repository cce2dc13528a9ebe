"""As MONAI's `ScaleIntensityRange` to 0..1, clipped, once the scan is seen to be a CT in HU."""

import numpy as np
import numpy.typing as npt

from ssl_ray.data.normalisations.intensities import Intensities, sampled
from ssl_ray.data.normalisations.window.settings import Window
from ssl_ray.errors import UserError

_LEAST_INSIDE, _LEAST_RANGE, _MOST_DENSE, _LEAST_LIGHT = 0.005, 0.03, 0.05, 0.01
"""What tells a CT in HU from other volumes, as shares: of the voxels, those inside the HU window; of the window, what
99 % of the voxels span; of the voxels, those above 700 HU (dense bone, metal) and those at -900 to -30 (lung, fat). 54
real CT of head, neck and torso and 6 synthetic ones, cropped to the body or not, have at least 0.060 and 1 in the
windows -57..164 and -175..250, at most 0.030, and at least 0.012. With 1024 added: at least 0.085, at most 0.0001.
"""
_MOST_LOW, _MANY_ZEROS = -30, 0.2
"""HU that the lowest thousandth of a CT does not exceed, as more than that is lung, fat or air; MR with a few voxels
slightly below 0 does. And the share of voxels that are 0 only where a background was set to it.
"""


def measure(voxels: npt.NDArray[np.float32], settings: Window) -> Intensities:
    """The ends of the HU window become 0 and 1; what lies above the lower one is body.

    Refused is what its values show to be no CT in HU: it would be stored as a volume without contrast, or at an edge.
    """
    (low, high), sample = settings.hu_window, sampled(voxels)
    inside = float(((sample > low) & (sample < high)).mean())
    span = float(np.ptp(np.percentile(np.clip(sample, low, high), (0.5, 99.5)))) / (high - low)
    light, dense = float(((sample > -900) & (sample < -30)).mean()), float((sample > 700).mean())
    if inside < _LEAST_INSIDE:
        cause = "is it HU with another offset or unit, or no CT?"
    elif span < _LEAST_RANGE:
        cause = "was it scaled, to 0..1 or by mean and deviation?"
    elif low < 0 and dense > _MOST_DENSE and light < _LEAST_LIGHT:
        cause = f"{dense:.0%} lie above 700 HU and {light:.0%} where fat and lung do: is it HU + 1024?"
    elif low < 0 and np.percentile(sample, 0.1) > _MOST_LOW:
        cause = "hardly a value is below -30 HU: is it a label map, MR, a picture of 8 bits or a CT scaled to one?"
        if (sample == 0).mean() > _MANY_ZEROS:
            cause += " Or was the background of a CT set to 0? Set it to -1000"
    else:
        return Intensities(low, high, low)
    least, most = float(voxels.min()), float(voxels.max())
    if least == most:
        cause = "there is nothing in it"
    raise UserError(
        f"not a CT in HU: the values are {least:g} to {most:g}, {inside:.1%} of them inside the window {low:g} to "
        f"{high:g}; {cause}"
    )
