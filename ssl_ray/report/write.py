"""From MLflow alone: does pretraining help, and at how many labelled volumes? One page in Markdown and in HTML."""

import math
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

from ssl_ray.config.schema import Study
from ssl_ray.report.answers import answers, count_of, verdict
from ssl_ray.report.effort import effort_table
from ssl_ray.report.examples import read_examples
from ssl_ray.report.figures import draw_figures
from ssl_ray.report.measures import FOREGROUND
from ssl_ray.report.organs import fall_table, read_curves
from ssl_ray.report.page import TEMPLATES, literal, to_html
from ssl_ray.report.results import Results, read_results
from ssl_ray.report.show import register_networks, show_answer
from ssl_ray.report.tables import cell_table, honest_table, organ_table, over_runs, published_table, running_table
from ssl_ray.text import without_password
from ssl_ray.tracking.tracker import NOTE, Tracker


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
    found, honest = answers(results), honest_table(results)
    values: dict[str, Any] = {
        "study": study,
        "tracker": tracker,
        "results": results,
        "answers": found,
        "honest": honest,
        "published": published_table(results),
        "running": running_table(results),
        "organs": {size: organ_table(results, size) for size in results.arms},
        "cells": cell_table(results),
        "examples": examples,
        "falls": fall_table(results, curves),
        "effort": effort_table(results, tracker),
        "dice_of": partial(over_runs, results, measure=FOREGROUND),
        "figures": {path.stem for path in figures},
    }
    values |= {function.__name__: function for function in (count_of, day, literal, without_password)}
    markdown, html = folder / "report.md", folder / "report.html"
    text = TEMPLATES.get_template("report.md.j2").render(values)
    markdown.write_text(text, encoding="utf-8")
    html.write_text(to_html(text, folder, f"{study.name}: does pretraining help?"), encoding="utf-8")
    for path in (markdown, html, *figures):
        tracker.attach(results.grid.info.run_id, path, "report/figures" if path in figures else "report")
    _log_answers(results, tracker, show_answer(results, tracker, found, honest, folder))
    register_networks(results, tracker)
    table = TEMPLATES.get_template("terminal.md.j2").render(values)
    return Report(table.rstrip(), markdown, html, figures)


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


def day(milliseconds: int | None) -> str:
    """MLflow's time stamp in UTC, e.g. `2026-01-31 17:05 UTC`."""
    if milliseconds is None:
        return "not ended"
    return datetime.fromtimestamp(milliseconds / 1000, UTC).strftime("%Y-%m-%d %H:%M UTC")
