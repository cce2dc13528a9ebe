"""The report's figures: matplotlib's object interface only, no pyplot and no global state."""

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from ssl_ray.report.answers import is_clear
from ssl_ray.report.comparison import FOREGROUND
from ssl_ray.report.examples import Example, draw_examples
from ssl_ray.report.results import Curves, Results
from ssl_ray.report.statistics import estimate
from ssl_ray.report.style import COLOUR, GREY, LINE, MARKER, ink, legend_above, panels, save
from ssl_ray.report.trials import PretrainingRun, means
from ssl_ray.storage.files import write_file
from ssl_ray.text import count_of


def draw_figures(
    results: Results, curves: Curves, examples: Mapping[str, Sequence[Example]], folder: Path
) -> tuple[Path, ...]:
    """Write every figure for which there is something to show, and the pictures of volumes and patches -> paths."""
    folder.mkdir(parents=True, exist_ok=True)
    figures: dict[str, Callable[[], Figure]] = {}
    pictures: dict[str, bytes | None] = {
        f"examples_{init}": draw_examples(results, shown) for init, shown in examples.items()
    }
    if results.chosen:
        figures["label_efficiency"] = partial(_label_efficiency, results)
        figures["finetuning"] = partial(_finetuning, results)
        if results.organs and results.comparisons:
            figures["organ_map"] = partial(_organ_map, results)
        if any(curves):
            figures["organ_curves"] = partial(_organ_curves, results, curves)
    for pretraining in results.pretraining:
        figures[f"pretraining{pretraining.suffix}"] = partial(_pretraining, pretraining)
        pictures[f"restored{pretraining.suffix}"] = pretraining.picture
    paths = [path for name, draw in figures.items() for path in save(draw, folder / f"{name}.png")]
    for name, content in pictures.items():
        if content:
            write_file(folder / f"{name}.png", content)
            paths.append(folder / f"{name}.png")
    return tuple(paths)


def _label_efficiency(results: Results) -> Figure:
    """Above: foreground Dice over labelled volumes, a line an initialisation. Below: their paired difference."""
    sizes = list(results.arms)
    figure, axes = panels(2 if results.comparisons else 1, 2.8, 0.4)
    width = max(sizes) - min(sizes) or 1
    _draw_dice(axes[0], results, width)
    if results.comparisons:
        _draw_differences(axes[1], results, width)
    for axis in axes:
        axis.set(xticks=sizes)
        axis.set_xlim(min(sizes) - 0.1 * width, max(sizes) + 0.1 * width)
    axes[-1].set_xlabel(f"{results.labelled}s")
    return figure


def _draw_dice(axis: Any, results: Results, width: int) -> None:
    """Means, with intervals over runs and patients where there are several; a dot for each run beside the mean."""
    scores = {size: results.scores(size, FOREGROUND) for size in results.arms}
    for shift, init in zip((-0.012, 0.012), results.inits, strict=False):
        drawn = {size: found[init] for size, found in scores.items() if init in found and found[init].size}
        x = [size + shift * width for size in drawn]
        means = [estimate(values) for values in drawn.values()]
        errors = np.nan_to_num([one.high - one.mean for one in means])
        style = LINE[init] | {"marker": MARKER[init], "linewidth": 2, "elinewidth": 1.2, "capsize": 4}
        axis.errorbar(x, [one.mean for one in means], errors, label=init, **style)
        for values, position in zip(drawn.values(), x, strict=True):
            if len(values) > 1:
                beside = [position + 2 * shift * width] * len(values)
                dots = {"s": 12, "color": COLOUR[init], "edgecolor": ink(), "linewidth": 0.5, "zorder": 3}
                axis.scatter(beside, values.mean(1), **dots)
    low, high = axis.get_ylim()  # of two runs, an interval may be wider than what Dice can be
    axis.set_ylim(max(low, 0), min(high, 1))
    axis.set_title(f"foreground Dice, {results.part} {results.subjects}s", loc="left")
    axis.legend(loc="best")


def _draw_differences(axis: Any, results: Results, width: int) -> None:
    """A dot for every patient, the mean with its interval, filled where it is clear, and the margin."""
    margin = results.study.finetune.margin
    axis.axhspan(-margin, margin, color=ink(), alpha=0.1, linewidth=0)
    axis.axhline(0, color=ink(), linewidth=1)
    mean: dict[str, Any] = {"marker": "D", "color": COLOUR["pretrained"], "linewidth": 3}
    paper = axis.get_facecolor()
    for size, comparison in results.comparisons.items():
        found, values = comparison.found, comparison.differences.mean(0)
        spread = np.linspace(-0.012, 0.012, len(values)) * width if len(values) > 1 else np.zeros(1)
        axis.scatter(size + spread, values, s=14, color=GREY, linewidths=0)
        axis.plot([size, size], [found.low, found.high], color=COLOUR["pretrained"], linewidth=3)
        face = COLOUR["pretrained"] if is_clear(results, size) else paper
        axis.plot(size, found.mean, "D", color=COLOUR["pretrained"], markerfacecolor=face, markersize=9)
    axis.set_title("difference in Dice, pretrained - random", loc="left")
    handles = [
        Line2D([], [], label=f"one {results.subjects}", marker="o", linestyle="", color=GREY, markersize=4),
        Line2D([], [], label="mean, 95 %: clear", **mean),
        Line2D([], [], label=f"margin, {margin:g}", color=ink(), alpha=0.1, linewidth=8),
        Line2D([], [], label="not clear", **mean, markerfacecolor=paper),
    ]
    axis.legend(handles=handles, ncols=2, loc="upper center", bbox_to_anchor=(0.5, -0.22), columnspacing=1.2)


