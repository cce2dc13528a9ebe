"""The names of the scores, their form in `evaluation.json`, and their means over volumes.

`metrics.py` computes them and has the conventions. This file is free of torch, since the report reads it.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

DICE_WITH_BACKGROUND = "dice_with_background"
"""Canonical grid: mean over volumes of the mean over present classes, background included. MONAI's
`DiceMetric(include_background=True, reduction="mean").aggregate()` after all volumes."""
PUBLISHED_DICE = "published_dice"
"""Canonical grid: what the tutorial's `validation()` returns. It calls `aggregate()` after every volume without a reset
and averages those running means, so the first of 6 volumes weighs 41 % and the last 3 %; in the order of the cases."""
DICE_FOREGROUND = "dice_foreground"
"""Canonical grid: mean over volumes of the mean over present organs."""
ORIGINAL_DICE_FOREGROUND = "original_dice_foreground"
ORIGINAL_HD95 = "original_hd95"
ORIGINAL_SURFACE_DICE = "original_surface_dice"
"""These three on the original grid: mean over volumes of the mean over present organs; HD95, in mm, over those of them
that were found, so that it means nothing without the next one."""
ORIGINAL_MISS_RATE = "original_miss_rate"
"""Original grid: mean over volumes of the share of present organs that were missed, not a voxel of them predicted."""
ORIGINAL_FALSE_POSITIVES = "original_false_positives"
"""Original grid: mean over volumes of the number of absent organs that were predicted."""

Scores = Sequence[float | None]
_WORDS = (
    "lt|rt|lft|rgt|sin|dex|sinist(er|ra|rum|ro)|dext(er|ra|rum)|destr[oa]|link(s|e[rs]?)|recht(s|e[rs]?)|gauche|droite?|"
    "izquierd[oa]|derech[oa]|esquerd[oa]|direit[oa]"
)
"""Short, Latin, Italian, German, French, Spanish and Portuguese."""
_SIDED = re.compile(rf"(?i)(?<!c)left|(?<!b)right|(?<![a-z])([lr](?![a-z\d])|({_WORDS})(?![a-z]))")
"""Names of organs of which there are two: kidney_left, LeftKidney, R lung, lt kidney; not the vertebra L1."""
_OTHER_SIDE = {"l": "r", "r": "l"}
_OTHER_WORD = {"li": ("re",), "re": ("li",), "dx": ("sx", "sin"), "sx": ("dx",), "od": ("os",), "os": ("od",)}
"""What tells the side only beside its partner: a letter anywhere, and words: Niere li, rene dx, OD (the right eye)."""


@dataclass(frozen=True)
class CaseScores:
    """All scores of one volume, an entry of `evaluation.json`; None for a class that is absent from its truth."""

    case: str
    dice: Scores | None
    """Canonical grid, (classes,), background first; None if only the original grid was scored."""
    original_dice: Scores | None = None
    """Original grid, (classes - 1,) like the next two; None if only the canonical grid was scored."""
    original_hd95: Scores | None = None
    """mm; None for a missed organ, too"""
    original_surface_dice: Scores | None = None
    subject: str = ""
    """Whose volume it is, as in the datalist."""
    false_positives: Sequence[bool | None] | None = None
    """Original grid, (classes - 1,): whether an absent organ was predicted; None for a present one."""

    @property
    def missed(self) -> Sequence[bool | None] | None:
        """Original grid, (classes - 1,): whether a present organ was not predicted at all; None for an absent one."""
        if self.original_dice is None or self.original_hd95 is None:
            return None
        pairs = zip(self.original_dice, self.original_hd95, strict=True)
        return [None if dice is None else hd95 is None for dice, hd95 in pairs]


def aggregate(cases: Sequence[CaseScores], organs: Sequence[str]) -> dict[str, float]:
    """Means over volumes by MLflow metric name; metrics that no volume has are left out.

    These are the metrics of this module's constants, and for every organ, a name of the classes 1, 2, ..., the mean
    over the volumes that have it: `dice/<organ>` on the canonical grid, `original_dice/<organ>`,
    `original_hd95/<organ>` (mm, where it was found), `original_surface_dice/<organ>`, `original_miss_rate/<organ>`; and
    `original_false_positives/<organ>`, the share of the volumes without it where it was predicted. Organs' names are
    those of `organ_keys`. The order of the cases matters to `published_dice` alone.
    """
    canonical = _table(cases, "dice", len(organs) + 1)
    with_background = _mean(canonical, axis=1)
    running = [_mean(with_background[: count + 1]) for count in range(len(cases))]
    means = {
        DICE_WITH_BACKGROUND: _mean(with_background),
        PUBLISHED_DICE: _mean(np.array(running)),
        DICE_FOREGROUND: _mean(_mean(canonical[:, 1:], axis=1)),
    }
    keys = organ_keys(organs)
    means |= {f"dice/{key}": mean for key, mean in zip(keys, _mean(canonical[:, 1:], axis=0), strict=True)}
    for name, field in (
        (ORIGINAL_DICE_FOREGROUND, "original_dice"),
        (ORIGINAL_HD95, "original_hd95"),
        (ORIGINAL_SURFACE_DICE, "original_surface_dice"),
        (ORIGINAL_MISS_RATE, "missed"),
        (ORIGINAL_FALSE_POSITIVES, "false_positives"),
    ):
        original = _table(cases, field, len(organs))
        of_volumes = np.nansum(original, axis=1) if name == ORIGINAL_FALSE_POSITIVES else _mean(original, axis=1)
        means[name] = _mean(of_volumes)
        of_organs = zip(keys, _mean(original, axis=0), strict=True)
        means |= {f"{name.removesuffix('_foreground')}/{key}": mean for key, mean in of_organs}
    return {name: float(mean) for name, mean in means.items() if not np.isnan(mean)}


def organ_keys(organs: Sequence[str]) -> list[str]:
    """Organ names as parts of a metric name: characters that MLflow may refuse become `_`.

    Names that are equal afterwards get the number of their class appended.
    """
    keys = [re.sub(r"[^\w\- ]", "_", organ) for organ in organs]
    return [key if keys.count(key) == 1 else f"{key}_{number}" for number, key in enumerate(keys, start=1)]


def sided(organs: Sequence[str]) -> list[str]:
    """The organs whose names say that they are on one side, which a flip would turn into the other.

    By a word, or by a partner that is called the same but for one letter, rkid and lkid, or a short word, dx and sx.
    """
    known = {name.lower() for name in organs}
    return [name for name in organs if _SIDED.search(name) or not known.isdisjoint(_partners(name.lower()))]


def _partners(name: str) -> set[str]:
    """What the same organ of the other side may be called, if a letter or a short word says the side."""
    letters = {f"{name[:at]}{_OTHER_SIDE[one]}{name[at + 1 :]}" for at, one in enumerate(name) if one in _OTHER_SIDE}
    words = [(one, other) for one in re.finditer("[a-z]+", name) for other in _OTHER_WORD.get(one[0], ())]
    return letters | {f"{name[: one.start()]}{other}{name[one.end() :]}" for one, other in words}


def _table(cases: Sequence[CaseScores], field: str, columns: int) -> NDArray[np.float64]:
    """(volumes that have the field, columns), nan for None."""
    rows = [getattr(case, field) for case in cases if getattr(case, field) is not None]
    return np.array(rows, dtype=float).reshape(len(rows), columns)


def _mean(values: NDArray[np.float64], axis: int | None = None) -> Any:
    """Mean of the values that are not nan; where all are, nan without the warning of `np.nanmean`."""
    known = ~np.isnan(values)
    total, count = np.where(known, values, 0).sum(axis), known.sum(axis)
    return np.divide(total, count, out=np.full(np.shape(total), np.nan), where=count > 0)
