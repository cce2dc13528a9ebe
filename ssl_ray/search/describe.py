"""What MLflow shows of a trial beside its numbers: the volumes that it read, and a description."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ssl_ray.evaluate.scores import DICE_FOREGROUND, ORIGINAL_DICE_FOREGROUND
from ssl_ray.finetune.job import TrialJob
from ssl_ray.search.cells import Cell
from ssl_ray.tracking.models import told
from ssl_ray.tracking.view import run_link


def datasets(cell: Cell, job: TrialJob) -> dict[str, dict[str, Any]]:
    """The labelled volumes of a trial, by those of its parts that have some."""
    root, found = Path(job.config.cohort.root), {}
    for part in ("training", "validation", "test"):
        name = f"{root.name} {part}" + (f" {cell.size}, run {cell.run}" if part == "training" else "")
        if volumes := getattr(job.data, part):
            found[part] = told(part, name, str(root.absolute()), volumes)
    return found


def describe(
    cell: Cell, job: TrialJob, parent: str, metrics: Mapping[str, float] | None = None, part: str = "test"
) -> str:
    """A trial in Markdown: what it scored on the `part` that is reported, what it started from, where the answer is."""
    text = []
    if metrics:
        dice, selected = metrics.get(f"selected/{part}/{ORIGINAL_DICE_FOREGROUND}"), int(metrics["selected/step"])
        score = "no organ to score" if dice is None else f"**foreground Dice {dice:.3f}**, original grid"
        on = f"{len(getattr(job.data, part))} {part} volumes"
        best = metrics.get(f"selected/validation/{DICE_FOREGROUND}", float("nan"))
        text.append(f"{score}, on {on}. Weights of step {selected:,}, the best on validation ({best:.3f}).")
    start = {"random": "random weights", "permuted": "pretrained weights, shuffled", "pretrained": "pretrained weights"}
    lineage = start[cell.init] + (f" of {run_link(job.made_by, 'this pretraining')}" if job.made_by else "")
    kind, volumes = job.network.kind.upper(), len(job.data.training)
    text.append(f"{kind} trained on {volumes} labelled volumes for {job.config.steps:,} steps, from {lineage}.")
    text.append(f"Answer, table and report: {run_link(parent, 'the run of all cells')}.")
    return "\n\n".join(text)
