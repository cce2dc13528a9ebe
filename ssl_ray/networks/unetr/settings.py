"""Settings of UNETR."""

from typing import ClassVar, Literal

from pydantic import PositiveInt, model_validator

from ssl_ray.config.common import NetworkSettings

VIT_PATCH = 16
"""Side of a token in voxels: MONAI's UNETR fixes it, and ViTAutoEnc wants a square number."""
VIT_LAYERS = 12
"""Transformer blocks: MONAI's UNETR takes its skip connections from the outputs of blocks 3, 6 and 9 of 12."""


class Unetr(NetworkSettings):
    """Width of the ViT (768, 3072, 12: ViT-B) and of UNETR's convolutional decoder."""

    segmentation_only: ClassVar[frozenset[str]] = frozenset({"feature_size"})
    thin_units: ClassVar[int] = 1  # the decoder's first convolutions are on twice the grid of tokens

    kind: Literal["unetr"] = "unetr"
    hidden_size: PositiveInt = 768
    mlp_dim: PositiveInt = 3072
    num_heads: PositiveInt = 12
    feature_size: PositiveInt = 16

    @property
    def multiple(self) -> tuple[int, str]:
        """A token."""
        return VIT_PATCH, "the side of a token (unetr)"

    @model_validator(mode="after")
    def _divisible(self) -> "Unetr":
        if self.hidden_size % self.num_heads:
            raise ValueError(
                f"hidden_size must be a multiple of num_heads, got {self.hidden_size} and {self.num_heads}"
            )
        return self
