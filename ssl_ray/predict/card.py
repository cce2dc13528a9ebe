"""The card of a model: what it is, what it was made of, how well it did, and what nobody knows about it."""

import json
import math
from collections.abc import Sequence
from typing import Any

import pandas as pd
from jinja2 import Environment, PackageLoader, StrictUndefined
from scipy import stats

from ssl_ray.evaluate import scores
from ssl_ray.networks.model_file import Metadata
from ssl_ray.predict.model import Model
from ssl_ray.text import shown

TEMPLATES = Environment(
    loader=PackageLoader("ssl_ray.predict"), undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
)
TEMPLATES.filters["cell"] = lambda value: shown(value).replace("|", "\\|")

_MEASURES = {
    scores.ORIGINAL_DICE_FOREGROUND: "Dice of the organs, grid of the file",
    scores.ORIGINAL_SURFACE_DICE: "surface Dice of the organs",
    scores.ORIGINAL_HD95: "HD95 of the organs that were found, mm",
    scores.ORIGINAL_MISS_RATE: "share of organs missed",
    scores.DICE_FOREGROUND: "Dice of the organs, prepared grid",
}
"""What a reader calls the means in a model's metadata."""


def model_card(model: Model, name: str, authors: str, scripts: bool) -> str:
    """Markdown, for a bundle with scripts or without; with intervals where `evaluation.json` lies beside the model."""
    told = model.metadata
    beside = model.path.with_name("evaluation.json")
    volumes: dict[str, Any] = json.loads(beside.read_bytes()) if beside.is_file() else {}
    parts = {part: _scores(told, means, volumes.get(part, [])) for part, means in told.scores.items() if means}
    return TEMPLATES.get_template("card.md.j2").render(
        name=shown(name), authors=shown(authors), told=told, parts=parts, intervals=bool(volumes), scripts=scripts
    )


def _scores(told: Metadata, means: dict[str, float], volumes: Sequence[dict[str, Any]]) -> dict[str, str]:
    """By what a reader calls them: the measures of a part, then Dice by organ."""
    patients = [volume.get("subject") or volume["case"] for volume in volumes]
    of_volumes = [scores.aggregate([scores.CaseScores(**volume)], told.organs) for volume in volumes]
    keys = zip(scores.organ_keys(told.organs), told.organs, strict=True)
    titles = _MEASURES | {f"original_dice/{key}": f"Dice, {organ}" for key, organ in keys}
    return {
        title: f"{means[measure]:.3f}{_interval([volume.get(measure) for volume in of_volumes], patients)}"
        for measure, title in titles.items()
        if measure in means
    }


def _interval(values: Sequence[float | None], patients: Sequence[str]) -> str:
    """95 % interval of the mean by Student's t, from the deviations of patients, who may have several volumes each."""
    known = pd.Series(values, patients, float).dropna()
    mean = known.mean()
    sums = (known - mean).groupby(level=0).sum()
    if len(sums) < 2:
        return ""
    error = math.sqrt(len(sums) / (len(sums) - 1) * (sums**2).sum()) / len(known)
    half = float(stats.t.ppf(0.975, len(sums) - 1)) * error
    return f" ({max(mean - half, 0):.3f} to {mean + half:.3f})"
