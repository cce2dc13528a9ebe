"""`normalise: {kind: window, hu_window: [-175, 250]}`, or `hu_window: [-175, 250]`."""

from typing import Annotated, Literal

from pydantic import Field

from ssl_ray.config.common import Section, rule

HuWindow = Annotated[tuple[float, float], rule(lambda ends: ends[0] < ends[1], "the lower HU must be below the upper")]


class Window(Section):
    """A fixed range of an absolute unit."""

    kind: Literal["window"] = "window"
    hu_window: HuWindow = Field(description="HU that become 0 and 1; values outside are clipped")
