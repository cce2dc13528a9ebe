"""The body in a scan without an absolute unit, and the values that its statistics are taken of."""

from typing import Literal

import numpy as np
import numpy.typing as npt

from ssl_ray.errors import UserError

_LEAST_VALUES, _LEAST_BODY = 32, 0.01
"""Distinct values that a scan has and a label map has not; and the share of the voxels that a body has at least."""
_BRIGHT = 1000
"""One voxel of so many may be brighter than any other: a few far brighter ones would be a class of their own."""


def measured(voxels: npt.NDArray[np.float32], over: Literal["body", "all"]) -> tuple[npt.NDArray[np.float32], float]:
    """Values of the body, or of all voxels, ascending, and the threshold that voxels of the body lie above.

    Sides of 128 voxels and more are sampled: every second voxel, or third from 256 on, and so on.

    Raises:
        UserError: for NaN or infinity, for a constant or a label map, and where next to nothing is above the threshold.
    """
    least, most = float(voxels.min()), float(voxels.max())
    if not np.isfinite([least, most]).all():
        raise UserError("no scan to normalise: there are NaN or infinite values in it")
    values = np.sort(voxels[tuple(slice(None, None, 1 + side // 128) for side in voxels.shape)], axis=None)
    if (distinct := 1 + int((np.diff(values) > 0).sum())) < _LEAST_VALUES:
        cause = "there is nothing in it" if distinct == 1 else "is it a label map or a mask?"
        raise UserError(f"no scan to normalise: {distinct} distinct values, {least:g} to {most:g}; {cause}")
    floor = otsu(values)
    body = values[np.searchsorted(values, floor, side="right") :]
    if (share := body.size / values.size) < _LEAST_BODY:
        raise UserError(
            f"no scan to normalise: the values are {least:g} to {most:g}, {share:.2%} of them above {floor:.4g}, where "
            f"the body would be, at least {_LEAST_BODY:.0%} expected; are a few voxels far brighter than all others?"
        )
    return (body if over == "body" else values), floor


def otsu(values: npt.NDArray[np.float32]) -> float:
    """Otsu's threshold (1979, doi:10.1109/TSMC.1979.4310076, eq. 18) of the square roots of ascending values.

    It is exact, without a histogram. Roots are taken above the least value: muscle, fat and a bias field spread the
    body over far more than what separates its dark tissue from the air, and without them that tissue would be air.
    """
    roots = np.sqrt(values.astype(np.float64) - float(values[0]))
    roots = np.minimum(roots, roots[-1 - len(roots) // _BRIGHT])
    below, sums = np.arange(1, len(roots)), roots.cumsum()
    above = len(roots) - below
    apart = sums[:-1] / below - (sums[-1] - sums[:-1]) / above  # means of the two classes
    split = int((below * above * apart**2).argmax())
    return float(values[split : split + 2].mean(dtype=np.float64))
