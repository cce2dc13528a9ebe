"""Answers, caveats and tables: numbers as text, and a word where a number is missing."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from ssl_ray.evaluate.scores import PUBLISHED_DICE, organ_keys
from ssl_ray.report.page import Table
from ssl_ray.report.results import (
    FOREGROUND,
    HD95,
    SELECTION,
    SURFACE_DICE,
    WITH_BACKGROUND,
    Arm,
    Measure,
    Results,
)
from ssl_ray.report.statistics import Difference

_NONE = "n/a"


@dataclass(frozen=True)
class Style:
    """How a measure is printed: its label, a factor, and digits behind the point."""

    label: str
    factor: float = 1.0
    digits: int = 3

    def value(self, number: float) -> str:
        """Without a sign."""
        return f"{number * self.factor:.{self.digits}f}"

    def signed(self, number: float) -> str:
        """With a sign, plus for what is printed as zero."""
        text = f"{number * self.factor:+.{self.digits}f}"
        return text.replace("-", "+") if float(text) == 0 else text


PERCENT, DICE, MM = Style("", 100, 2), Style("Dice"), Style("HD95 (mm, lower is better)", digits=1)


def answer(results: Results, split: int) -> str:
    """The answer at one number of labelled volumes, in one sentence that claims no more than the numbers do."""
    start = f"With {count_of(split, 'labelled volume')}"
    metric = f"selected/{results.part}/{FOREGROUND.name}"
    if len(results.inits) == 1:
        arm = results.arm(split, results.inits[0])
        reached = f"reaches foreground Dice {over_seeds(arm, metric, DICE)}" if arm.trials else f"is {arm.hole}"
        return f"{start}, {arm.init} initialisation {reached}; the grid has nothing to compare it with."
    holes = [f"{init} is {arm.hole}" for init in results.inits if not (arm := results.arm(split, init)).trials]
    if holes:
        return f"{start} there is **no answer**: {' and '.join(holes)}."
    found = results.compare(split, FOREGROUND)
    if found is None:
        return f"{start} there is **no answer**: the scores of single volumes are missing."
    change = f"{start}, pretraining changes foreground Dice by {DICE.signed(found.mean)}"
    volumes = count_of(len(found.values), f"{results.part} volume")
    if np.isnan(found.low):
        return f"{change} ({volumes}, too few for an interval): **no conclusion**."
    return f"{change} (95 % CI {DICE.signed(found.low)} to {DICE.signed(found.high)}, {volumes}): {_verdict(found)}."


def notes(results: Results) -> Iterator[str]:
    """What a reader must know before believing the numbers, from the study and from how it went."""
    grid, steps = results.study.finetune.grid, results.study.finetune.steps
    if results.part == "validation":
        yield (
            "**No test split.** The validation volumes reported here also selected the checkpoint and the learning "
            "rate, so all numbers are optimistic, for random and pretrained alike."
        )
    else:
        yield (
            "The test volumes were used for nothing but these numbers; checkpoint and learning rate were chosen on "
            "validation."
        )
    arms = {split: [results.arm(split, init) for init in results.inits] for split in results.splits}
    if len(grid.lr) > 1:
        yield (
            "The learning rate is chosen for every split and initialisation by foreground Dice on validation "
            f"(`{SELECTION}`, mean over seeds)."
        )
        chosen = (
            f"with {split} " + " and ".join(f"{arm.init} {f'{arm.lr:g}' if arm.lr else arm.hole}" for arm in row)
            for split, row in arms.items()
        )
        yield f"Chosen learning rates: {'; '.join(chosen)} (by labelled volumes)."
        rates = [arm.lr for row in arms.values() for arm in row if arm.lr]
        at_edge = sum(rate in (min(grid.lr), max(grid.lr)) for rate in rates)
        if len(grid.lr) > 2 and at_edge:
            yield f"Of {len(rates)} chosen learning rates, {at_edge} lay at the edge of what was tried."
    else:
        yield f"Only one learning rate was tried ({grid.lr[0]:g}); it may suit one initialisation better."
    if len(results.inits) == 2:
        yield (
            "Differences are pretrained minus random on the same volumes, with a 95 % percentile bootstrap interval "
            "over volumes (seeds averaged first). **Clear** is said only where the interval excludes 0, a sign-flip "
            "test over volumes agrees (p < 0.05), and every seed has the same sign: with few volumes the interval "
            "alone is too short, and it does not see that another seed gives another training. With fewer than six "
            "volumes nothing can be clear. Each split is judged on its own."
        )
        if len(grid.seeds) == 1:
            yield (
                "One seed: the interval says how far the result carries over to other volumes, not how much another "
                "training run would change it."
            )
    finished = [trial for trial in results.trials if trial.status == "finished"]
    late = sum(trial.metrics.get("selected/step", 0) >= steps for trial in finished)
    if late:
        decayed = results.study.finetune.optimizer.schedule == "cosine"
        yield (
            f"In {late} of {count_of(len(finished), 'finished cell')} the last checkpoint was the best (step "
            f"{steps:,}). "
            + (
                "The learning rate had come down to 0 by then; whether a longer schedule changes the answer is open."
                if decayed
                else "Training may have ended too early, and more steps may change the answer."
            )
        )
    fewer = [trial for trial in finished if 0 < trial.training_volumes < trial.cell.split]
    if fewer:
        yield (
            f"**{count_of(len(fewer), 'cell')} trained on fewer volumes than the split says**, without the bad ones: "
            + ", ".join(f"{trial.cell.name} on {trial.training_volumes}" for trial in fewer)
            + "."
        )
    if not results.as_given:
        yield (
            "**This grid was run with another version of the experiment** than the one given now; what it was run with "
            "stands at the end of the page."
        )
    if holes := len(results.trials) - len(finished):
        cells = count_of(len(results.trials), "cell")
        yield f"**{holes} of {cells} {'has' if holes == 1 else 'have'} no result**; see the table of all cells."
    if len(results.pretraining) > 1:
        yield f"**The pretrained cells start from {len(results.pretraining)} different pretraining runs.**"
    if results.others:
        others = count_of(results.others, "further trial")
        yield f"{others} of the same grid run left out: not in this study's grid."


def published_table(results: Results) -> Table:
    """Dice with background in percent, as published, and its paired difference."""
    rows = []
    for split in results.splits:
        values = _arms(results, split, WITH_BACKGROUND, PERCENT)
        rows.append([str(split), str(results.volumes), *values, _difference(results, split, WITH_BACKGROUND, PERCENT)])
    return Table(["training volumes", f"{results.part} volumes", "random", "pretrained", "difference (95 % CI)"], rows)


def running_table(results: Results) -> Table:
    """Dice as the tutorial's script averages it, in percent."""
    metric = f"selected/{results.part}/{PUBLISHED_DICE}"
    rows = [
        [str(split), *(over_seeds(results.arm(split, init), metric, PERCENT) for init in results.inits)]
        for split in results.splits
    ]
    return Table(["training volumes", *results.inits], rows)


