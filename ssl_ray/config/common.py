"""What the sections of an experiment share: types of fields, preparation, network, optimizer."""

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, model_validator

VIT_PATCH = 16
"""Side of a ViT token in voxels: MONAI's UNETR fixes it, and ViTAutoEnc wants a square number."""
VIT_LAYERS = 12
"""Transformer blocks: MONAI's UNETR takes its skip connections from the outputs of blocks 3, 6 and 9 of 12."""

Positive = Annotated[int, Field(gt=0)]
PositiveFloat = Annotated[float, Field(gt=0)]
Share = Annotated[float, Field(ge=0, le=1)]
Seed = Annotated[int, Field(ge=0, lt=2**63)]
Precision = Literal["auto", "float32", "bfloat16"]
OnNonfinite = Literal["skip", "stop"]
"""What happens after a step whose loss or gradient is not finite; either way it does not change the weights."""


def _three(value: Any) -> Any:
    return [value] * 3 if isinstance(value, int | float | str) else value


def _whole_tokens(sides: tuple[int, int, int]) -> tuple[int, int, int]:
    if any(side % VIT_PATCH for side in sides):
        raise ValueError(f"every side must be a multiple of {VIT_PATCH} voxels, got {list(sides)}")
    return sides


def _below(ends: tuple[float, float]) -> tuple[float, float]:
    if not ends[0] < ends[1]:
        raise ValueError(f"the lower HU must be below the upper, got {list(ends)}")
    return ends


Spacing = Annotated[tuple[PositiveFloat, PositiveFloat, PositiveFloat], BeforeValidator(_three)]
"""Millimetres along the three axes; one number in the YAML means three equal ones."""
PatchSize = Annotated[tuple[Positive, Positive, Positive], BeforeValidator(_three), AfterValidator(_whole_tokens)]
"""Voxels along the three axes; one number in the YAML means three equal ones."""
HuWindow = Annotated[tuple[float, float], AfterValidator(_below)]


class Section(BaseModel):
    """A section of the YAML: unknown keys, NaN and infinity are refused, values do not change after loading."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class Preparation(Section):
    """From NIfTI to the canonical array; every field is part of the key under which the store keeps a volume."""

    orientation: Literal["RAS", "LPS", "LAS"] | None = "RAS"
    spacing: Spacing = Field(description="mm")
    hu_window: HuWindow = Field(description="HU that become 0 and 1; values outside are clipped")
    crop_foreground: bool = True


class Network(Section):
    """Width of the ViT (768, 3072, 12: ViT-B) and of UNETR's convolutional decoder."""

    hidden_size: Positive = 768
    mlp_dim: Positive = 3072
    num_heads: Positive = 12
    feature_size: Positive = 16

    @model_validator(mode="after")
    def _divisible(self) -> "Network":
        if self.hidden_size % self.num_heads:
            raise ValueError(
                f"hidden_size must be a multiple of num_heads, got {self.hidden_size} and {self.num_heads}"
            )
        return self


class Optimizer(Section):
    """Adam or AdamW, with a linear warm-up and then a constant or cosine learning rate."""

    name: Literal["adam", "adamw"] = "adamw"
    lr: PositiveFloat = 1e-4
    betas: tuple[Share, Share] = (0.9, 0.999)
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    schedule: Literal["constant", "cosine"] = "constant"
    warmup_steps: Annotated[int, Field(ge=0)] = 0
    clip_norm: PositiveFloat | None = None
