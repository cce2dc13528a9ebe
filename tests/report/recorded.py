"""A study that is written into MLflow as a real one would be, for the tests of the report."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from types import SimpleNamespace
from typing import Any

import numpy as np
from studies import place_database, small_study

from ssl_ray.config.loading import dump
from ssl_ray.config.schema import Study
from ssl_ray.evaluate.planes import FILE, Planes, to_npz
from ssl_ray.evaluate.scores import DICE_FOREGROUND, ORIGINAL_DICE_FOREGROUND, CaseScores, aggregate
from ssl_ray.pretrain.picture import draw_picture
from ssl_ray.report.comparison import SELECTION
from ssl_ray.report.results import Results, conclude
from ssl_ray.report.trials import Status, Trial
from ssl_ray.search.cells import FAILURE, NONFINITE, Cell, cells
from ssl_ray.study.parts import run_params, tracker_of
from ssl_ray.tracking.client import DEVICE
from ssl_ray.tracking.tracker import PRETRAINING_RUN, Tracker
from ssl_ray.tracking.view import DICE

ORGANS = ("liver", "spleen")


def make_study(folder: Path, **grid: Any) -> Study:
    """Keys of the section `finetune` out of `grid` go there, the others into its `grid`."""
    own = {key: grid.pop(key) for key in ("runs", "margin", "primary") if key in grid}
    grid = {"sizes": [6, 12], "lr": [1e-4, 3e-4]} | grid
    cohort = {"classes": 3, "splits": {size: f"{size}.json" for size in (6, 12, 24)}}
    return small_study(folder, name="fake", finetune={"cohort": cohort, "steps": 400, "grid": grid, **own})


def case(
    name: str, dice: Sequence[float | None], background: float = 0.99, hd95: float = 5.0, subject: str = ""
) -> CaseScores:
    """A volume with the same Dice on both grids; an organ with Dice 0 was missed."""
    organs = tuple(dice)
    distances = tuple(hd95 if score else None for score in organs)
    absent = tuple(False if score is None else None for score in organs)
    return CaseScores(name, (background, *organs), organs, distances, organs, subject, absent)


def flat(values: Sequence[float], prefix: str = "t") -> list[CaseScores]:
    """Volumes whose organs all have the same Dice."""
    return [case(f"{prefix}{number}", [value] * len(ORGANS)) for number, value in enumerate(values)]


@dataclass
class Outcome:
    """What one trial of the fake study does."""

    validation: Sequence[CaseScores]
    test: Sequence[CaseScores] = ()
    status: str = "FINISHED"
    organs: tuple[str, ...] = ORGANS
    curve: dict[int, float] = field(default_factory=lambda: {200: 0.4, 400: 0.5})
    selected: int = 200
    failure: str = ""
    organ_curves: dict[str, dict[int, float]] = field(default_factory=dict)
    planes: dict[str, Planes] = field(default_factory=dict)
    precision: str = "float32"
    nonfinite: bool = False


@cache
def _picture(step: int) -> bytes:
    patch = np.random.default_rng(step).random((16, 16, 16))
    with TemporaryDirectory() as folder:
        path = Path(folder) / "patch.png"
        draw_picture(path, {"ground truth": patch, "corrupted": patch, "restored": patch}, f"step {step}", (2, 2, 2))
        return path.read_bytes()


def record(study: Study, outcomes: dict[Cell, Outcome], folder: Path, bad: Sequence[dict[str, str]] = ()) -> Tracker:
    """Write a study into MLflow with the calls of `ssl_ray.pretrain.driver` and `ssl_ray.search.grid`."""
    place_database(Path(str(study.tracking.uri).removeprefix("sqlite:///")))
    tracker = tracker_of(study)
    run = tracker.open("pretraining", "p", "pretrain", run_params(study, "pretrain"))
    run.started(0)
    run.tags({DEVICE: "a GPU"})
    for step in range(20, 201, 20):
        validated = {"validation_loss": 2 / step, "validation_identity_loss": 0.2} if step % 40 == 0 else {}
        run.metrics({"loss": 3 / step} | validated, step)
    folder.mkdir(parents=True, exist_ok=True)
    for step in (40, 200):
        path = folder / f"patch_{step:07d}.png"
        path.write_bytes(_picture(step))
        run.artifact(path, "pictures")
    run.close()
    lineage = {PRETRAINING_RUN: run.id}
    grid = tracker.open("grid", "g", "fake: does pretraining help?", run_params(study, "finetune"))
    grid.text(dump(study), "experiment.yaml")
    transfer = {"share": 1.0, "loaded": 150, "interpolated": [], "missing": [], "unexpected": ["conv3d_transpose.bias"]}
    grid.text(json.dumps(transfer), "weight_transfer.json")
    grid.text(json.dumps({cell.name: cell.name for cell in outcomes}), "cells.json")
    grid.text(json.dumps(bad), "bad_volumes.json")
    for cell, outcome in outcomes.items():
        params = {"size": cell.size, "init": cell.init, "lr": cell.lr}
        params |= {"training_volumes": cell.size, "precision": outcome.precision}
        tags = lineage if cell.init == "pretrained" else {}
        run = tracker.open("trial", cell.name, cell.label, params, grid.id, tags)
        run.started(0)
        run.tags({DEVICE: "a [processor]"})
        for step, value in outcome.curve.items():
            organs = {f"validation/dice/{organ}": curve[step] for organ, curve in outcome.organ_curves.items()}
            run.metrics({"loss": 1 - value, "lr": cell.lr, "validation/dice_foreground": value} | organs, step)
        if outcome.status == "FINISHED":
            parts = {"validation": outcome.validation, "test": outcome.test}
            metrics = {"selected/step": float(outcome.selected)}
            for name, scored in parts.items():
                means = aggregate(scored, outcome.organs)
                metrics |= {f"selected/{name}/{key}": value for key, value in means.items()}
            part = "test" if outcome.test else "validation"
            metrics[DICE] = metrics.get(f"selected/{part}/{ORIGINAL_DICE_FOREGROUND}", 0.0)
            run.metrics(metrics, study.finetune.steps)
            tree = {"step": outcome.selected, "organs": list(outcome.organs)}
            tree |= {name: [asdict(one) for one in scored] for name, scored in parts.items()}
            home = folder / cell.name
            home.mkdir(parents=True)
            (home / "evaluation.json").write_text(json.dumps(tree))
            run.artifact(home / "evaluation.json")
            if outcome.planes:
                (home / FILE).write_bytes(to_npz(outcome.planes))
                run.artifact(home / FILE)
        if outcome.failure:
            run.tags({FAILURE: outcome.failure})
        if outcome.nonfinite:
            run.tags({NONFINITE: "true"})
        run.close(outcome.status)
    grid.close()
    tracker.settle()
    return tracker


def constant(study: Study, random: float, pretrained: float) -> dict[Cell, Outcome]:
    """Every pretrained cell as good as the next one, likewise every random one; tested on 8 volumes."""
    values = {"random": random, "pretrained": pretrained}
    return {
        cell: Outcome(flat([values[cell.init]] * 2, "v"), flat([values[cell.init]] * 8))
        for cell in cells(study.finetune)
    }


def concluded(study: Study, outcomes: dict[Cell, Outcome], pool: int | None = None) -> Results:
    """What the report concludes from such a study, without MLflow in between."""
    status: dict[str, Status] = {"FINISHED": "finished", "FAILED": "failed", "MISSING": "missing"}
    trials = [
        Trial(
            cell,
            status[outcome.status],
            metrics={
                SELECTION: aggregate(outcome.validation, outcome.organs).get(DICE_FOREGROUND, 0.0),
                "selected/step": float(outcome.selected),
            },
            cases={"validation": outcome.validation, "test": outcome.test} if outcome.status == "FINISHED" else {},
            organs=outcome.organs,
            precision=outcome.precision,
            nonfinite=outcome.nonfinite,
        )
        for cell, outcome in outcomes.items()
    ]
    grid: Any = SimpleNamespace(data=SimpleNamespace(params={"pool_subjects": str(pool)} if pool else {}))
    return conclude(study, grid, trials, config="", as_given=True, transfer=None, pretraining=[], bad={})
