"""Settings of Primus."""

from typing import Literal

from pydantic import Field, PositiveInt, model_validator

from ssl_ray.config.common import NetworkSettings


class Primus(NetworkSettings):
    """Primus-B; S, M and L (Wald et al. 2025) have 396, 12, 6; 864, 16, 12; 1056, 24, 16 for the last three."""

    kind: Literal["primus"] = "primus"
    token: int = Field(8, ge=2, description="side of a token in voxels, a power of two")
    hidden_size: PositiveInt = 792
    layers: PositiveInt = 12
    num_heads: PositiveInt = 12

    @property
    def multiple(self) -> tuple[int, str]:
        """A token."""
        return self.token, "the side of a token (primus)"

    @model_validator(mode="after")
    def _fits(self) -> "Primus":
        if self.token & (self.token - 1):
            steps = self.token.bit_length() - 1
            raise ValueError(
                f"token must be a power of two, as the decoder doubles the grid step by step, got {self.token}: "
                f"2^{steps} = {2**steps}, 2^{steps + 1} = {2 ** (steps + 1)}"
            )
        width = self.hidden_size / self.num_heads
        if width % 2 or width < 6:
            raise ValueError(
                "hidden_size / num_heads must be an even number from 6 on, as positions turn pairs of a head's numbers "
                f"along three axes, got {self.hidden_size} / {self.num_heads} = {width:g}"
            )
        return self
