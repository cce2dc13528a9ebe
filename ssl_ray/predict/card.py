"""The card of a model: what it is, what it was made of, how well it did, and what nobody knows about it."""

import json
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
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
    "Dice of the organs, grid of the file": (scores.ORIGINAL_DICE_FOREGROUND, "original_dice", 0),
    "surface Dice of the organs": (scores.ORIGINAL_SURFACE_DICE, "original_surface_dice", 0),
    "HD95 of the organs that were found, mm": (scores.ORIGINAL_HD95, "original_hd95", 0),
    "share of organs missed": (scores.ORIGINAL_MISS_RATE, "", 0),
    "Dice of the organs, prepared grid": (scores.DICE_FOREGROUND, "dice", 1),
}
"""Name of the mean in the model's metadata; field of a volume in `evaluation.json`, and its first organ there."""


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
    found = {}
    for title, (measure, field, first) in _MEASURES.items():
        if measure in means:
            of_volumes = [_mean(volume[field][first:]) for volume in volumes] if field else []
            found[title] = f"{means[measure]:.3f}{_interval(of_volumes, patients)}"
    for number, (organ, key) in enumerate(zip(told.organs, scores.organ_keys(told.organs), strict=True)):
        if (mean := means.get(f"original_dice/{key}")) is not None:
            of_volumes = [volume["original_dice"][number] for volume in volumes]
            found[f"Dice, {organ}"] = f"{mean:.3f}{_interval(of_volumes, patients)}"
    return found


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None


def _interval(values: Sequence[float | None], patients: Sequence[str]) -> str:
    """95 % interval of the mean by Student's t, from the deviations of patients, who may have several volumes each."""
    known = [(value, patient) for value, patient in zip(values, patients, strict=False) if value is not None]
    groups = {patient for _, patient in known}
    if len(groups) < 2:
        return ""
    mean = float(np.mean([value for value, _ in known]))
    sums = [sum(value - mean for value, patient in known if patient == group) for group in groups]
    error = math.sqrt(len(groups) / (len(groups) - 1) * sum(one**2 for one in sums)) / len(known)
    half = float(stats.t.ppf(0.975, len(groups) - 1)) * error
    return f" ({max(mean - half, 0):.3f} to {mean + half:.3f})"
