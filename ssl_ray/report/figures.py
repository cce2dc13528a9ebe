"""The report's figures: matplotlib's object interface only, no pyplot and no global state.

Colours are Okabe and Ito's, which colour-blind readers can tell apart; markers and dashes say the same once more.
"""

from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from ssl_ray.report.answers import is_clear
from ssl_ray.report.measures import FOREGROUND
from ssl_ray.report.results import Results
from ssl_ray.report.statistics import estimate
from ssl_ray.report.trials import PretrainingRun

_COLOUR = {"random": "#E69F00", "pretrained": "#0072B2"}
_LINE: dict[str, dict[str, Any]] = {
    "random": {"color": _COLOUR["random"], "linestyle": (0, (4, 2))},
    "pretrained": {"color": _COLOUR["pretrained"], "linestyle": "solid"},
}
_MARKER = {"random": "s", "pretrained": "o"}
_HATCH = {"random": "///", "pretrained": ""}


def draw_figures(results: Results, folder: Path) -> tuple[Path, ...]:
    """Write every figure for which there is something to show, and the last picture of a patch, as PNG -> paths."""
    folder.mkdir(parents=True, exist_ok=True)
    figures: dict[str, Figure | bytes | None] = {}
    if results.chosen:
        figures["label_efficiency"] = _label_efficiency(results)
        figures["organs"] = _organs(results) if results.organs else None
        figures["finetuning"] = _finetuning(results)
    for pretraining in results.pretraining:
        figures[f"pretraining{pretraining.suffix}"] = _pretraining(pretraining)
        figures[f"restored{pretraining.suffix}"] = pretraining.picture
    drawn = {folder / f"{name}.png": figure for name, figure in figures.items() if figure}
    for path, figure in drawn.items():
        if isinstance(figure, bytes):
            path.write_bytes(figure)
        else:
            figure.savefig(path, dpi=150, metadata={"Software": None})
    return tuple(drawn)


def _label_efficiency(results: Results) -> Figure:
    """Left: foreground Dice over labelled volumes, a line an initialisation. Right: their paired difference."""
    sizes = list(results.arms)
    figure, axes = _panels(4, columns=2 if results.comparisons else 1)
    width = max(sizes) - min(sizes) or 1
    _draw_dice(axes[0], results, width)
    if results.comparisons:
        _draw_differences(axes[1], results, width)
    for axis in axes:
        axis.set(xlabel=f"{results.labelled}s", xticks=sizes)
        axis.set_xlim(min(sizes) - 0.1 * width, max(sizes) + 0.1 * width)
    return figure


def _draw_dice(axis: Any, results: Results, width: int) -> None:
    """Means, with intervals over runs and patients where there are several; a dot for each run beside the mean."""
    scores = {size: results.scores(size, FOREGROUND) for size in results.arms}
    for shift, init in zip((-0.012, 0.012), results.inits, strict=False):
        drawn = {size: found[init] for size, found in scores.items() if init in found and found[init].size}
        x = [size + shift * width for size in drawn]
        means = [estimate(values) for values in drawn.values()]
        errors = np.nan_to_num([one.high - one.mean for one in means])
        style = _LINE[init] | {"marker": _MARKER[init], "linewidth": 2, "elinewidth": 1.2, "capsize": 4}
        axis.errorbar(x, [one.mean for one in means], errors, label=init, **style)
        for values, position in zip(drawn.values(), x, strict=True):
            if len(values) > 1:
                beside = [position + 2 * shift * width] * len(values)
                dots = {"s": 12, "color": _COLOUR[init], "edgecolor": "black", "linewidth": 0.5, "zorder": 3}
                axis.scatter(beside, values.mean(1), **dots)
    axis.set_ylabel(f"foreground Dice, {results.part} {results.subjects}s")
    axis.legend(title="initialisation", frameon=False, loc="best")


def _draw_differences(axis: Any, results: Results, width: int) -> None:
    """A dot for every patient, the mean with its interval, filled where it is clear, and the margin."""
    margin = results.study.finetune.margin
    axis.axhspan(-margin, margin, color="black", alpha=0.07, linewidth=0)
    axis.axhline(0, color="black", linewidth=1)
    mean = {"marker": "D", "color": _COLOUR["pretrained"], "linewidth": 3}
    for size, comparison in results.comparisons.items():
        found, values = comparison.found, comparison.differences.mean(0)
        spread = np.linspace(-0.012, 0.012, len(values)) * width if len(values) > 1 else np.zeros(1)
        axis.scatter(size + spread, values, s=14, color="#8a8a8a", linewidths=0)
        axis.plot([size, size], [found.low, found.high], color=_COLOUR["pretrained"], linewidth=3)
        face = _COLOUR["pretrained"] if is_clear(results, size) else "white"
        axis.plot(size, found.mean, "D", color=_COLOUR["pretrained"], markerfacecolor=face, markersize=9)
    axis.set_ylabel("difference in Dice, pretrained - random")
    handles = [
        Line2D([], [], label=f"one {results.subjects}", marker="o", linestyle="", color="#8a8a8a", markersize=4),
        Line2D([], [], label="mean, 95 % interval: clear", **mean),
        Line2D([], [], label="mean, 95 % interval: not clear", **mean, markerfacecolor="white"),
        Line2D([], [], label=f"margin, {margin:g}", color="#e0e0e0", linewidth=8),
    ]
    axis.legend(handles=handles, frameon=False, fontsize=8.5)


