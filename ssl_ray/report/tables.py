"""The tables: numbers as text, and a word where a number is missing."""

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np

from ssl_ray.evaluate.scores import ORIGINAL_DICE_FOREGROUND, ORIGINAL_HD95, ORIGINAL_SURFACE_DICE, PUBLISHED_DICE
from ssl_ray.report.comparison import (
    FALSE_POSITIVES,
    FOREGROUND,
    HD95,
    MISSED,
    SELECTION,
    SURFACE_DICE,
    WITH_BACKGROUND,
    Measure,
    matrix,
)
from ssl_ray.report.page import literal
from ssl_ray.report.results import Curves, Results
from ssl_ray.report.statistics import Array, estimate
from ssl_ray.search.cells import Cell
from ssl_ray.tracking.client import DEVICE, MlflowRun
from ssl_ray.tracking.tracker import Tracker

_NONE = "n/a"
_FOUND = 0.1
"""Dice of an organ that was found at all: below it curves rise and fall by chance."""


@dataclass(frozen=True)
class Table:
    """A table whose cells are Markdown."""

    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    text_columns: int = 0
    """The first columns hold text and are aligned left; the others hold numbers and are aligned right."""

    def __str__(self) -> str:
        """Markdown, padded so that it reads well as plain text."""
        cells = [[cell.replace("|", "\\|") for cell in row] for row in (self.header, *self.rows)]
        widths = [max(3, *map(len, column)) for column in zip(*cells, strict=True)]
        columns = [(width, "<" if place < self.text_columns else ">") for place, width in enumerate(widths)]
        layout = " | ".join(f"{{:{align}{width}}}" for width, align in columns)
        under = ["-" * (width - 1) + ("-" if align == "<" else ":") for width, align in columns]
        return "\n".join(f"| {layout.format(*row)} |" for row in (cells[0], under, *cells[1:]))


def published_table(results: Results) -> Table:
    """Dice with background in percent, as published, and its paired difference."""
    rows = [[str(size), *_compared(results, size, WITH_BACKGROUND)] for size in results.arms]
    return Table([f"{results.labelled}s", *_header(results)], rows)


def running_table(results: Results) -> Table:
    """Dice as the tutorial's script averages it, in percent."""
    metric, rows = f"selected/{results.part}/{PUBLISHED_DICE}", []
    for size, arms in results.arms.items():
        row = [str(size)]
        for arm in arms.values():
            values = [[arm.trials[run].metrics.get(metric, np.nan)] for run in results.common[size].runs if arm.trials]
            row.append(_mean(WITH_BACKGROUND, np.array(values).reshape(-1, 1)) if arm.trials else arm.hole)
        rows.append(row)
    return Table([f"{results.labelled}s", *results.inits], rows)


def honest_table(results: Results) -> Table:
    """Every measure of the organs on the original grid, and the paired differences."""
    labels = {
        "Dice": FOREGROUND,
        f"surface Dice at {results.study.finetune.surface_tolerance:g} mm": SURFACE_DICE,
        "missed organs (%, lower is better)": MISSED,
        "HD95 of found organs (mm, lower is better)": HD95,
        "false-positive organs a volume (lower is better)": FALSE_POSITIVES,
    }
    rows = [
        [label, str(size), *_compared(results, size, measure)]
        for label, measure in labels.items()
        for size in results.arms
    ]
    return Table(["organs only", f"{results.labelled}s", *_header(results)], rows, 1)


def organ_table(results: Results, size: int) -> Table:
    """Every organ on the original grid, and how many volumes have it."""
    inits = results.inits
    columns = [*inits, "difference"] if len(inits) == 2 else inits
    header = ["organ", "volumes", *(f"Dice {name}" for name in columns)]
    header += [f"{label} {init}" for label in ("missed (%)", "HD95 (mm)", "false positive (%)") for init in inits]
    arms = results.arms[size]
    cases = next((trial.cases[results.part] for arm in arms.values() for trial in arm.trials.values()), ())
    rows = []
    for number, organ in enumerate(results.organs):
        row = [literal(organ), str(sum(FOREGROUND.organ(number).of(case) is not None for case in cases))]
        for measure in (FOREGROUND, MISSED, HD95, FALSE_POSITIVES):
            one = measure.organ(number)
            found = {init: results.matrix(size, init, one) for init in inits if arms[init].trials}
            row += [_mean(one, found[init]) if init in found else arms[init].hole for init in inits]
            if measure is FOREGROUND and len(inits) == 2:
                difference = results.difference(size, one)
                row.append(_NONE if np.isnan(difference) else measure.signed(difference))
        rows.append(row)
    return Table(header, rows, 1)


def cell_table(results: Results) -> Table:
    """Every cell of the grid; the chosen learning rates are bold."""
    reported = {ORIGINAL_DICE_FOREGROUND: FOREGROUND, ORIGINAL_HD95: HD95, ORIGINAL_SURFACE_DICE: SURFACE_DICE}
    names = {SELECTION: FOREGROUND} | {f"selected/{results.part}/{name}": one for name, one in reported.items()}
    chosen = {trial.cell for arm in results.chosen for trial in arm.trials.values()}
    rows = []
    for trial in results.trials:
        cell, mark = trial.cell, "**" if replace(trial.cell, fold=None) in chosen else ""
        status = trial.status if trial.status == "finished" else f"**{trial.status}**"
        step = f"{trial.metrics['selected/step']:,.0f}" if "selected/step" in trial.metrics else ""
        scores = [one.value(trial.metrics[name]) if name in trial.metrics else "" for name, one in names.items()]
        rows.append([str(cell.size), cell.init, f"{mark}{cell.lr:g}{mark}", _run(cell), status, step, *scores])
    header = [f"{results.labelled}s", "initialisation", "learning rate", "run", "status", "selected step"]
    header += ["Dice, validation, resampled grid (selects)"]
    header += [f"{label}, {results.part}" for label in ("Dice", "HD95 (mm)", "surface Dice")]
    return Table(header, rows, 5)


