"""`normalise: zscore`."""

from typing import Literal

from pydantic import Field, PositiveFloat

from ssl_ray.config.common import Section


class ZScore(Section):
    """The mean of the channel's own voxels becomes 0, their standard deviation 1."""

    kind: Literal["zscore"] = "zscore"
    over: Literal["body", "all"] = Field("body", description="voxels that are counted; body: above Otsu's threshold")
    clip: PositiveFloat = Field(8.0, description="standard deviations; values further from the mean are clipped")