def honest_table(results: Results) -> Table:
    """Foreground Dice, HD95 and surface Dice on the original grid, and their paired differences."""
    surface = Style(f"surface Dice at {results.study.finetune.surface_tolerance:g} mm")
    rows = [
        [
            style.label,
            str(split),
            str(results.volumes),
            *_arms(results, split, measure, style),
            _difference(results, split, measure, style),
        ]
        for measure, style in ((FOREGROUND, DICE), (HD95, MM), (SURFACE_DICE, surface))
        for split in results.splits
    ]
    count = len(results.splits)
    header = ["organs only", "training volumes", f"{results.part} volumes", "random", "pretrained"]
    return Table([*header, "difference (95 % CI)"], rows, 1, frozenset({count, 2 * count}))


def organ_table(results: Results, split: int) -> Table:
    """Dice and HD95 of every organ on the original grid, and how many volumes have it."""
    arms = [results.arm(split, init) for init in results.inits]
    scored = next((trial.cases[results.part] for arm in arms for trial in arm.trials if trial.cases), ())
    columns = [*results.inits, "difference"] if len(arms) == 2 else [*results.inits]
    header = ["organ", "volumes", *(f"Dice {name}" for name in columns), *(f"HD95 (mm) {name}" for name in columns)]
    rows = []
    for number, (organ, key) in enumerate(zip(results.organs, organ_keys(results.organs), strict=True)):
        present = sum(case.original_dice is not None and case.original_dice[number] is not None for case in scored)
        row = [organ, str(present)]
        for name, style in (("original_dice", DICE), ("original_hd95", MM)):
            metric = f"selected/{results.part}/{name}/{key}"
            row += [over_seeds(arm, metric, style) for arm in arms]
            means = [float(np.mean(values)) for arm in arms if (values := arm.seeds(metric))]
            if len(arms) == 2:
                row.append(style.signed(means[1] - means[0]) if len(means) == 2 else _NONE)
        rows.append(row)
    return Table(header, rows, 1)


