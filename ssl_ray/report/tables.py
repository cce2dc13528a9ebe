"""The tables: numbers as text, and a word where a number is missing."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ssl_ray.evaluate.scores import PUBLISHED_DICE, organ_keys
from ssl_ray.report.measures import FOREGROUND, HD95, SURFACE_DICE, WITH_BACKGROUND, Measure
from ssl_ray.report.page import literal
from ssl_ray.report.results import SELECTION, Arm, Results

_NONE = "n/a"


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
    rows = [[str(split), *_compared(results, split, WITH_BACKGROUND)] for split in results.arms]
    return Table(["training volumes", f"{results.part} volumes", "random", "pretrained", "difference (95 % CI)"], rows)


def running_table(results: Results) -> Table:
    """Dice as the tutorial's script averages it, in percent."""
    metric = results.metric(PUBLISHED_DICE)
    rows = [
        [str(split), *(over_seeds(arm, metric, WITH_BACKGROUND) for arm in arms.values())]
        for split, arms in results.arms.items()
    ]
    return Table(["training volumes", *results.inits], rows)


def honest_table(results: Results) -> Table:
    """Foreground Dice, HD95 and surface Dice on the original grid, and their paired differences."""
    labels = {
        "Dice": FOREGROUND,
        "HD95 (mm, lower is better)": HD95,
        f"surface Dice at {results.study.finetune.surface_tolerance:g} mm": SURFACE_DICE,
    }
    rows = [
        [label, str(split), *_compared(results, split, measure)]
        for label, measure in labels.items()
        for split in results.arms
    ]
    header = ["organs only", "training volumes", f"{results.part} volumes", "random", "pretrained"]
    return Table([*header, "difference (95 % CI)"], rows, 1)


def organ_table(results: Results, split: int) -> Table:
    """Dice and HD95 of every organ on the original grid, and how many volumes have it."""
    arms = results.arms[split].values()
    scored = next((trial.cases[results.part] for arm in arms for trial in arm.trials), ())
    columns = [*results.inits, "difference"] if len(arms) == 2 else results.inits
    header = ["organ", "volumes", *(f"Dice {name}" for name in columns), *(f"HD95 (mm) {name}" for name in columns)]
    rows = []
    for number, (organ, key) in enumerate(zip(results.organs, organ_keys(results.organs), strict=True)):
        present = sum(case.original_dice is not None and case.original_dice[number] is not None for case in scored)
        row = [literal(organ), str(present)]
        for measure in (FOREGROUND, HD95):
            metric = results.metric(f"{measure.field}/{key}")
            row += [over_seeds(arm, metric, measure) for arm in arms]
            means = [float(np.mean(values)) for arm in arms if (values := arm.seeds(metric))]
            if len(arms) == 2:
                row.append(measure.signed(means[1] - means[0]) if len(means) == 2 else _NONE)
        rows.append(row)
    return Table(header, rows, 1)


def cell_table(results: Results) -> Table:
    """Every cell of the grid; the chosen learning rates are bold."""
    measures = {SELECTION: FOREGROUND} | {results.metric(one.name): one for one in (FOREGROUND, HD95, SURFACE_DICE)}
    chosen = {trial.cell for arm in results.chosen for trial in arm.trials}
    rows = []
    for trial in results.trials:
        cell, mark = trial.cell, "**" if trial.cell in chosen else ""
        status = trial.status if trial.status == "finished" else f"**{trial.status}**"
        step = f"{trial.metrics['selected/step']:,.0f}" if "selected/step" in trial.metrics else ""
        scores = [one.value(trial.metrics[name]) if name in trial.metrics else "" for name, one in measures.items()]
        rows.append([str(cell.size), cell.init, f"{mark}{cell.lr:g}{mark}", str(cell.run), status, step, *scores])
    header = ["training volumes", "initialisation", "learning rate", "seed", "status", "selected step"]
    header += ["Dice, validation, resampled grid (selects)"]
    header += [f"{label}, {results.part}" for label in ("Dice", "HD95 (mm)", "surface Dice")]
    return Table(header, rows, 5)


def over_seeds(arm: Arm, metric: str, measure: Measure) -> str:
    """Mean over seeds with its standard deviation, or the word for why there is none."""
    if not arm.trials:
        return arm.hole
    values = arm.seeds(metric)
    if not values:
        return _NONE
    text = measure.value(float(np.mean(values)))
    if len(values) > 1:
        text += f" ± {measure.value(float(np.std(values, ddof=1)))}"
    return text if len(arm.trials) == arm.expected else f"{text} ({len(arm.trials)} of {arm.expected} seeds)"


def _compared(results: Results, split: int, measure: Measure) -> list[str]:
    """Number of volumes, random, pretrained, and their difference; an arm that the grid does not have says so."""
    arms, metric = results.arms[split], results.metric(measure.name)
    shown = [
        over_seeds(arms[init], metric, measure) if init in arms else "not in the grid"
        for init in ("random", "pretrained")
    ]
    found = results.compare(split, measure)
    if found is None:
        difference = _NONE
    else:
        bounds = f"{measure.signed(found.low)} to {measure.signed(found.high)}"
        difference = f"{measure.signed(found.mean)} ({'one volume' if np.isnan(found.low) else bounds})"
    return [str(results.count(results.part)), *shown, difference]
