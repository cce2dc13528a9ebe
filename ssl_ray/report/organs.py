"""What happens to each organ: its Dice in both arms, their difference over labels, and its curve on validation."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from ssl_ray.evaluate.scores import organ_keys
from ssl_ray.report.measures import FOREGROUND
from ssl_ray.report.page import literal
from ssl_ray.report.results import Results
from ssl_ray.report.statistics import Array
from ssl_ray.report.style import COLOUR, LINE, MARKER, end, ink, legend_above, panels
from ssl_ray.report.tables import Table
from ssl_ray.report.trials import means
from ssl_ray.search.cells import Cell
from ssl_ray.tracking.tracker import Tracker

Curves = Mapping[Cell, Sequence[Mapping[int, float]]]
"""Dice on validation, canonical grid, by step: an organ each, for every run of the chosen learning rates."""


def read_curves(results: Results, tracker: Tracker) -> Curves:
    """Means over the folds of a run, where it has some; empty where a trial has not logged them."""
    metrics = [f"validation/dice/{key}" for key in organ_keys(results.organs)]
    curves = {}
    for cell in (trial.cell for arm in results.chosen for trial in arm.trials.values()):
        ids = [trial.run_id for trial in results.trials if replace(trial.cell, fold=None) == cell and trial.run_id]
        curves[cell] = [means([tracker.history(run_id, metric) for run_id in ids]) for metric in metrics]
    return curves


_FOUND = 0.1
"""Dice of an organ that was found at all: below it curves rise and fall by chance."""


def fall_table(results: Results, curves: Curves) -> Table:
    """Organs whose Dice on validation rose and ended at less than half of its best, a row for every run of such."""
    chosen = {trial.cell: trial for arm in results.chosen for trial in arm.trials.values()}
    rows = []
    for place, organ in enumerate(results.organs):
        for cell, curve in _curves_of(curves, place).items():
            best, last = max(curve, key=curve.__getitem__), max(curve)
            if curve[best] >= _FOUND and curve[last] < curve[best] / 2:
                selected = int(chosen[cell].metrics.get("selected/step", last))
                row = [literal(organ), str(cell.size), cell.init, str(cell.run), f"{curve[best]:.3f} at step {best:,}"]
                rows.append([*row, *(f"{curve[step]:.3f}" for step in (selected, last))])
    header = ["organ", f"{results.labelled}s", "initialisation", "run", "best Dice", "where selected", "at the end"]
    return Table(header, rows, 3)


def _curves_of(curves: Curves, organ: int) -> dict[Cell, Mapping[int, float]]:
    return {cell: organs[organ] for cell, organs in curves.items() if organs and organs[organ]}


def draw_levels(results: Results) -> Figure:
    """Dice of every organ on the original grid: a panel a size, a marker an initialisation, a dot a run."""
    count, columns = len(results.arms), min(3, len(results.arms))
    rows = -(-count // columns)
    height = 0.7 + (0.6 + 0.22 * len(results.organs)) * rows
    figure, axes = panels(height, rows, columns, sharex=True, sharey=True)
    for axis, (size, arms) in zip(axes, results.arms.items(), strict=False):
        for shift, (init, arm) in zip((-0.15, 0.15), arms.items(), strict=False):
            for place in range(len(results.organs) if arm.trials else 0):
                scores = results.matrix(size, init, FOREGROUND.organ(place))
                scores = scores[~np.isnan(scores).all(1)]
                if len(scores) > 1:
                    axis.plot(np.nanmean(scores, 1), [place + shift] * len(scores), ".", color=ink(), markersize=3)
                if scores.size:
                    axis.plot(np.nanmean(scores), place + shift, MARKER[init], color=COLOUR[init], markersize=5)
        axis.set_title(f"n = {size}", loc="left")
        axis.set(xlim=(0, 1), xticks=[0, 0.5, 1], xticklabels=["0", "0.5", "1"])
    _name_organs(axes[0], results)
    end(axes, count, columns)
    figure.supxlabel(f"Dice; n: {results.labelled}s", fontsize=10)
    dots: dict[str, Any] = {"linestyle": "", "markersize": 6}
    legend_above(
        figure, [Line2D([], [], label=init, color=COLOUR[init], marker=MARKER[init], **dots) for init in results.inits]
    )
    return figure


def differences(results: Results) -> Array:
    """Dice on the original grid, pretrained minus random: (organs, sizes), nan where an arm has no score."""
    found = np.full((len(results.organs), len(results.arms)), np.nan)
    for column, size in enumerate(results.arms):
        for row in range(len(results.organs)):
            scores = results.scores(size, FOREGROUND.organ(row))
            if len(scores) == 2 and not np.isnan(scores["random"]).all():
                found[row, column] = np.nanmean(scores["pretrained"] - scores["random"])
    return found


def draw_map(results: Results) -> Figure:
    """Their difference, organs down and labelled volumes across: orange where random is better, blue pretrained."""
    values = differences(results)
    figure, (axis,) = panels(0.8 + 0.27 * len(values))
    most = max(0.05, float(np.nanmax(np.abs(values), initial=0)))
    colours = LinearSegmentedColormap.from_list("", [COLOUR["random"], axis.get_facecolor(), COLOUR["pretrained"]])
    image = axis.imshow(values, cmap=colours, vmin=-most, vmax=most, aspect="auto")
    for (row, column), value in np.ndenumerate(values):
        text = "n/a" if np.isnan(value) else FOREGROUND.signed(value)
        brightness = np.dot(image.to_rgba(value)[:3], (0.3, 0.59, 0.11))
        colour = ink() if np.isnan(value) else "black" if brightness > 0.5 else "white"
        axis.text(column, row, text, ha="center", va="center", color=colour)
    axis.set_xticks(range(len(results.arms)), [str(size) for size in results.arms])
    axis.set_xlabel(f"{results.labelled}s")
    axis.grid(visible=False)
    _name_organs(axis, results)
    return figure


def draw_curves(results: Results, curves: Curves) -> Figure:
    """Dice on validation over steps at the primary number of labelled volumes: a panel an organ, a line a run."""
    rows = -(-len(results.organs) // 2)
    figure, axes = panels(0.8 + 1.15 * rows, rows, 2, sharex=True, sharey=True)
    for place, (axis, organ) in enumerate(zip(axes, results.organs, strict=False)):
        for cell, curve in _curves_of(curves, place).items():
            if cell.size == results.primary:
                axis.plot(*zip(*curve.items(), strict=True), linewidth=1.4, **LINE[cell.init])
        axis.set_title(_shortened(organ), loc="left")
        axis.set(ylim=(0, 1), yticks=[0, 0.5, 1])
        axis.xaxis.set_major_locator(MaxNLocator(3, integer=True))
    end(axes, len(results.organs), 2)
    figure.supxlabel("step", fontsize=10)
    legend_above(figure, [Line2D([], [], label=init, **LINE[init]) for init in results.inits])
    return figure


def _name_organs(axis: Any, results: Results) -> None:
    axis.set_yticks(range(len(results.organs)), [_shortened(organ) for organ in results.organs])
    axis.set_ylim(len(results.organs) - 0.5, -0.5)


def _shortened(name: str) -> str:
    return name if len(name) <= 22 else f"{name[:21]}…"