def cell_table(results: Results) -> Table:
    """Every cell of the grid; the chosen learning rates are bold."""
    chosen = {
        id(trial) for split in results.splits for init in results.inits for trial in results.arm(split, init).trials
    }
    part = results.part
    columns = [(SELECTION, DICE, "Dice, validation, resampled grid (selects)")]
    for measure, style, label in (
        (FOREGROUND, DICE, "Dice"),
        (HD95, MM, "HD95 (mm)"),
        (SURFACE_DICE, DICE, "surface Dice"),
    ):
        columns.append((f"selected/{part}/{measure.name}", style, f"{label}, {part}"))
    rows, rules, previous = [], set(), None
    for trial in results.trials:
        cell, mark = trial.cell, "**" if id(trial) in chosen else ""
        if previous not in (None, (cell.split, cell.init)):
            rules.add(len(rows))
        previous = cell.split, cell.init
        step = f"{trial.metrics['selected/step']:,.0f}" if "selected/step" in trial.metrics else ""
        scores = [style.value(trial.metrics[name]) if name in trial.metrics else "" for name, style, _ in columns]
        status = trial.status if trial.status == "finished" else f"**{trial.status}**"
        rows.append([str(cell.split), cell.init, f"{mark}{cell.lr:g}{mark}", str(cell.seed), status, step, *scores])
    header = ["training volumes", "initialisation", "learning rate", "seed", "status", "selected step"]
    return Table([*header, *(label for _, _, label in columns)], rows, 5, frozenset(rules))


def _arms(results: Results, split: int, measure: Measure, style: Style) -> list[str]:
    """Random and pretrained; one that the grid does not have is left to say so."""
    metric = f"selected/{results.part}/{measure.name}"
    return [
        over_seeds(results.arm(split, init), metric, style) if init in results.inits else "not in the grid"
        for init in ("random", "pretrained")
    ]


def over_seeds(arm: Arm, metric: str, style: Style) -> str:
    """Mean over seeds with its standard deviation, or the word for why there is none."""
    if not arm.trials:
        return arm.hole
    values = arm.seeds(metric)
    if not values:
        return _NONE
    text = style.value(float(np.mean(values)))
    if len(values) > 1:
        text += f" ± {style.value(float(np.std(values, ddof=1)))}"
    return text if len(arm.trials) == arm.expected else f"{text} ({len(arm.trials)} of {arm.expected} seeds)"


def _difference(results: Results, split: int, measure: Measure, style: Style) -> str:
    found = results.compare(split, measure)
    if found is None:
        return _NONE
    if np.isnan(found.low):
        return f"{style.signed(found.mean)} (one volume)"
    text = f"{style.signed(found.mean)} ({style.signed(found.low)} to {style.signed(found.high)})"
    return text


def _verdict(found: Difference) -> str:
    if found.clear:
        gain = "**a clear gain**" if found.mean > 0 else "**a clear loss**"
        return gain if len(found.by_seed) > 1 else f"{gain} with the one seed that was trained"
    if found.excludes_zero and found.seeds_agree:
        reason = f" (the interval excludes 0, but a sign-flip test does not agree, p = {found.p:.2f})"
    elif found.excludes_zero:
        seeds = ", ".join(DICE.signed(value) for value in found.by_seed)
        reason = f" (the interval excludes 0, but the seeds disagree: {seeds})"
    else:
        reason = ""
    return f"**no clear difference**{reason}"


def count_of(number: int, noun: str) -> str:
    """Like `1 volume` or `6 volumes`."""
    return f"{number} {noun}{'' if number == 1 else 's'}"
