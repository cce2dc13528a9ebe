"""`normalise: {kind: window, hu_window: [-175, 250]}`, or `hu_window: [-175, 250]`."""

from typing import Annotated, Literal

from pydantic import Field

from ssl_ray.config.common import Section, Storage, rule

_HuWindow = Annotated[tuple[float, float], rule(lambda ends: ends[0] < ends[1], "the lower HU must be below the upper")]


class Window(Section):
    """A fixed range of an absolute unit."""

    kind: Literal["window"] = "window"
    hu_window: _HuWindow = Field(description="HU that become 0 and 1; values outside are clipped")

    @property
    def storage(self) -> Storage:
        """8 bits where the HU window has at most 256 integer levels, else 16."""
        return Storage("uint8", 255) if self.hu_window[1] - self.hu_window[0] <= 255 else Storage("uint16", 65535)
