"""Settings of Primus."""

from typing import Literal

from pydantic import Field, PositiveInt, model_validator

from ssl_ray.config.common import NetworkSettings


class Primus(NetworkSettings):
    """Primus-B; S, M and L (Wald et al. 2025) have 396, 12, 6; 864, 16, 12; 1056, 24, 16 for the last three."""

    kind: Literal["primus"] = "primus"
    token: Literal[2, 4, 8, 16, 32] = Field(8, description="side of a token in voxels")
    hidden_size: PositiveInt = 792
    layers: int = Field(12, gt=0, le=1000)
    num_heads: PositiveInt = 12

    @property
    def multiple(self) -> tuple[int, str]:
        """A token."""
        return self.token, "the side of a token (primus)"

    @model_validator(mode="after")
    def _fits(self) -> "Primus":
        width = self.hidden_size / self.num_heads
        if width % 2 or width < 6:
            raise ValueError(
                "hidden_size / num_heads must be an even number from 6 on, as positions turn pairs of a head's numbers "
                f"along three axes, got {self.hidden_size} / {self.num_heads} = {width:g}"
            )
        return self
