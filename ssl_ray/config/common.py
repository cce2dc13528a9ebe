"""What the sections of an experiment share: types of fields, kinds of a section, optimizer."""

import math
from collections.abc import Callable, Mapping
from typing import Annotated, Any, ClassVar, Literal, NamedTuple, get_args

from pydantic import AfterValidator, BaseModel, BeforeValidator, Field, PositiveFloat, PositiveInt, model_validator

from ssl_ray.errors import UserError


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


def _within(annotation: Any, types: tuple[Any, ...]) -> bool:
    return annotation in types or any(_within(part, types) for part in get_args(annotation))


def _as_text(value: Any) -> Any:
    """The value with truth as YAML spells it, which is no number."""
    if isinstance(value, list | tuple):
        return [_as_text(one) for one in value]
    return str(value).lower() if isinstance(value, bool) else value


_MOST_VOXELS = 2**28
"""Of a patch: 1 GB in float32. What a model file asks for is to fit into some machine."""

Share = Annotated[float, Field(ge=0, le=1)]
_Beta = Annotated[float, Field(ge=0, lt=1)]
Seed = Annotated[int, Field(ge=0, lt=2**63)]
Precision = Literal["auto", "float32", "bfloat16"]
OnNonfinite = Literal["skip", "stop"]
"""What happens after a step whose loss or gradient is not finite; either way it does not change the weights."""
Spacing = Annotated[tuple[PositiveFloat, PositiveFloat, PositiveFloat], BeforeValidator(_three)]
"""Millimetres along the three axes; one number in the YAML means three equal ones."""
PatchSize = Annotated[
    tuple[PositiveInt, PositiveInt, PositiveInt],
    BeforeValidator(_three),
    rule(lambda sides: math.prod(sides) <= _MOST_VOXELS, f"at most {_MOST_VOXELS:,} voxels"),
]
"""Voxels along the three axes; one number in the YAML means three equal ones. The network says what fits."""
WindowBatch = Annotated[int, Field(ge=1, le=1024)]
"""Sliding windows at a time."""

_HOW = {"compile", "on_nonfinite", "max_skipped", "max_failures", "checkpoint_minutes"}
"""Fields that say how a stage is carried out, not what it computes: they may change before it goes on."""

PRETRAIN_HOW = _HOW | {
    *("workers", "shard", "microbatch", "gpu", "cpus_per_worker", "block_megabytes"),
    *("log_every", "picture_every", "probe", "checkpoint_every", "keep_checkpoints"),
}
FINETUNE_HOW = _HOW | {"max_concurrent_trials", "cpus_per_trial", "gpus_per_trial", "sliding_window_batch"}

one_or_more = rule(lambda values: 0 < len(set(values)) == len(values), "at least one value, and none twice")


class Section(BaseModel, extra="forbid", frozen=True, allow_inf_nan=False):
    """A section of the YAML: unknown keys, NaN and infinity are refused, values do not change after loading.

    So is a truth value for a number, which pydantic would take for 1: `freeze: true` would freeze for one step.
    """

    @model_validator(mode="before")
    @classmethod
    def _no_truth_for_a_number(cls, given: Any) -> Any:
        if not isinstance(given, Mapping):
            return given
        fields = {key: cls.model_fields[key].annotation for key in given if key in cls.model_fields}
        numbers = {key for key, annotation in fields.items() if not _within(annotation, (bool, str, Any))}
        return {key: _as_text(value) if key in numbers else value for key, value in given.items()}


class Storage(NamedTuple):
    """How voxels are stored: as integers of a `dtype`, 1 as `levels`, what lies outside `ends` as these."""

    dtype: str
    levels: int
    ends: tuple[float, float] = (0, 1)


class NetworkSettings(Section):
    """What the settings of every kind of network tell before it is built.

    pretrains: whether it has an encoder to pretrain.
    segmentation_only: fields that the network of the pretraining does not read.
    thin_units: segmenting patches whose first side is so many times `multiple` or less, a convolution is 2 voxels deep.
    """

    pretrains: ClassVar[bool] = True
    segmentation_only: ClassVar[frozenset[str]] = frozenset()
    thin_units: ClassVar[int] = 0

    @property
    def multiple(self) -> tuple[int, str]:
        """Voxels that each side of a patch must be a multiple of, and why."""
        raise NotImplementedError

    @property
    def thin(self) -> int:
        """The first side, in voxels, up to which bfloat16 is wrong on a CPU (oneDNN)."""
        return self.thin_units * self.multiple[0]

    def check_patch(self, key: str, patch_size: tuple[int, int, int]) -> None:
        """A ValueError with the arithmetic where the network does not take patches of this size (setting `key`)."""
        unit, why = self.multiple
        for side in patch_size:
            if side % unit:
                raise ValueError(
                    f"{key}: a side must be a multiple of {unit}, {why}, got {list(patch_size)}: "
                    f"{side} = {side // unit} x {unit} + {side % unit}"
                )


class TaskSettings(Section):
    """What the settings of every pretraining task tell."""

    @property
    def compares_patches(self) -> bool:
        """Whether the loss is between patches of one worker, so that results depend on the number of workers."""
        return False

    def check_patch(self, patch_size: tuple[int, int, int], tokens: int) -> None:
        """A ValueError where the task cannot be trained on patches of this size, of which a network makes `tokens`."""


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
