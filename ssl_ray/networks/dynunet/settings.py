"""Settings of MONAI's DynUNet."""

from typing import Annotated, ClassVar, Literal

from pydantic import Field, PositiveInt

from ssl_ray.config.common import NetworkSettings


class DynUnet(NetworkSettings):
    """By default as nnU-Net plans a volume of even spacing: kernels of 3³, each level at half the grid of the last."""

    pretrains: ClassVar[bool] = False
    thin_units: ClassVar[int] = 2

    kind: Literal["dynunet"] = "dynunet"
    filters: Annotated[tuple[PositiveInt, ...], Field(min_length=3)] = (32, 64, 128, 256, 320, 320)
    residual: bool = Field(True, description="residual blocks on the way down")
    deep_supervision: bool = Field(True, description="a loss at every level but the two lowest, half as heavy each")

    @property
    def multiple(self) -> tuple[int, str]:
        """What the lowest level makes one voxel of."""
        halvings = len(self.filters) - 1
        return 2**halvings, f"2^{halvings} for {len(self.filters)} levels (dynunet)"

    def check_patch(self, key: str, patch_size: tuple[int, int, int]) -> None:
        """Instance norm needs more than one voxel at the lowest level."""
        super().check_patch(key, patch_size)
        if max(patch_size) == self.multiple[0]:
            raise ValueError(
                f"{key}: {len(self.filters)} levels leave one voxel of {list(patch_size)}, too few for instance "
                "norm: use larger patches, or fewer of network.filters"
            )
