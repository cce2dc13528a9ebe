"""From MLflow alone: does pretraining help, and at how many labelled volumes? One page in Markdown and in HTML."""

import csv
import math
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

from ssl_ray.config.schema import Study
from ssl_ray.console import say
from ssl_ray.evaluate.scores import ORIGINAL_DICE_FOREGROUND
from ssl_ray.report import tables
from ssl_ray.report.answers import answers, verdict
from ssl_ray.report.comparison import FOREGROUND, SELECTION
from ssl_ray.report.examples import read_examples
from ssl_ray.report.figures import draw_figures
from ssl_ray.report.page import TEMPLATES, code, fence, literal, write_page
from ssl_ray.report.results import Results, read_curves, read_results
from ssl_ray.storage.files import appearing
from ssl_ray.text import count_of, reason, without_password
from ssl_ray.tracking.client import MlflowException
from ssl_ray.tracking.tracker import NOTE, Tracker
from ssl_ray.tracking.view import picture, run_link


@dataclass(frozen=True)
class Report:
    """Where the report is; `table` is what goes to the terminal, Markdown that reads well as plain text."""

    table: str
    markdown: Path
    html: Path
    files: tuple[Path, ...]
    """Figures, and what else belongs to it."""


def write_report(study: Study, tracker: Tracker, folder: Path) -> Report:
    """Write `report.md`, `report.html` and `figures/*.png`; log them, and the answers, with the grid's MLflow run.

    A cell that is missing or failed is named where its number would stand. Nothing is read but MLflow.

    Raises:
        UserError: when MLflow has no experiment or no grid of this study, or when two cells that are compared computed
            in different precisions.
    """
    results = read_results(study, tracker)
    curves, examples = read_curves(results, tracker), read_examples(results, tracker)
    figures = draw_figures(results, curves, examples, folder / "figures")
    found, honest = answers(results), tables.honest_table(results)
    values: dict[str, Any] = {
        "study": study,
        "tracker": tracker,
        "results": results,
        "answers": found,
        "honest": honest,
        "published": tables.published_table(results),
        "running": tables.running_table(results),
        "organs": {size: tables.organ_table(results, size) for size in results.arms},
        "cells": tables.cell_table(results),
        "examples": examples,
        "falls": tables.fall_table(results, curves),
        "effort": tables.effort_table(results, tracker),
        "dice_of": partial(tables.over_runs, results, measure=FOREGROUND),
        "figures": {path.stem for path in figures},
    }
    values |= {function.__name__: function for function in (code, count_of, day, fence, literal, without_password)}
    pages = write_page("report.md.j2", values, folder, f"{study.name}: does pretraining help?")
    for path in (*pages, *figures):
        tracker.attach(results.grid.info.run_id, path, "report/figures" if path in figures else "report")
    _log_answers(results, tracker, _show_answer(results, tracker, found, honest, folder))
    _register_networks(results, tracker)
    table = TEMPLATES.get_template("terminal.md.j2").render(values)
    return Report(table.rstrip(), *pages, figures)


def _show_answer(results: Results, tracker: Tracker, found: Sequence[str], table: tables.Table, folder: Path) -> str:
    """Log `answer.csv` and the figure with the grid's run, describe the experiment -> the run's description."""
    run_id, figure = results.grid.info.run_id, folder / "figures" / "label_efficiency.png"
    with appearing(folder / "answer.csv") as part, part.open("w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows([table.header, *([cell.replace("*", "") for cell in row] for row in table.rows)])
    tracker.attach(run_id, folder / "answer.csv")
    text = ["\n".join(f"- {answer}" for answer in found)]
    if figure.is_file():
        tracker.attach(run_id, figure)
        text.append(picture(run_id, figure.name, f"foreground Dice over {results.labelled}s"))
    comparison = tracker.link("").lstrip("/")
    whole = f"{comparison.partition('?')[0]}/{run_id}/artifacts/report/report.html"
    links = [f"[the whole report]({whole})", f"[all trials compared]({comparison})"]
    links += [
        run_link(one.run.info.run_id, f"pretraining{one.suffix.replace('_', ' ')}") for one in results.pretraining
    ]
    text.append(" · ".join(links))
    tracker.describe("\n\n".join([f"**Does pretraining help, and at how many {results.labelled}s?**", *text]))
    return "\n\n".join([*text, str(table)])


def _log_answers(results: Results, tracker: Tracker, description: str) -> None:
    """Metrics like `answer/n06/difference` and tags like `answer/n06`; the tag `answer` is the primary question's."""
    # Always given, so that the tracker replaces old answers where nothing can be compared any more.
    metrics: dict[str, float] = {"answer/sizes": float(len(results.comparisons))}
    for size, found in results.comparisons.items():
        over = results.common[size]
        numbers = {"difference": found.found.mean, "low": found.found.low, "high": found.found.high}
        numbers |= {"p_holm": found.adjusted, "runs": len(over.runs), "patients": len(over.patients)}
        if found.worth:
            worth = {"": found.worth.point, "_low": found.worth.low, "_high": found.worth.high}
            numbers |= {f"times_labels{end}": value for end, value in worth.items()}
        metrics |= {f"answer/n{size:02d}/{name}": float(value) for name, value in numbers.items()}
    tags = {f"answer/n{size:02d}": "".join(verdict(results, size)) for size in results.arms}
    tags |= {"answer": tags[f"answer/n{results.primary:02d}"], NOTE: description}
    known = {name: value for name, value in metrics.items() if math.isfinite(value)}
    tracker.conclude(results.grid.info.run_id, known, tags)


def _register_networks(results: Results, tracker: Tracker) -> None:
    """Register the network and the encoder that did best on validation, under names of the study."""
    study, part = results.study.name, f"selected/{results.part}/{ORIGINAL_DICE_FOREGROUND}"
    trained = [trial for trial in results.finished if trial.run_id and SELECTION in trial.metrics]
    if trained:
        best = max(trained, key=lambda trial: trial.metrics[SELECTION])
        score = f"foreground Dice {best.metrics.get(part, float('nan')):.3f} on {results.part}, original grid"
        chosen = f"best of {len(trained)} on validation ({best.metrics[SELECTION]:.3f})"
        register_best(tracker, f"{study}-segmenter", str(best.run_id), f"{best.cell.label}: {chosen}; {score}")
    losses = {one.run.info.run_id: one.run.data.metrics.get("best_validation_loss") for one in results.pretraining}
    known = {run_id: loss for run_id, loss in losses.items() if loss is not None}
    if known:
        run_id = min(known, key=known.__getitem__)
        chosen = f"best of {len(known)} on validation: loss {known[run_id]:.4f}"
        register_best(tracker, f"{study}-encoder", run_id, chosen)


def register_best(tracker: Tracker, name: str, run_id: str, description: str) -> None:
    """Make a run's model the best version of a registered one; a server without a registry is told, and no more."""
    kind = "Segmentation networks" if name.endswith("segmenter") else "Pretrained encoders"
    about = f"{kind} of the study {tracker.study}. The alias `best` is the one that did best on validation."
    try:
        tracker.register(name, about, run_id, description)
    except MlflowException as error:
        say(f"MLflow's registry does not take {name}: {reason(error)}")


def day(milliseconds: int | None) -> str:
    """MLflow's time stamp in UTC, e.g. `2026-01-31 17:05 UTC`."""
    if milliseconds is None:
        return "not ended"
    return datetime.fromtimestamp(milliseconds / 1000, UTC).strftime("%Y-%m-%d %H:%M UTC")
