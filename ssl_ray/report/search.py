"""The page of a search, from MLflow alone: what was tried, what mattered, and the best cell. It claims nothing."""

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import optuna
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from optuna.trial import FrozenTrial, TrialState

from ssl_ray.config.loading import dump, parse
from ssl_ray.config.schema import Study
from ssl_ray.config.search import resolved
from ssl_ray.errors import UserError
from ssl_ray.evaluate.scores import ORIGINAL_DICE_FOREGROUND
from ssl_ray.report.page import fence, literal, write_page
from ssl_ray.report.results import newest_parent
from ssl_ray.report.style import GREY, legend_above, panels, save
from ssl_ray.report.tables import Table
from ssl_ray.report.write import Report, register_best
from ssl_ray.search.cells import JOURNAL
from ssl_ray.search.proposals import open_journal, status
from ssl_ray.storage.files import write_file
from ssl_ray.tracking.tracker import KEY, NOTE, Tracker
from ssl_ray.tracking.view import picture


def write_search_report(study: Study, tracker: Tracker, folder: Path) -> Report:
    """Write `report.md`, `report.html`, `figures/search.png` and `best.yaml`, and log them with the search's run."""
    parent, config = newest_parent(study, tracker, "search")
    run_id, ran = parent.info.run_id, parse(config, "experiment.yaml in MLflow")
    assert ran.search
    if (journal := tracker.read(run_id, JOURNAL)) is None:
        raise UserError(f"{JOURNAL} of the search {run_id} is not in MLflow yet: run the study first")
    with TemporaryDirectory() as scratch:
        (path := Path(scratch) / JOURNAL).write_bytes(journal)
        kept = open_journal(path, parent.data.tags[KEY], ran.search.mode)
        drawn, search = optuna.create_study(direction=kept.direction), ran.search
        drawn.add_trials(trial for trial in kept.get_trials() if status(trial))
    trials, finished = drawn.get_trials(), drawn.get_trials(states=[TrialState.COMPLETE])
    best = drawn.best_trial if finished else None
    keys = [key for key, one in search.space.items() if len(*one.values()) > 1]
    rows = [_row(trial, keys, trial == best) for trial in trials]
    table = Table(["number", "status", *keys, "last step", search.metric, "note"], rows, 2)
    values: dict[str, Any] = {"study": study, "search": search, "config": config, "best": best, "cells": table}
    values |= {"keys": keys, "statuses": list(map(status, trials)), "importances": {}, "test": None}
    values["fence"] = fence
    if len(finished) >= 20:
        values["importances"] = optuna.importance.get_param_importances(drawn, params=keys)
    files: list[Path] = []
    (folder / "figures").mkdir(parents=True, exist_ok=True)
    if best:
        if keys:
            files = save(partial(_draw, drawn, keys, search.metric), folder / "figures" / "search.png")
        own = resolved(ran, best.user_attrs["cell"]).model_copy(update={"name": f"{study.name}-best"})
        values["yaml"] = dump(own)
        files.append(folder / "best.yaml")
        write_file(files[-1], values["yaml"].encode())
        for run in tracker.runs(kind="trial", key=best.user_attrs["key"])[:1]:
            values["test"] = run.data.metrics.get(f"selected/test/{ORIGINAL_DICE_FOREGROUND}")
            chosen = f"best of {len(finished)} in a search, on validation: {search.metric} {best.value:.3f}"
            register_best(tracker, f"{study.name}-segmenter", run.info.run_id, chosen)
    pages = write_page("search.md.j2", values, folder, f"{study.name}: a search")
    for path in (*pages, *files):
        tracker.attach(run_id, path, "report/figures" if path.suffix == ".png" else "report")
    tried = [picture(run_id, "report/figures/search.png", "what was tried, and what it scored")] if files[1:] else []
    tracker.conclude(run_id, {}, {NOTE: "\n\n".join([*tried, str(table)])})
    return Report(str(table), *pages, tuple(files))


def _draw(drawn: optuna.Study, keys: Sequence[str], metric: str) -> Figure:
    """The last score of each cell over what it had of a key, a panel a key; cells that do not read it are not there."""
    figure, axes = panels(len(keys), 1.9, 0.9, 2, sharey=True)
    markers = {"finished": ("o", "C1"), "stopped": ("x", GREY)}
    for axis, key in zip(axes, keys, strict=True):
        shown = [trial for trial in drawn.get_trials() if trial.value is not None and key in trial.user_attrs["cell"]]
        numbers = all(isinstance(trial.user_attrs["cell"][key], int | float) for trial in shown)
        for name, (marker, colour) in markers.items():
            some = [trial for trial in shown if status(trial) == name]
            x = [value if numbers else str(value) for value in (trial.user_attrs["cell"][key] for trial in some)]
            axis.plot(x, [trial.value for trial in some], marker, color=colour, alpha=0.8)
        if any(getattr(trial.distributions.get(key), "log", False) for trial in shown):
            axis.set_xscale("log")
        axis.set_title(key.rpartition(".")[2], loc="left")
    figure.supylabel(metric, fontsize=10)
    dots: dict[str, Any] = {"linestyle": ""}
    handles = [Line2D([], [], label=name, marker=one[0], color=one[1], **dots) for name, one in markers.items()]
    legend_above(figure, handles)
    return figure


def _row(trial: FrozenTrial, keys: list[str], best: bool) -> list[str]:
    mark, own = "**" if best else "", trial.user_attrs.get("cell", {})
    values = [f"{own[key]:.4g}" if isinstance(own.get(key), float) else str(own.get(key, "-")) for key in keys]
    score = "" if trial.value is None else f"{mark}{trial.value:.3f}{mark}"
    notes = literal(trial.user_attrs.get("note", ""))
    return [str(trial.number), status(trial), *map(literal, values), str(trial.last_step or ""), score, notes]