def _finetuning(results: Results) -> Figure:
    """Foreground Dice on validation over steps: a panel a size, a line a run, and the selected checkpoint."""
    figure, axes = panels(len(results.arms), 1.9, 0.9, min(2, len(results.arms)), sharey=True, sharex=True)
    for axis, (size, arms) in zip(axes, results.arms.items(), strict=True):
        for init, arm in arms.items():
            for trial in arm.trials.values():
                axis.plot(*zip(*trial.curve.items(), strict=True), linewidth=1.6, **LINE[init])
                selected = int(trial.metrics.get("selected/step", -1))
                if selected in trial.curve:
                    style = {"color": COLOUR[init], "markeredgecolor": ink(), "markersize": 5.5}
                    axis.plot(selected, trial.curve[selected], "v", **style)
        axis.set_title(count_of(size, results.labelled), loc="left")
        axis.xaxis.set_major_locator(MaxNLocator(3, integer=True))
    figure.supxlabel("step", fontsize=10)
    figure.supylabel("foreground Dice, validation", fontsize=10)
    handles = [Line2D([], [], label=init, linewidth=1.8, **LINE[init]) for init in results.inits]
    selected_checkpoint = {"color": GREY, "marker": "v", "linestyle": "", "markersize": 6}
    legend_above(figure, [*handles, Line2D([], [], label="selected", **selected_checkpoint)])
    return figure


def _pretraining(pretraining: PretrainingRun) -> Figure:
    """Training and validation loss over steps, and the loss of a prediction that nothing was learned for."""
    figure, (axis,) = panels(1, 2.8, 0)
    axis.plot(*zip(*pretraining.loss.items(), strict=True), color=GREY, linewidth=1, label="training")
    marker = "o" if len(pretraining.validation_loss) < 40 else ""
    style: dict[str, Any] = {"color": COLOUR["pretrained"], "linewidth": 2, "marker": marker, "markersize": 4}
    axis.plot(*zip(*pretraining.validation_loss.items(), strict=True), label="validation", **style)
    if pretraining.baseline_loss:
        step, level = max(pretraining.baseline_loss.items())
        axis.plot([0, step], [level] * 2, "--", color="C2", linewidth=1.6, label="validation, nothing learned")
    axis.set(xlabel="step", ylabel="loss")
    axis.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    axis.set_xlim(left=0)
    axis.set_ylim(bottom=0)
    axis.legend(loc="upper right")
    return figure


def _organ_map(results: Results) -> Figure:
    """Difference in Dice, organs down, labelled volumes across: orange where random is better, blue pretrained."""
    measures = [FOREGROUND.organ(number) for number in range(len(results.organs))]
    values = np.array([[results.difference(size, one) for size in results.arms] for one in measures])
    figure, (axis,) = panels(1, 0.27 * len(values), 0.8)
    most = max(0.05, float(np.nanmax(np.abs(values), initial=0)))
    colours = LinearSegmentedColormap.from_list("", [COLOUR["random"], axis.get_facecolor(), COLOUR["pretrained"]])
    image = axis.imshow(values, cmap=colours, vmin=-most, vmax=most, aspect="auto")
    for (row, column), value in np.ndenumerate(values):
        text = "n/a" if np.isnan(value) else FOREGROUND.signed(value)
        brightness = np.dot(image.to_rgba(value)[:3], (0.3, 0.59, 0.11))
        colour = ink() if np.isnan(value) else "black" if brightness > 0.5 else "white"
        axis.text(column, row, text, ha="center", va="center", color=colour)
    axis.set_xticks(range(len(results.arms)), [str(size) for size in results.arms])
    axis.set_yticks(range(len(values)), [_shortened(organ) for organ in results.organs])
    axis.set_xlabel(f"{results.labelled}s")
    axis.grid(visible=False)
    return figure


def _organ_curves(results: Results, curves: Curves) -> Figure:
    """Dice on validation over steps at the primary number of labelled volumes: a panel an organ, a line a run.

    That of a run in folds is their mean.
    """
    figure, axes = panels(len(curves), 1.15, 0.8, 2, sharex=True, sharey=True)
    for axis, organ, by_cell in zip(axes, results.organs, curves, strict=True):
        runs = defaultdict(list)
        for cell, curve in by_cell.items():
            if cell.size == results.primary:
                runs[cell.init, cell.run].append(curve)
        for (init, _), folds in runs.items():
            axis.plot(*zip(*means(folds).items(), strict=True), linewidth=1.4, **LINE[init])
        axis.set_title(_shortened(organ), loc="left")
        axis.set(ylim=(0, 1), yticks=[0, 0.5, 1])
        axis.xaxis.set_major_locator(MaxNLocator(3, integer=True))
    figure.supxlabel("step", fontsize=10)
    legend_above(figure, [Line2D([], [], label=init, **LINE[init]) for init in results.inits])
    return figure


def _shortened(name: str) -> str:
    return name if len(name) <= 24 else f"{name[:23]}…"
