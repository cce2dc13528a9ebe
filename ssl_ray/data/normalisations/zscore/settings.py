"""`normalise: zscore`."""

from typing import Literal

from pydantic import Field

from ssl_ray.config.common import Section, Storage


class ZScore(Section):
    """The mean becomes 0, the standard deviation 1; values more than 8 deviations from the mean are clipped."""

    kind: Literal["zscore"] = "zscore"
    over: Literal["body", "all"] = Field("body", description="voxels that are counted; body: all but air")

    @property
    def storage(self) -> Storage:
        """Steps of 1/4000 of a deviation."""
        return Storage("int16", 4000, (-8, 8))
