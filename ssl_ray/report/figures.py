"""The report's figures: matplotlib's object interface only, no pyplot and no global state.

Colours are Okabe and Ito's, which colour-blind readers can tell apart; markers and dashes say the same once more.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from ssl_ray.evaluate.scores import organ_keys
from ssl_ray.report.measures import FOREGROUND
from ssl_ray.report.results import Arm, PretrainingRun, Results
from ssl_ray.report.statistics import interval

_RANDOM, _PRETRAINED = "#E69F00", "#0072B2"
_LINE: dict[str, dict[str, Any]] = {
    "random": {"color": _RANDOM, "linestyle": (0, (4, 2))},
    "pretrained": {"color": _PRETRAINED, "linestyle": "solid"},
}
_MARKER = {"random": "s", "pretrained": "o"}
_WIDTH, _DPI = 9.6, 150
"""Inches, and pixels an inch."""


def draw_figures(results: Results, folder: Path) -> tuple[Path, ...]:
    """Write every figure for which there is something to show, and the last restoration, as PNG -> paths."""
    folder.mkdir(parents=True, exist_ok=True)
    figures: dict[str, Figure | bytes | None] = {
        "label_efficiency": _label_efficiency(results),
        "organs": _organs(results),
        "finetuning": _finetuning(results),
    }
    for pretraining in results.pretraining:
        figures[f"pretraining{pretraining.suffix}"] = _pretraining(pretraining)
        figures[f"restored{pretraining.suffix}"] = pretraining.picture
    drawn = {folder / f"{name}.png": figure for name, figure in figures.items() if figure}
    for path, figure in drawn.items():
        if isinstance(figure, bytes):
            path.write_bytes(figure)
        else:
            figure.savefig(path, dpi=_DPI, metadata={"Software": None})
    return tuple(drawn)


def _label_efficiency(results: Results) -> Figure | None:
    """Left: foreground Dice over labelled volumes, a line an initialisation. Right: their paired difference."""
    if not any(arm.seeds(results.metric(FOREGROUND.name)) for split in results.splits for arm in results.arms(split)):
        return None
    both = any(results.compare(split, FOREGROUND) for split in results.splits)
    figure = Figure(figsize=(_WIDTH, 4), layout="constrained")
    axes = figure.subplots(1, 2 if both else 1, squeeze=False)[0]
    width = max(results.splits) - min(results.splits) or 1
    _draw_dice(axes[0], results, width)
    if both:
        _draw_differences(axes[1], results, width)
    for axis in axes:
        axis.set_xticks(results.splits)
        axis.set_xlim(min(results.splits) - 0.1 * width, max(results.splits) + 0.1 * width)
    return figure


def _draw_dice(axis: Any, results: Results, width: int) -> None:
    """Means with intervals over volumes; beside a mean over several seeds, a dot for each seed."""
    metric = results.metric(FOREGROUND.name)
    for shift, init in zip((-0.012, 0.012), results.inits, strict=False):
        drawn = [arm for split in results.splits if (arm := results.arm(split, init)).seeds(metric)]
        x = [arm.split + shift * width for arm in drawn]
        y = np.array([np.mean(arm.seeds(metric)) for arm in drawn])
        bounds = np.array([interval(np.array([*arm.cases(results.part, FOREGROUND).values()])) for arm in drawn])
        errors = np.nan_to_num(np.abs(bounds.T - y)) if drawn else None
        style = _LINE[init] | {"marker": _MARKER[init], "label": init}
        axis.errorbar(x, y, errors, capsize=4, linewidth=2, elinewidth=1.2, **style)
        for arm, position in zip(drawn, x, strict=True):
            if len(arm.trials) > 1:
                values = arm.seeds(metric)
                beside = [position + 2 * shift * width] * len(values)
                axis.scatter(beside, values, s=12, color=style["color"], edgecolor="black", linewidth=0.5, zorder=3)
    _label(axis, "labelled training volumes", f"foreground Dice, {results.part} volumes")
    axis.legend(title="initialisation", frameon=False, loc="best")


def _draw_differences(axis: Any, results: Results, width: int) -> None:
    """A dot for every volume, and the mean with its interval: filled where the difference is clear."""
    axis.axhline(0, color="black", linewidth=1)
    for split in results.splits:
        found = results.compare(split, FOREGROUND)
        if found is None:
            continue
        spread = np.linspace(-0.012, 0.012, len(found.values)) * width if len(found.values) > 1 else np.zeros(1)
        axis.scatter(split + spread, found.values, s=14, color="#8a8a8a", linewidths=0)
        if not np.isnan(found.low):
            axis.plot([split, split], [found.low, found.high], color=_PRETRAINED, linewidth=3)
        face = _PRETRAINED if found.clear else "white"
        axis.plot(split, found.mean, "D", color=_PRETRAINED, markerfacecolor=face, markersize=9)
    _label(axis, "labelled training volumes", "difference in Dice, pretrained - random")
    mean = {"marker": "D", "color": _PRETRAINED, "linewidth": 3}
    handles = [
        _handle("one volume", marker="o", linestyle="", color="#8a8a8a", markersize=4),
        _handle("mean, 95 % interval: clear", **mean),
        _handle("mean, 95 % interval: not clear", **mean, markerfacecolor="white"),
    ]
    axis.legend(handles=handles, frameon=False, fontsize=8.5)


def _pretraining(pretraining: PretrainingRun) -> Figure | None:
    """Training and validation loss over steps, and the loss of leaving the corrupted patches as they are."""
    if not pretraining.loss and not pretraining.validation_loss:
        return None
    figure = Figure(figsize=(_WIDTH, 3.6), layout="constrained")
    axis = figure.subplots()
    if pretraining.loss:
        axis.plot(*_points(pretraining.loss), color="#9a9a9a", linewidth=1, label="training")
    if pretraining.validation_loss:
        marker = "o" if len(pretraining.validation_loss) < 40 else ""
        style: dict[str, Any] = {"color": _PRETRAINED, "linewidth": 2, "marker": marker, "markersize": 4}
        axis.plot(*_points(pretraining.validation_loss), label="validation", **style)
    if pretraining.identity_loss:
        steps, values = _points(pretraining.identity_loss)
        ends, level = [0, steps[-1]], [values[-1]] * 2
        axis.plot(ends, level, "--", color="#D55E00", linewidth=1.6, label="validation, nothing restored")
    _label(axis, "step", "L1 (HU window = 0 to 1)")
    axis.set_xlim(left=0)
    axis.set_ylim(bottom=0)
    axis.legend(frameon=False, loc="upper right")
    return figure


def _finetuning(results: Results) -> Figure | None:
    """Foreground Dice on validation over steps: a panel a split, a line a seed, and the selected checkpoint."""
    arms = {split: results.arms(split) for split in results.splits}
    if not any(trial.curve for row in arms.values() for arm in row for trial in arm.trials):
        return None
    columns = min(3, len(arms))
    rows = -(-len(arms) // columns)
    figure = Figure(figsize=(_WIDTH, 0.5 + 2.9 * rows), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False, sharey=True, sharex=True)
    for axis in axes.flat[len(arms) :]:
        axis.set_axis_off()
    for number, (axis, (split, row)) in enumerate(zip(axes.flat, arms.items(), strict=False)):
        for arm in row:
            _draw_curves(axis, arm)
        axis.set_title(f"{split} labelled volumes", fontsize=10)
        first, last = number % columns == 0, number + columns >= len(arms)
        _label(axis, "step" if last else "", "foreground Dice, validation" if first else "")
        axis.tick_params(labelbottom=last)
    handles = [_handle(init, linewidth=1.8, **_LINE[init]) for init in results.inits]
    handles.append(_handle("selected checkpoint", color="black", marker="v", linestyle="", markersize=6))
    figure.legend(handles=handles, loc="outside upper center", ncols=len(handles), frameon=False)
    return figure


def _draw_curves(axis: Any, arm: Arm) -> None:
    for trial in arm.trials:
        axis.plot(*_points(trial.curve), linewidth=1.6, **_LINE[arm.init])
        selected = int(trial.metrics.get("selected/step", -1))
        if selected in trial.curve:
            style = {"color": _LINE[arm.init]["color"], "markeredgecolor": "black", "markersize": 5.5}
            axis.plot(selected, trial.curve[selected], "v", **style)


def _organs(results: Results) -> Figure | None:
    """Dice of every organ on the original grid: a panel a split, a bar an initialisation, a dot a seed."""
    keys = organ_keys(results.organs)
    arms = {split: results.arms(split) for split in results.splits}
    if not keys or not any(arm.trials for row in arms.values() for arm in row):
        return None
    figure = Figure(figsize=(_WIDTH, 1.1 + 1.9 * len(arms)), layout="constrained")
    axes = figure.subplots(len(arms), 1, squeeze=False, sharex=True)[:, 0]
    bar = 0.8 / len(results.inits)
    for axis, (split, row) in zip(axes, arms.items(), strict=True):
        for number, arm in enumerate(row):
            hatch = "" if arm.init == "pretrained" else "///"
            style = {"color": _LINE[arm.init]["color"], "hatch": hatch, "edgecolor": "white"}
            for position, key in enumerate(keys):
                x = position - 0.4 + bar * (number + 0.5)
                values = arm.seeds(results.metric(f"{FOREGROUND.field}/{key}"))
                if values:
                    axis.bar(x, np.mean(values), bar * 0.94, **style)
                if len(values) > 1:
                    axis.scatter([x] * len(values), values, s=7, color="black", zorder=3)
        axis.set_title(f"{split} labelled volumes", fontsize=10, loc="left")
        axis.set_ylim(0, 1)
        _label(axis, "", "Dice")
        axis.grid(axis="x", visible=False)
    crowded = sum(map(len, results.organs)) > 80
    turned = {"rotation": 35, "ha": "right", "rotation_mode": "anchor"} if crowded else {}
    axes[-1].set_xticks(range(len(keys)), results.organs, **turned)
    colours = {init: _LINE[init]["color"] for init in results.inits}
    handles = [_handle(init, marker="s", markersize=10, linestyle="", color=colour) for init, colour in colours.items()]
    figure.legend(handles=handles, loc="outside upper center", ncols=len(handles), frameon=False)
    return figure


def _handle(label: str, **style: Any) -> Line2D:
    """An entry of a legend."""
    return Line2D([], [], label=label, **style)


def _points(curve: Mapping[int, float]) -> tuple[list[int], list[float]]:
    return list(curve.keys()), list(curve.values())


def _label(axis: Any, x: str, y: str) -> None:
    axis.set_xlabel(x)
    axis.set_ylabel(y)
    axis.grid(alpha=0.3)
    axis.spines[["top", "right"]].set_visible(False)
    if x == "step":
        axis.xaxis.set_major_locator(MaxNLocator(5, integer=True))
