"""What MLflow shows of a pretraining beside its numbers: the volumes that it read, and a description with a picture."""

import re
from collections.abc import Mapping, Sequence
from math import nan
from pathlib import Path
from typing import Any

from ssl_ray.data.store import Volume
from ssl_ray.pretrain.job import Job, Recipe
from ssl_ray.tracking.models import told
from ssl_ray.tracking.view import picture


def datasets(recipe: Recipe, training: Sequence[Volume], validation: Sequence[Volume]) -> list[dict[str, Any]]:
    """The unlabelled volumes by part."""
    roots = [Path(source.root) for source in recipe.settings.sources]
    name, place = " and ".join(root.name for root in roots), " ".join(str(root.absolute()) for root in roots)
    parts = ("pretraining", f"{name} pretraining", training), ("validation", f"{name} held out", validation)
    return [told(context, of, place, [(one.key, one.subject) for one in read]) for context, of, read in parts]


def describe(job: Job, run_id: str, path: str, numbers: Mapping[str, float]) -> str:
    """A pretraining in Markdown, with the picture of this path that it has made last, at a step with these numbers."""
    settings, steps = job.recipe.settings, job.training.table.steps
    plain = next((value for name, value in numbers.items() if re.fullmatch("validation_.*_loss", name)), nan)
    shown = "A patch that it has not trained on, what the network saw of it, and what it made of that"
    return (
        f"{settings.task.kind.capitalize()} on {len(job.training.keys)} unlabelled volumes for {steps:,} steps. "
        f"**Validation loss {numbers.get('validation_loss', nan):.4f}** where this picture was made, and the weights "
        f"with the lowest are kept; what needs no learning leaves {plain:.4f}.\n\n"
        f"{picture(run_id, path, shown)}"
    )
