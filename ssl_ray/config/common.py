"""What the sections of an experiment share: types of fields, network, optimizer."""

from collections.abc import Callable, Mapping
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, Field, PositiveFloat, PositiveInt, model_validator

from ssl_ray.errors import UserError

VIT_PATCH = 16
"""Side of a ViT token in voxels: MONAI's UNETR fixes it, and ViTAutoEnc wants a square number."""
VIT_LAYERS = 12
"""Transformer blocks: MONAI's UNETR takes its skip connections from the outputs of blocks 3, 6 and 9 of 12."""


def rule(holds: Callable[[Any], bool], text: str) -> AfterValidator:
    """A check of a field with several values; `text` is what a user is told who breaks it."""

    def check(values: Any) -> Any:
        if not holds(values):
            raise ValueError(f"{text}, got {list(values)}")
        return values

    return AfterValidator(check)


def of_kinds(default: str) -> BeforeValidator:
    """For a union of sections that `kind` tells apart: a plain string is short for `{kind: string}`."""

    def spelled_out(value: Any) -> Any:
        if isinstance(value, str):
            return {"kind": value}
        return {"kind": default, **value} if isinstance(value, Mapping) else value

    return BeforeValidator(spelled_out)


def _three(value: Any) -> Any:
    return [value] * 3 if isinstance(value, int | float | str) else value


_Side = Annotated[int, Field(gt=0, multiple_of=VIT_PATCH)]
Share = Annotated[float, Field(ge=0, le=1)]
_Beta = Annotated[float, Field(ge=0, lt=1)]
Seed = Annotated[int, Field(ge=0, lt=2**63)]
Precision = Literal["auto", "float32", "bfloat16"]
OnNonfinite = Literal["skip", "stop"]
"""What happens after a step whose loss or gradient is not finite; either way it does not change the weights."""
Spacing = Annotated[tuple[PositiveFloat, PositiveFloat, PositiveFloat], BeforeValidator(_three)]
"""Millimetres along the three axes; one number in the YAML means three equal ones."""
PatchSize = Annotated[tuple[_Side, _Side, _Side], BeforeValidator(_three)]
"""Voxels along the three axes; one number in the YAML means three equal ones."""
one_or_more = rule(lambda values: 0 < len(set(values)) == len(values), "at least one value, and none twice")


class Section(BaseModel, extra="forbid", frozen=True, allow_inf_nan=False):
    """A section of the YAML: unknown keys, NaN and infinity are refused, values do not change after loading."""


class Network(Section):
    """Width of the ViT (768, 3072, 12: ViT-B) and of UNETR's convolutional decoder."""

    hidden_size: PositiveInt = 768
    mlp_dim: PositiveInt = 3072
    num_heads: PositiveInt = 12
    feature_size: PositiveInt = 16

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
    betas: tuple[_Beta, _Beta] = (0.9, 0.999)
    weight_decay: float = Field(0.0, ge=0)
    schedule: Literal["constant", "cosine"] = "constant"
    warmup_steps: int = Field(0, ge=0)
    clip_norm: PositiveFloat | None = None

    def check_warmup(self, steps: int, section: str = "") -> None:
        """Refuse, as a UserError, a warm-up in which all steps of a training would pass: `lr` would not be reached."""
        if self.warmup_steps >= max(1, steps):
            rule = f"must be below the {steps} steps of this training"
            raise UserError(f"{section}optimizer.warmup_steps: {rule}, got {self.warmup_steps}")