def _organs(results: Results) -> Figure:
    """Dice of every organ on the original grid: a panel a size, a bar an initialisation, a dot a run."""
    figure, axes = _panels(1.1 + 1.9 * len(results.arms), rows=len(results.arms), sharex=True)
    bar = 0.8 / len(results.inits)
    for axis, (size, arms) in zip(axes, results.arms.items(), strict=True):
        for number, (init, arm) in enumerate(arms.items()):
            style = {"color": _COLOUR[init], "hatch": _HATCH[init], "edgecolor": "white"}
            for position in range(len(results.organs) if arm.trials else 0):
                x = position - 0.4 + bar * (number + 0.5)
                scores = results.matrix(size, init, FOREGROUND.organ(position))
                scores = scores[~np.isnan(scores).all(1)]
                if scores.size:
                    axis.bar(x, np.nanmean(scores), bar * 0.94, **style)
                if len(scores) > 1:
                    axis.scatter([x] * len(scores), np.nanmean(scores, 1), s=7, color="black", zorder=3)
        axis.set_title(f"{size} labelled volumes", fontsize=10, loc="left")
        axis.set(ylabel="Dice", ylim=(0, 1))
        axis.grid(axis="x", visible=False)
    crowded = sum(map(len, results.organs)) > 80
    turned = {"rotation": 35, "ha": "right", "rotation_mode": "anchor"} if crowded else {}
    axes[-1].set_xticks(range(len(results.organs)), results.organs, **turned)
    square: dict[str, Any] = {"marker": "s", "markersize": 10, "linestyle": ""}
    _legend_above(figure, [Line2D([], [], label=init, color=_COLOUR[init], **square) for init in results.inits])
    return figure


def _finetuning(results: Results) -> Figure:
    """Foreground Dice on validation over steps: a panel a size, a line a run, and the selected checkpoint."""
    count = len(results.arms)
    columns = min(3, count)
    rows = -(-count // columns)
    figure, axes = _panels(0.5 + 2.9 * rows, rows, columns, sharey=True, sharex=True)
    for number, (axis, (size, arms)) in enumerate(zip(axes, results.arms.items(), strict=False)):
        for init, arm in arms.items():
            for trial in arm.trials.values():
                axis.plot(*zip(*trial.curve.items(), strict=True), linewidth=1.6, **_LINE[init])
                selected = int(trial.metrics.get("selected/step", -1))
                if selected in trial.curve:
                    style = {"color": _COLOUR[init], "markeredgecolor": "black", "markersize": 5.5}
                    axis.plot(selected, trial.curve[selected], "v", **style)
        axis.set_title(f"{size} labelled volumes", fontsize=10)
        last = number + columns >= count
        axis.set(xlabel="step" if last else "", ylabel="" if number % columns else "foreground Dice, validation")
        axis.tick_params(labelbottom=last)
        axis.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    for axis in axes[count:]:
        axis.set_axis_off()
    handles = [Line2D([], [], label=init, linewidth=1.8, **_LINE[init]) for init in results.inits]
    selected_checkpoint = {"color": "black", "marker": "v", "linestyle": "", "markersize": 6}
    _legend_above(figure, [*handles, Line2D([], [], label="selected checkpoint", **selected_checkpoint)])
    return figure


def _pretraining(pretraining: PretrainingRun) -> Figure:
    """Training and validation loss over steps, and the loss of a prediction that nothing was learned for."""
    figure, (axis,) = _panels(3.6)
    axis.plot(*zip(*pretraining.loss.items(), strict=True), color="#9a9a9a", linewidth=1, label="training")
    marker = "o" if len(pretraining.validation_loss) < 40 else ""
    style: dict[str, Any] = {"color": _COLOUR["pretrained"], "linewidth": 2, "marker": marker, "markersize": 4}
    axis.plot(*zip(*pretraining.validation_loss.items(), strict=True), label="validation", **style)
    if pretraining.baseline_loss:
        step, level = max(pretraining.baseline_loss.items())
        axis.plot([0, step], [level] * 2, "--", color="#D55E00", linewidth=1.6, label="validation, nothing learned")
    axis.set(xlabel="step", ylabel="loss")
    axis.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    axis.set_xlim(left=0)
    axis.set_ylim(bottom=0)
    axis.legend(frameon=False, loc="upper right")
    return figure


def _panels(height: float, rows: int = 1, columns: int = 1, **shared: Any) -> tuple[Figure, list[Any]]:
    """A figure of the page's width, its height in inches, and its axes row by row."""
    figure = Figure(figsize=(9.6, height), layout="constrained")
    axes = [*figure.subplots(rows, columns, squeeze=False, **shared).flat]
    for axis in axes:
        axis.grid(alpha=0.3)
        axis.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _legend_above(figure: Figure, handles: list[Line2D]) -> None:
    figure.legend(handles=handles, loc="outside upper center", ncols=len(handles), frameon=False)
