"""What MLflow keeps of one trial and of one pretraining."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from statistics import fmean
from typing import Any, Literal, TypeVar, get_args

from ssl_ray.evaluate.scores import DICE_FOREGROUND, CaseScores
from ssl_ray.search.cells import FAILURE, NONFINITE, Cell
from ssl_ray.tracking.client import MlflowRun
from ssl_ray.tracking.tracker import PRETRAINING_RUN, Tracker

K = TypeVar("K")
Part = Literal["validation", "test"]
Status = Literal["finished", "failed", "unfinished", "missing"]


@dataclass(frozen=True)
class Trial:
    """One cell of the grid and its newest run."""

    cell: Cell
    status: Status
    run_id: str | None = None
    metrics: Mapping[str, float] = field(default_factory=dict)
    """Last value of every metric."""
    curve: Mapping[int, float] = field(default_factory=dict)
    """Foreground Dice on validation, on the canonical grid, by step."""
    cases: Mapping[Part, Sequence[CaseScores]] = field(default_factory=dict)
    organs: Sequence[str] = ()
    """Names of the classes 1, 2, ..."""
    pretraining_run: str | None = None
    precision: str = ""
    """What it computed in; empty where the run does not say."""
    failure: str = ""
    """Why it failed, in one line."""
    nonfinite: bool = False
    """Whether it failed because its loss or gradient was not finite."""


@dataclass(frozen=True)
class PretrainingRun:
    """One pretraining run. Losses are those of its task, by step."""

    run: MlflowRun
    loss: Mapping[int, float]
    validation_loss: Mapping[int, float]
    baseline: Literal["identity", "mean"]
    """What can be predicted without learning: the patch as the network saw it, or a mean."""
    baseline_loss: Mapping[int, float]
    """Validation loss of that prediction."""
    picture: bytes | None
    """PNG of the last one of a validation patch."""
    suffix: str
    """End of the names of this run's figures: empty for the first run, then `_2`, `_3`, ..."""


def read_trial(tracker: Tracker, cell: Cell, run: MlflowRun | None) -> Trial:
    """A cell with what its run has logged; `missing` where it has none."""
    if run is None:
        return Trial(cell, "missing")
    # A run that was killed was interrupted: it goes on when the study is run again.
    statuses: dict[str, Status] = {"FINISHED": "finished", "FAILED": "failed"}
    status = statuses.get(run.info.status, "unfinished")
    run_id, tags, params = run.info.run_id, run.data.tags, run.data.params
    tree: dict[str, Any] = json.loads(tracker.read(run_id, "evaluation.json") or b"{}")
    return Trial(
        cell,
        status,
        run_id,
        metrics=run.data.metrics,
        curve=tracker.history(run_id, f"validation/{DICE_FOREGROUND}"),
        cases={part: [CaseScores(**case) for case in tree.get(part, ())] for part in get_args(Part)},
        organs=tree.get("organs", ()),
        pretraining_run=tags.get(PRETRAINING_RUN),
        precision=params.get("precision", ""),
        failure=tags.get(FAILURE, "") if status == "failed" else "",
        nonfinite=status == "failed" and tags.get(NONFINITE) == "true",
    )


def in_runs(trials: Sequence[Trial]) -> list[Trial]:
    """The trials with the folds of a run as one: all their cases, and means of what each of them measured.

    It has a selected step where they all selected the same.
    """
    runs: dict[Cell, list[Trial]] = {}
    for trial in trials:
        runs.setdefault(replace(trial.cell, fold=None), []).append(trial)
    return [
        replace(
            folds[0],
            cell=cell,
            status=min((fold.status for fold in folds), key=("failed", "unfinished", "missing", "finished").index),
            metrics=_measured(folds),
            curve=means([fold.curve for fold in folds]),
            cases={part: [case for fold in folds for case in fold.cases.get(part, ())] for part in get_args(Part)},
            nonfinite=any(fold.nonfinite for fold in folds),
        )
        for cell, folds in runs.items()
    ]


def _measured(folds: Sequence[Trial]) -> dict[str, float]:
    metrics = means([fold.metrics for fold in folds])
    if len({fold.metrics.get("selected/step") for fold in folds}) > 1:
        metrics.pop("selected/step", None)
    return metrics


def means(values: Sequence[Mapping[K, float]]) -> dict[K, float]:
    """Of what all of them have; there is at least one."""
    return {key: fmean(one[key] for one in values) for key in values[0] if all(key in one for one in values)}


def read_pretraining(tracker: Tracker, run_id: str, number: int) -> PretrainingRun:
    """The pretraining run that is the report's first, second, ..."""
    pictures = tracker.files(run_id, "pictures")
    identity, mean = (tracker.history(run_id, f"validation_{name}_loss") for name in ("identity", "mean"))
    return PretrainingRun(
        run=tracker.client.get_run(run_id),
        loss=tracker.history(run_id, "loss"),
        validation_loss=tracker.history(run_id, "validation_loss"),
        baseline="mean" if mean else "identity",
        baseline_loss=mean or identity,
        picture=tracker.read(run_id, pictures[-1]) if pictures else None,
        suffix=f"_{number}" if number > 1 else "",
    )
