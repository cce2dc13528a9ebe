"""The section `search` of an experiment: cells whose values are drawn from a space, instead of the grid's."""

import math
import random
import re
from collections.abc import Iterator, Mapping, Sequence
from itertools import takewhile
from typing import Annotated, Any, Literal, get_args

from pydantic import AfterValidator, BaseModel, Field, PositiveFloat, PositiveInt, ValidationError, model_validator

from ssl_ray.config.common import FINETUNE_HOW, PRETRAIN_HOW, Section
from ssl_ray.config.overrides import S, changed, keys, placed
from ssl_ray.text import did_you_mean

_SEARCHED = re.compile(
    r"(finetune\.(?!weights)|pretrain\.|network\.)(?!(cohort|grid|runs|margin|primary|sources|pretrainings)\b)"
)
"""Keys that say how one cell is trained, not which cells and volumes there are."""
_HOW = {f"pretrain.{key}" for key in PRETRAIN_HOW - {"workers"}} | {f"finetune.{key}" for key in FINETUNE_HOW}
"""Keys on which no result depends: all cells would be the same. A contrastive loss depends on the workers."""

_POWER = re.compile(r"(?i)[-+]?(\d+\.?\d*|\.\d+)e[-+]?\d+")
"""A number with an exponent. Every other value of the experiment is read by its type; a choice has none."""

_Kind = Literal["choice", "uniform", "loguniform", "int", "logint"]
DISTRIBUTIONS: tuple[str, ...] = get_args(_Kind)
WHOLE = "int", "logint"
LOGARITHMIC = "loguniform", "logint"


def _fits(given: dict[str, tuple[Any, ...]]) -> dict[str, tuple[Any, ...]]:
    """One distribution, its values hashable; numbers that YAML reads as text, such as 1e-4, become numbers."""
    kind, values = next(iter(given.items()), ("", ()))
    if kind == "choice":
        values = tuple(map(_read, values))
        fits = bool(values) and not any(value in values[:place] for place, value in enumerate(values))
    else:
        try:
            low, high = values = tuple(int(str(value)) if kind in WHOLE else float(value) for value in values)
            fits = (0 if kind in LOGARITHMIC else -math.inf) < low < high < math.inf
        except (TypeError, ValueError):
            fits = False
    if len(given) != 1 or not fits:
        raise ValueError(
            "one of choice (values, none twice), uniform, loguniform (positive), int (whole) and logint (whole, "
            f"positive): [lowest, highest], got {given}"
        )
    return {kind: values}


def _read(value: Any) -> Any:
    if isinstance(value, list | tuple):
        return tuple(map(_read, value))
    return float(value) if isinstance(value, str) and _POWER.fullmatch(value) else value


Distribution = Annotated[dict[_Kind, tuple[Any, ...]], AfterValidator(_fits)]
"""E.g. `{loguniform: [1.0e-4, 1.0e-2]}`; both ends may be drawn. A choice of one value sets it."""

_METRIC = "^((original_)?dice_foreground|dice_with_background|published_dice|original_surface_dice|original_hd95)$"
"""Of `ssl_ray.evaluate.scores`. Those on the original grid are measured at the end of a trial alone."""


def _better(metric: str | None) -> Literal["max", "min"]:
    return "min" if metric == "original_hd95" else "max"  # a distance, in mm; the others are overlaps


class Search(Section):
    """How cells are drawn, how many, and from what. The space is flat: what a cell's kinds do not read is ignored."""

    algorithm: Literal["grid", "random", "optuna"] = Field("optuna", description="optuna: its TPE sampler")
    scheduler: Literal["none", "asha"] = Field("none", description="asha: stops the worse cells early")
    samples: PositiveInt = Field(20, description="cells; algorithm grid has every combination of its choices instead")
    metric: str = Field("dice_foreground", pattern=_METRIC, description="on the validation volumes")
    mode: Literal["max", "min"] = Field(
        default_factory=lambda given: _better(given.get("metric")), description="what is better: by the metric"
    )
    budget: PositiveFloat | None = Field(None, description="hours, over all restarts, pretrainings included")
    space: dict[str, Distribution] = Field(min_length=1, description="by dotted key of the experiment; size, init")

    @property
    def cells(self) -> int:
        """How many are drawn; fewer are trained where some are the same."""
        combinations = math.prod(len(one["choice"]) for one in self.space.values() if "choice" in one)
        return combinations if self.algorithm == "grid" else self.samples

    @model_validator(mode="after")
    def _fits_together(self) -> "Search":
        if self.algorithm == "grid" and not all("choice" in one for one in self.space.values()):
            raise ValueError("space: with algorithm grid, every key must have a choice")
        if self.scheduler == "asha" and self.metric.startswith("original_"):
            raise ValueError(f"metric: asha needs one that every validation measures, got {self.metric}")
        if self.mode != _better(self.metric):
            raise ValueError(f"mode: of {self.metric} the best is the {_better(self.metric)}, got {self.mode}")
        return self


