"""`normalise: percentile`."""

from typing import Annotated, Literal

from ssl_ray.config.common import Section, Storage, rule


class Percentile(Section):
    """Two percentiles of the body (all but the air, by Otsu's threshold) become 0 and 1; values outside are clipped."""

    kind: Literal["percentile"] = "percentile"
    percentiles: Annotated[
        tuple[float, float], rule(lambda ends: 0 <= ends[0] < ends[1] <= 100, "they must ascend within 0 to 100")
    ] = (0.5, 99.5)

    @property
    def storage(self) -> Storage:
        """MRI has 12 bits or more."""
        return Storage("uint16", 65535)
