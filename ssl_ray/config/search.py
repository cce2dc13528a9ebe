"""The section `search` of an experiment: cells whose values are drawn from a space, instead of the grid's."""

import difflib
import math
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, Field, PositiveFloat, PositiveInt, ValidationError, model_validator

from ssl_ray.config.common import Section
from ssl_ray.config.overrides import changed, keys, leaves, read

_SEARCHED = "finetune.", "pretrain.", "network."
_APART = tuple(f"finetune.{name}" for name in ("cohort", "grid", "runs", "margin", "primary", "weights"))
_APART += "pretrain.sources", "pretrain.pretrainings"
"""Keys that say which cells and volumes there are, not how one cell is trained."""


def _fits(given: dict[str, tuple[Any, ...]]) -> dict[str, tuple[Any, ...]]:
    """One distribution with values that fit it; ends that YAML reads as text, such as 1e-4, become numbers."""
    if len(given) != 1:
        raise ValueError(f"exactly one of choice, uniform, loguniform and int, got {list(given)}")
    ((kind, values),) = given.items()
    if kind == "choice":
        if not values or any(value in values[:place] for place, value in enumerate(values)):
            raise ValueError(f"choice: at least one value, and none twice, got {list(values)}")
        return given
    try:
        low, high = (int(str(value)) if kind == "int" else float(value) for value in values)
    except (TypeError, ValueError):
        low = high = 0
    if not (0 if kind == "loguniform" else -math.inf) < low < high < math.inf:
        rule = {"int": " whole", "loguniform": " positive"}.get(kind, "")
        raise ValueError(f"{kind}: two{rule} numbers, the lower one first, got {list(values)}")
    return {kind: (low, high)}


Distribution = Annotated[
    dict[Literal["choice", "uniform", "loguniform", "int"], tuple[Any, ...]], AfterValidator(_fits)
]
"""E.g. `{loguniform: [1.0e-4, 1.0e-2]}`. Both ends may be drawn; a choice may be a whole section."""

Metric = Literal[
    "dice_foreground",
    "dice_with_background",
    "published_dice",
    "original_dice_foreground",
    "original_surface_dice",
    "original_hd95",
]
"""Of `ssl_ray.evaluate.scores`. Those on the original grid are measured at the end of a trial alone."""


class Search(Section):
    """How cells are drawn, how many, and from what. The space is flat: what a cell's kinds do not read is ignored."""

    algorithm: Literal["grid", "random", "optuna"] = Field("optuna", description="optuna: its TPE sampler")
    scheduler: Literal["none", "asha"] = Field("none", description="asha: stops the worse cells early")
    samples: PositiveInt = Field(20, description="cells; algorithm grid has every combination of its choices instead")
    metric: Metric = Field("dice_foreground", description="on the validation volumes")
    mode: Literal["max", "min"] = "max"
    budget: PositiveFloat | None = Field(None, description="hours, over all restarts, pretrainings included")
    space: dict[str, Distribution] = Field(min_length=1, description="by dotted key of the experiment; size, init")

    @model_validator(mode="after")
    def _fits_together(self) -> "Search":
        ranges = [key for key, one in self.space.items() if "choice" not in one]
        if self.algorithm == "grid" and ranges:
            raise ValueError(f"space.{ranges[0]}: must be a choice with algorithm grid, got {self.space[ranges[0]]}")
        if self.scheduler == "asha" and self.metric.startswith("original_"):
            raise ValueError(f"metric: asha needs one that every validation measures, got {self.metric}")
        return self


def check_space(experiment: BaseModel, space: Mapping[str, Distribution], given: Mapping[str, Sequence[Any]]) -> None:
    """Check every key and value of a space with an experiment that has no `search`.

    `given` are the values of `size` and `init` in the grid; where the space does not draw them, there is one of each.

    Raises:
        ValueError: names the key, the value and what is wrong; for an unknown key, the nearest valid one.
    """
    own = [key for key in keys(type(experiment)) if key.startswith(_SEARCHED) and not key.startswith(_APART)]
    for key, distribution in space.items():
        ((kind, values),) = distribution.items()
        if key in given and (kind != "choice" or not all(value in given[key] for value in values)):
            raise ValueError(f"search.space.{key}: must be a choice out of the grid's {list(given[key])}")
        if key not in (*given, *own):
            near = difflib.get_close_matches(key, [*given, *own], n=1, cutoff=0.5)
            rule = f"unknown key; did you mean '{near[0]}'?" if near else "unknown key"
            rule = "is the same for all cells" if key.startswith(_APART) else rule
            raise ValueError(f"search.space.{key}: {rule}")
        tried = [(value, beside | leaves(key, value)) for value in values for beside in _beside(key, space)]
        if key in own and not any(read(experiment, both).keys() & leaves(key, value).keys() for value, both in tried):
            raise ValueError(f"search.space.{key}: is read by none of the kinds that are set or drawn")
        for value, both in tried if key in own else ():
            try:
                changed(experiment, both)
            except ValidationError as error:
                mistake = error.errors()[0]
                rule = ": ".join(filter(None, [".".join(map(str, mistake["loc"])), mistake["msg"]]))
                raise ValueError(f"search.space.{key}: {value!r} is refused: {rule}") from error
    for name, there in given.items():
        if name not in space and len(there) > 1:
            raise ValueError(f"finetune.grid: one {name}, unless search.space.{name} draws it, got {list(there)}")


def _beside(key: str, space: Mapping[str, Distribution]) -> list[dict[str, Any]]:
    """What may be drawn with a key and decides whether it is read: nothing, or a kind of a section that it is in."""
    kinds = {other: one["choice"] for other, one in space.items() if "choice" in one and other != key}
    inside = {other: values for other, values in kinds.items() if key.startswith(other.removesuffix("kind"))}
    return [{}, *(leaves(other, value) for other, values in inside.items() for value in values)]
