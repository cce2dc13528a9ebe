"""`normalise: percentile`."""

from typing import Annotated, Literal

from pydantic import Field

from ssl_ray.config.common import Section, rule

_Percentiles = Annotated[
    tuple[float, float],
    rule(lambda ends: 0 <= ends[0] < ends[1] <= 100, "percentiles must ascend within 0 to 100"),
]


class Percentile(Section):
    """Two percentiles of the channel's own voxels become 0 and 1; values outside are clipped."""

    kind: Literal["percentile"] = "percentile"
    percentiles: _Percentiles = (0.5, 99.5)
    over: Literal["body", "all"] = Field("body", description="voxels that are counted; body: above Otsu's threshold")