def resolved(experiment: S, values: Mapping[str, Any]) -> S:
    """The experiment, validated, of which the cell with these values, `size` and `init` among them, is the only one."""
    grid = {"finetune.grid.sizes": [values["size"]], "finetune.grid.init": [values["init"]], "finetune.grid.lr": None}
    return changed(experiment, {**grid, "finetune.primary": None, "search": None, **values})


def check_space(
    experiment: BaseModel, space: Mapping[str, Distribution], given: Mapping[str, Sequence[Any]], makes_weights: bool
) -> None:
    """Refuse a key that cannot be searched, and a value that is refused beside all else that may be drawn (50 draws).

    Of a range both ends are tried, and two values between them. `given` are the values of `size` and `init` in the
    grid; where the space does not draw them, there is one of each.
    """
    valid = [*given, *(key for key in keys(type(experiment)) if _SEARCHED.match(key) and key not in _HOW)]
    drawn = {key: values for key, one in space.items() for values in one.values()}
    for key in drawn.keys() - valid:
        meant = did_you_mean(key, valid)
        raise ValueError(f"search.space.{key}: not a key that can be searched{'; ' if meant else ''}{meant}")
    for name, there in given.items():
        chosen = space[name].get("choice", ()) if name in space else there[:1]
        if not set(chosen) <= set(there) or len(chosen) < min(len(there), 1 + (name not in space)):
            raise ValueError(f"search.space.{name}: must be a choice out of the grid's {list(there)}")
    base, draw = {name: there[0] for name, there in given.items()}, random.Random(0)
    beside = [base, *({**base, **{key: draw.choice(values) for key, values in drawn.items()}} for _ in range(50))]
    for key, value in ((key, value) for key, one in space.items() for value in _tried(one)):
        cells = [{**others, key: value} for others in beside]
        cells = [cell for cell in cells if key in given or key in placed(experiment, cell)[1]]
        refusals = list(takewhile(bool, (_refusal(experiment, cell) for cell in cells)))
        if len(refusals) == len(cells):
            rule = f"is refused: {refusals[0]}" if cells else "is read by none of the kinds that are set or drawn"
            whole = isinstance(value, float) and "choice" not in space[key] and not value.is_integer()
            hint = "; int and logint draw whole numbers" if whole else ""
            raise ValueError(f"search.space.{key}: {value!r} {rule}{hint}")
    unread = [key for key in drawn if key.startswith("pretrain.")]
    if unread and (not makes_weights or set(drawn.get("init", given["init"][:1])) == {"random"}):
        raise ValueError(f"search.space.{unread[0]}: no cell reads it, as none starts from weights of this study")


def _tried(distribution: Distribution) -> Iterator[Any]:
    """Its values, and between two ends the kind of number that is drawn there: seldom a whole one."""
    for kind, values in distribution.items():
        yield from values
        if kind not in ("choice", *WHOLE):
            low, high = values
            yield from (drawn_number(low + share * (high - low), low, high) for share in (0.00123456, 0.314159))


def drawn_number(exact: float, low: float, high: float) -> float:
    """A number that was drawn between two ends, as a cell has it: to four digits."""
    return min(max(float(f"{exact:.4g}"), low), high)


def _refusal(experiment: BaseModel, values: Mapping[str, Any]) -> str:
    try:
        resolved(experiment, values)
    except ValidationError as error:
        mistake = error.errors()[0]
        return f"{'.'.join(map(str, mistake['loc']))} {mistake['msg']}".strip()
    return ""
