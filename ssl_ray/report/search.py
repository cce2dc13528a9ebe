"""The page of a search, from MLflow alone: what was tried, what mattered, and the best cell. It claims nothing."""

import json
import warnings
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import optuna
from matplotlib import pyplot
from optuna.distributions import CategoricalDistribution
from optuna.trial import FrozenTrial, TrialState, create_trial
from optuna.visualization.matplotlib import plot_parallel_coordinate

from ssl_ray.config.loading import dump, parse
from ssl_ray.config.schema import Study
from ssl_ray.errors import UserError
from ssl_ray.evaluate.scores import ORIGINAL_DICE_FOREGROUND
from ssl_ray.report.page import TEMPLATES, literal, to_html
from ssl_ray.report.results import newest_parent
from ssl_ray.report.tables import Table
from ssl_ray.report.write import Report
from ssl_ray.search.cells import JOURNAL, Cell
from ssl_ray.search.proposals import STATUS, open_study
from ssl_ray.tracking.tracker import KEY, Tracker

ENOUGH = 20
"""Finished cells from which on importances are shown."""


def write_search_report(study: Study, tracker: Tracker, folder: Path) -> Report:
    """Write `report.md`, `report.html`, `figures/search.png` and `best.yaml`, and log them with the search's run.

    Raises:
        UserError: when MLflow has no search of this study.
    """
    parent, config = newest_parent(study, tracker, "search")
    run_id, ran = parent.info.run_id, parse(config, "experiment.yaml in MLflow")
    search = ran.search
    assert search
    if (journal := tracker.read(run_id, JOURNAL)) is None:
        raise UserError(f"{JOURNAL} of the search {run_id} is not in MLflow yet: run the study first")
    with TemporaryDirectory() as scratch:
        (Path(scratch) / JOURNAL).write_bytes(journal)
        trials = open_study(Path(scratch) / JOURNAL, parent.data.tags[KEY], search.mode).get_trials()
    tried = [trial for trial in trials if trial.state in STATUS]
    finished = [trial for trial in tried if trial.state == TrialState.COMPLETE]
    best = max(finished, key=lambda one: (one.value or 0.0) * (1 if search.mode == "max" else -1), default=None)
    values: dict[str, Any] = {"study": study, "search": search, "config": config, "best": best, "literal": literal}
    folder.mkdir(parents=True, exist_ok=True)
    figures: list[Path] = []
    more: list[Path] = []
    if any(trial.value is not None for trial in tried):
        figures = [_draw(tried, search.mode, search.metric, folder / "figures" / "search.png")]
    if best:
        own = Cell(tuple(best.user_attrs["cell"].items()), 0).experiment(ran.unsearched)
        values["yaml"] = dump(own.model_copy(update={"name": f"{study.name}-best"}))
        more = [folder / "best.yaml"]
        more[0].write_text(values["yaml"], encoding="utf-8")
        runs = tracker.runs(kind="trial", key=best.user_attrs["key"])
        values["test"] = runs[0].data.metrics.get(f"selected/test/{ORIGINAL_DICE_FOREGROUND}") if runs else None
    if len(finished) >= ENOUGH:  # PED-ANOVA (Watanabe et al., IJCAI 2023), which takes keys that not every cell reads
        values["importances"] = optuna.importance.get_param_importances(_of_what_is_read(finished, search.mode))
    rows = [_row(trial, [*search.space], trial is best) for trial in tried]
    table = Table(["number", "status", *search.space, "last step", search.metric, "note"], rows, 2)
    values |= {"statuses": [STATUS[trial.state] for trial in tried], "cells": table, "enough": ENOUGH}
    text = TEMPLATES.get_template("search.md.j2").render({"importances": None, **values})
    markdown, html = folder / "report.md", folder / "report.html"
    markdown.write_text(text, encoding="utf-8")
    html.write_text(to_html(text, folder, f"{study.name}: a search"), encoding="utf-8")
    for path in (markdown, html, *more, *figures):
        tracker.attach(run_id, path, "report/figures" if path in figures else "report")
    return Report(str(table), markdown, html, tuple(figures), tuple(more))


def _draw(tried: Sequence[FrozenTrial], mode: str, metric: str, path: Path) -> Path:
    """Optuna's parallel coordinates of the cells that have a score; one axis says which of them were stopped."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        axis = plot_parallel_coordinate(_of_what_is_read(tried, mode, with_status=True), target_name=metric)
    axis.set_title("")
    axis.figure.set_size_inches(11, 5)
    axis.figure.savefig(path, dpi=150, bbox_inches="tight", metadata={"Software": None})
    pyplot.close(axis.figure)
    return path


def _of_what_is_read(tried: Sequence[FrozenTrial], mode: str, with_status: bool = False) -> optuna.Study:
    """The cells that have a score as finished ones, with the values that they read, and choices as they are meant."""
    shown = optuna.create_study(direction="maximize" if mode == "max" else "minimize")
    for trial in (one for one in tried if one.value is not None):
        own = _read(trial)
        kinds = {key: trial.distributions[key] for key in own}
        kinds |= {
            key: CategoricalDistribution([*_labels(kind).values()])
            for key, kind in kinds.items()
            if isinstance(kind, CategoricalDistribution)
        }
        if with_status:
            own["status"], kinds["status"] = STATUS[trial.state], CategoricalDistribution([*STATUS.values()])
        shown.add_trial(create_trial(value=trial.value, params=own, distributions=kinds))
    return shown


def _read(trial: FrozenTrial) -> dict[str, Any]:
    """What was drawn for a cell and is read by it."""
    cell = trial.user_attrs.get("cell", {})
    own = [key for key in trial.params if any(name == key or name.startswith(f"{key}.") for name in cell)]
    kinds = {key: trial.distributions[key] for key in own}
    return {
        key: _labels(kind)[trial.params[key]] if isinstance(kind, CategoricalDistribution) else trial.params[key]
        for key, kind in kinds.items()
    }


def _labels(choices: CategoricalDistribution) -> dict[Any, Any]:
    """What is shown of each choice, which Optuna has as JSON: its value; of a section its kind, if that is enough."""
    meant = {choice: json.loads(str(choice)) for choice in choices.choices}
    kinds = [value.get("kind") for value in meant.values() if isinstance(value, dict)]
    for choice, value in meant.items():
        if isinstance(value, dict):
            meant[choice] = value["kind"] if kinds.count(value.get("kind", "")) == 1 else choice
        elif isinstance(value, list):
            meant[choice] = choice
    return meant


def _row(trial: FrozenTrial, keys: Sequence[str], best: bool) -> list[str]:
    mark, own = "**" if best else "", _read(trial)
    values = [f"{own[key]:.4g}" if isinstance(own.get(key), float) else str(own.get(key, "-")) for key in keys]
    score = "" if trial.value is None else f"{mark}{trial.value:.3f}{mark}"
    note = trial.user_attrs.get("note", "")
    step = str(trial.last_step or "")
    return [str(trial.number), STATUS[trial.state], *map(literal, values), step, score, literal(note)]
