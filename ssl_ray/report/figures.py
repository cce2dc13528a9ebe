"""The report's figures: matplotlib's object interface only, no pyplot and no global state.

Colours are Okabe and Ito's, which colour-blind readers can tell apart; markers and dashes say the same once more.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from ssl_ray.evaluate.scores import organ_keys
from ssl_ray.report.results import FOREGROUND, Arm, PretrainingRun, Results
from ssl_ray.report.statistics import interval

_COLOUR = {"random": "#E69F00", "pretrained": "#0072B2"}
_MARKER = {"random": "s", "pretrained": "o"}
_DASH = {"random": (0, (4, 2)), "pretrained": "solid"}
_WIDTH, _DPI = 9.6, 150


def draw_label_efficiency(results: Results, path: Path) -> bool:
    """Left: foreground Dice over labelled volumes, a line an initialisation. Right: their paired difference.

    Returns:
        Whether there was anything to draw; the other functions of this module likewise.
    """
    arms = {init: [results.arm(split, init) for split in results.splits] for init in results.inits}
    metric = f"selected/{results.part}/{FOREGROUND.name}"
    if not any(arm.seeds(metric) for row in arms.values() for arm in row):
        return False
    differences = {split: results.compare(split, FOREGROUND) for split in results.splits}
    both = any(differences.values())
    figure = Figure(figsize=(_WIDTH, 4), layout="constrained")
    axes = figure.subplots(1, 2 if both else 1, squeeze=False)[0]
    width = max(results.splits) - min(results.splits) or 1
    for shift, (init, row) in zip((-0.012, 0.012), arms.items(), strict=False):
        drawn = [arm for arm in row if arm.seeds(metric)]
        x = [arm.split + shift * width for arm in drawn]
        y = np.array([np.mean(arm.seeds(metric)) for arm in drawn])
        bounds = np.array([interval(np.array([*arm.cases(results.part, FOREGROUND).values()])) for arm in drawn])
        errors = np.nan_to_num(np.abs(bounds.T - y)) if len(drawn) else None
        style: dict[str, Any] = {"color": _COLOUR[init], "marker": _MARKER[init], "linestyle": _DASH[init]}
        axes[0].errorbar(x, y, errors, capsize=4, linewidth=2, elinewidth=1.2, label=init, **style)
        for arm, position in zip(drawn, x, strict=True):
            if len(arm.trials) > 1:
                values = arm.seeds(metric)
                beside = [position + 2 * shift * width] * len(values)
                axes[0].scatter(beside, values, s=12, color=_COLOUR[init], edgecolor="black", linewidth=0.5, zorder=3)
    _label(axes[0], "labelled training volumes", f"foreground Dice, {results.part} volumes")
    axes[0].legend(title="initialisation", frameon=False, loc="best")
    if both:
        axes[1].axhline(0, color="black", linewidth=1)
        for split, found in differences.items():
            if found is None:
                continue
            spread = np.linspace(-0.012, 0.012, len(found.values)) * width if len(found.values) > 1 else [0.0]
            axes[1].scatter(split + np.asarray(spread), found.values, s=14, color="#8a8a8a", linewidths=0)
            if not np.isnan(found.low):
                axes[1].plot([split, split], [found.low, found.high], color=_COLOUR["pretrained"], linewidth=3)
            face = _COLOUR["pretrained"] if found.clear else "white"
            axes[1].plot(split, found.mean, "D", color=_COLOUR["pretrained"], markerfacecolor=face, markersize=9)
        _label(axes[1], "labelled training volumes", "difference in Dice, pretrained - random")
        axes[1].legend(
            handles=[
                Line2D([], [], marker="o", linestyle="", color="#8a8a8a", markersize=4, label="one volume"),
                Line2D(
                    [], [], marker="D", color=_COLOUR["pretrained"], linewidth=3, label="mean, 95 % interval: clear"
                ),
                Line2D(
                    [],
                    [],
                    marker="D",
                    color=_COLOUR["pretrained"],
                    linewidth=3,
                    markerfacecolor="white",
                    label="mean, 95 % interval: not clear",
                ),
            ],
            frameon=False,
            fontsize=8.5,
        )
    for axis in axes:
        axis.set_xticks(results.splits)
        axis.set_xlim(min(results.splits) - 0.1 * width, max(results.splits) + 0.1 * width)
    return _save(figure, path)


def draw_pretraining(pretraining: PretrainingRun, path: Path) -> bool:
    """Training and validation loss over steps, and the loss of leaving the corrupted patches as they are."""
    if not pretraining.loss and not pretraining.validation_loss:
        return False
    figure = Figure(figsize=(_WIDTH, 3.6), layout="constrained")
    axis = figure.subplots()
    if pretraining.loss:
        axis.plot(*_points(pretraining.loss), color="#9a9a9a", linewidth=1, label="training")
    if pretraining.validation_loss:
        marker = "o" if len(pretraining.validation_loss) < 40 else ""
        axis.plot(
            *_points(pretraining.validation_loss), color="#0072B2", linewidth=2, marker=marker, ms=4, label="validation"
        )
    if pretraining.identity_loss:
        steps, values = _points(pretraining.identity_loss)
        axis.plot(
            [0, steps[-1]], [values[-1]] * 2, "--", color="#D55E00", linewidth=1.6, label="validation, nothing restored"
        )
    _label(axis, "step", "L1 (HU window = 0 to 1)")
    axis.set_xlim(left=0)
    axis.set_ylim(bottom=0)
    axis.legend(frameon=False, loc="upper right")
    return _save(figure, path)


def draw_finetuning(results: Results, path: Path) -> bool:
    """Foreground Dice on validation over steps: a panel a split, a line a seed, and the selected checkpoint."""
    arms = [[results.arm(split, init) for init in results.inits] for split in results.splits]
    if not any(trial.curve for row in arms for arm in row for trial in arm.trials):
        return False
    columns = min(3, len(arms))
    rows = -(-len(arms) // columns)
    figure = Figure(figsize=(_WIDTH, 0.5 + 2.9 * rows), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False, sharey=True, sharex=True)
    for number, axis in enumerate(axes.flat):
        if number >= len(arms):
            axis.set_axis_off()
            continue
        for arm in arms[number]:
            _draw_curves(axis, arm)
        axis.set_title(f"{results.splits[number]} labelled volumes", fontsize=10)
        first, last = number % columns == 0, number + columns >= len(arms)
        _label(axis, "step" if last else "", "foreground Dice, validation" if first else "")
        axis.tick_params(labelbottom=last)
    handles: list[Any] = [
        Line2D([], [], color=_COLOUR[init], linestyle=_DASH[init], linewidth=1.8, label=init) for init in results.inits
    ]
    handles.append(Line2D([], [], color="black", marker="v", linestyle="", markersize=6, label="selected checkpoint"))
    figure.legend(handles=handles, loc="outside upper center", ncols=len(handles), frameon=False)
    return _save(figure, path)


def draw_organs(results: Results, path: Path) -> bool:
    """Dice of every organ on the original grid: a panel a split, a bar an initialisation, a dot a seed."""
    keys = organ_keys(results.organs)
    arms = [[results.arm(split, init) for init in results.inits] for split in results.splits]
    if not keys or not any(arm.trials for row in arms for arm in row):
        return False
    figure = Figure(figsize=(_WIDTH, 1.1 + 1.9 * len(arms)), layout="constrained")
    axes = figure.subplots(len(arms), 1, squeeze=False, sharex=True)[:, 0]
    bar = 0.8 / len(results.inits)
    for axis, row, split in zip(axes, arms, results.splits, strict=True):
        for number, arm in enumerate(row):
            x = np.arange(len(keys)) - 0.4 + bar * (number + 0.5)
            for position, key in zip(x, keys, strict=True):
                values = arm.seeds(f"selected/{results.part}/original_dice/{key}")
                if values:
                    hatch = "" if arm.init == "pretrained" else "///"
                    axis.bar(
                        position, np.mean(values), bar * 0.94, color=_COLOUR[arm.init], hatch=hatch, edgecolor="white"
                    )
                if len(values) > 1:
                    axis.scatter([position] * len(values), values, s=7, color="black", zorder=3)
        axis.set_title(f"{split} labelled volumes", fontsize=10, loc="left")
        axis.set_ylim(0, 1)
        _label(axis, "", "Dice")
        axis.grid(axis="x", visible=False)
    crowded = sum(map(len, results.organs)) > 80
    axes[-1].set_xticks(
        range(len(keys)),
        results.organs,
        rotation=35 if crowded else 0,
        ha="right" if crowded else "center",
        rotation_mode="anchor" if crowded else "default",
    )
    bars: Sequence[Any] = [
        Line2D([], [], marker="s", markersize=10, linestyle="", color=_COLOUR[init], label=init)
        for init in results.inits
    ]
    figure.legend(handles=bars, loc="outside upper center", ncols=len(bars), frameon=False)
    return _save(figure, path)


def _draw_curves(axis: Any, arm: Arm) -> None:
    for trial in arm.trials:
        if not trial.curve:
            continue
        axis.plot(*_points(trial.curve), color=_COLOUR[arm.init], linestyle=_DASH[arm.init], linewidth=1.6)
        selected = int(trial.metrics.get("selected/step", -1))
        if selected in trial.curve:
            axis.plot(selected, trial.curve[selected], "v", color=_COLOUR[arm.init], markeredgecolor="black", ms=5.5)


def _points(curve: Any) -> tuple[list[int], list[float]]:
    return list(curve.keys()), list(curve.values())


def _label(axis: Any, x: str, y: str) -> None:
    axis.set_xlabel(x)
    axis.set_ylabel(y)
    axis.grid(alpha=0.3)
    axis.spines[["top", "right"]].set_visible(False)
    if x == "step":
        axis.xaxis.set_major_locator(MaxNLocator(5, integer=True))


def _save(figure: Figure, path: Path) -> bool:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=_DPI, metadata={"Software": None})
    return True