def fall_table(results: Results, curves: Curves) -> Table:
    """Organs whose Dice on validation rose and ended at less than half of its best, a row for every such training."""
    trials = {trial.cell: trial for trial in results.trials}
    rows = []
    for organ, by_cell in zip(results.organs, curves, strict=True):
        for cell, curve in by_cell.items():
            best, last = max(curve, key=curve.__getitem__), max(curve)
            if curve[best] >= _FOUND and curve[last] < curve[best] / 2:
                selected = int(trials[cell].metrics.get("selected/step", last))
                row = [literal(organ), str(cell.size), cell.init, _run(cell), f"{curve[best]:.3f} at step {best:,}"]
                rows.append([*row, *(f"{curve[step]:.3f}" for step in (selected, last))])
    header = ["organ", f"{results.labelled}s", "initialisation", "run", "best Dice", "where selected", "at the end"]
    return Table(header, rows, 3)


def _run(cell: Cell) -> str:
    return str(cell.run) if cell.fold is None else f"{cell.run}, fold {cell.fold}"


def effort_table(results: Results, tracker: Tracker) -> Table:
    """Hours in which trainings ran: a row for each stage and kind of device, of the runs that the report is about."""
    trials = {run.info.run_id: run for run in tracker.runs(kind="trial")}
    runs = [("pretraining", one.run) for one in results.pretraining]
    runs += [("fine-tuning", trials[one.run_id]) for one in results.trials if one.run_id]
    found = defaultdict(list)
    for stage, run in runs:
        if hours := _hours(run, tracker):
            unit, count = _units(run)
            found[stage, run.data.tags.get(DEVICE, "not recorded"), unit].append((hours, hours * count))
    rows = []
    for (stage, device, unit), each in found.items():
        hours, of_units = map(sum, zip(*each, strict=True))
        rows.append([stage, literal(device), str(len(each)), f"{hours:.2f}", f"{of_units:.2f} {unit} hours"])
    return Table(["what", "device", "trainings", "hours", "times GPUs, or else cores"], rows, 2)


def _hours(run: MlflowRun, tracker: Tracker) -> float:
    """From every start of a training to the last record before the next one: what lay between did not run."""
    starts = sorted(point.timestamp for point in tracker.points(run.info.run_id, "system/started_at"))
    times = [point.timestamp for name in ("lr", "selected/step") for point in tracker.points(run.info.run_id, name)]
    within = [[time - start for time in times if start <= time < end] for start, end in pairwise([*starts, math.inf])]
    return sum(max(since, default=0) for since in within) / 3.6e6


def _units(run: MlflowRun) -> tuple[str, float]:
    """What a training is counted in, and how many it had."""
    params, workers = run.data.params, run.data.metrics.get("system/workers", 1.0)
    if "finetune.gpus_per_trial" in params:
        gpus, cores = (float(params[f"finetune.{kind}_per_trial"]) for kind in ("gpus", "cpus"))
    else:
        gpus = workers * (params.get("pretrain.gpu") == "True")
        cores = workers * float(params.get("pretrain.cpus_per_worker", 1))
    return ("GPU", gpus) if gpus else ("core", cores)


def over_runs(results: Results, size: int, init: str, measure: Measure) -> str:
    """Mean over runs and patients, with the standard deviation of the runs, or the word for why there is none."""
    arm = results.arms[size].get(init)
    if arm is None:
        return "not in the grid"
    return _mean(measure, results.scores(size, measure)[init]) if arm.trials else arm.hole


def _mean(measure: Measure, values: Array) -> str:
    """Of (runs, patients), nan where there is no score."""
    values = values[~np.isnan(values).all(1)]
    if not values.size:
        return _NONE
    by_run = np.nanmean(values, 1)
    text = measure.value(float(np.nanmean(values)))
    return f"{text} ± {measure.value(float(by_run.std(ddof=1)))}" if len(by_run) > 1 else text


def _header(results: Results) -> list[str]:
    header = ["runs", f"{results.part} {results.subjects}s", "random", "pretrained", "difference (95 % CI)"]
    return [*header, "permuted"] if results.controls else header


def _compared(results: Results, size: int, measure: Measure) -> list[str]:
    """Numbers of runs and patients, random, pretrained, their difference, the control; a missing arm says why."""
    common = results.common[size]
    patients = len(common.patients) + (len(common.healthy) if measure.absent else 0)
    shown = [over_runs(results, size, init, measure) for init in ("random", "pretrained")]
    row = [str(len(common.runs)), str(patients), *shown, _difference(results, size, measure)]
    if control := results.controls.get(size):
        lost = [str(run) for run in common.runs if run not in control.trials]
        if lost:
            return [*row, f"no run {', '.join(lost)}"]
        unscored = np.isnan(sum(results.scores(size, measure).values()))  # in the other arms
        row += [_mean(measure, np.where(unscored, np.nan, matrix(control, common, results.part, measure)))]
    return row


def _difference(results: Results, size: int, measure: Measure) -> str:
    """Pretrained minus random; with its interval where the matrix has no holes."""
    if np.isnan(difference := results.difference(size, measure)):
        return _NONE
    scores, mean = results.scores(size, measure), measure.signed(difference)
    found = estimate(scores["pretrained"] - scores["random"])
    return mean if np.isnan(found.low) else f"{mean} ({measure.signed(found.low)} to {measure.signed(found.high)})"
