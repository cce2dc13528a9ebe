"""What MLflow keeps of one trial and of one pretraining."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from statistics import fmean
from typing import Any, Literal, get_args

from ssl_ray.evaluate.scores import DICE_FOREGROUND, CaseScores
from ssl_ray.search.cells import FAILURE, NONFINITE, Cell
from ssl_ray.tracking.client import MlflowRun
from ssl_ray.tracking.tracker import PRETRAINING_RUN, Tracker

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
    """One pretraining run. Its losses are L1 by step, where the HU window is 0 to 1."""

    run: MlflowRun
    loss: Mapping[int, float]
    validation_loss: Mapping[int, float]
    identity_loss: Mapping[int, float]
    """Validation loss of leaving patches corrupted."""
    probe: Mapping[int, float]
    """R² of the probe, by step; empty without labels."""
    untrained: float | None
    """That of the untrained network."""
    picture: bytes | None
    """PNG of the last restoration."""
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
    """The trials with the folds of a run as one, which scored every patient once; those without folds as they are."""
    runs: dict[Cell, list[Trial]] = {}
    for trial in trials:
        runs.setdefault(trial.cell.whole, []).append(trial)
    return [folds[0] if folds[0].cell == cell else _joined(cell, folds) for cell, folds in runs.items()]


def _joined(cell: Cell, folds: Sequence[Trial]) -> Trial:
    """One trial out of the folds of a run: means of what all of them measured, and all their cases."""
    metrics = set.intersection(*(set(fold.metrics) for fold in folds))
    steps = set.intersection(*(set(fold.curve) for fold in folds))
    return Trial(
        cell,
        min((fold.status for fold in folds), key=("failed", "unfinished", "missing", "finished").index),
        metrics={name: fmean(fold.metrics[name] for fold in folds) for name in metrics},
        curve={step: fmean(fold.curve[step] for fold in folds) for step in sorted(steps)},
        cases={part: [case for fold in folds for case in fold.cases.get(part, ())] for part in get_args(Part)},
        organs=next((fold.organs for fold in folds if fold.organs), ()),
        precision=folds[0].precision,
        nonfinite=any(fold.nonfinite for fold in folds),
    )


def read_pretraining(tracker: Tracker, run_id: str, number: int) -> PretrainingRun:
    """The pretraining run that is the report's first, second, ..."""
    pictures = tracker.files(run_id, "pictures")
    return PretrainingRun(
        run=tracker.client.get_run(run_id),
        loss=tracker.history(run_id, "loss"),
        validation_loss=tracker.history(run_id, "validation_loss"),
        identity_loss=tracker.history(run_id, "validation_identity_loss"),
        probe=tracker.history(run_id, "probe_r2"),
        untrained=next(iter(tracker.history(run_id, "probe_r2_untrained").values()), None),
        picture=tracker.read(run_id, pictures[-1]) if pictures else None,
        suffix=f"_{number}" if number > 1 else "",
    )
