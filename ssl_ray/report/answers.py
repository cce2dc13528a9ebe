"""Sentences in Markdown: the answer, what to know before believing it, and what pretraining learned."""

from collections.abc import Iterator

import numpy as np

from ssl_ray.report.measures import FOREGROUND
from ssl_ray.report.results import SELECTION, PretrainingRun, Results
from ssl_ray.report.statistics import Difference
from ssl_ray.report.tables import over_seeds


def answer(results: Results, split: int) -> str:
    """The answer at one number of labelled volumes, in one sentence that claims no more than the numbers do."""
    start = f"With {count_of(split, 'labelled volume')}"
    arms = results.arms(split)
    if len(arms) == 1:
        (arm,) = arms
        dice = over_seeds(arm, results.metric(FOREGROUND.name), FOREGROUND)
        reached = f"reaches foreground Dice {dice}" if arm.trials else f"is {arm.hole}"
        return f"{start}, {arm.init} initialisation {reached}; the grid has nothing to compare it with."
    if holes := [f"{arm.init} is {arm.hole}" for arm in arms if not arm.trials]:
        return f"{start} there is **no answer**: {' and '.join(holes)}."
    found = results.compare(split, FOREGROUND)
    if found is None:
        return f"{start} there is **no answer**: the scores of single volumes are missing."
    change = f"{start}, pretraining changes foreground Dice by {FOREGROUND.signed(found.mean)}"
    volumes = count_of(len(found.values), f"{results.part} volume")
    if np.isnan(found.low):
        return f"{change} ({volumes}, too few for an interval): **no conclusion**."
    bounds = f"{FOREGROUND.signed(found.low)} to {FOREGROUND.signed(found.high)}"
    return f"{change} (95 % CI {bounds}, {volumes}): {_verdict(found)}."


def _verdict(found: Difference) -> str:
    if found.clear:
        gain = "**a clear gain**" if found.mean > 0 else "**a clear loss**"
        return gain if len(found.by_seed) > 1 else f"{gain} with the one seed that was trained"
    if not found.excludes_zero:
        return "**no clear difference**"
    if found.seeds_agree:
        but = f"a sign-flip test does not agree, p = {found.p:.2f}"
    else:
        but = f"the seeds disagree: {', '.join(map(FOREGROUND.signed, found.by_seed))}"
    return f"**no clear difference** (the interval excludes 0, but {but})"


def notes(results: Results) -> Iterator[str]:
    """What a reader must know before believing the numbers, from the study and from how it went."""
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
    yield from _learning_rates(results)
    if len(results.inits) == 2:
        yield (
            "Differences are pretrained minus random on the same volumes, with a 95 % percentile bootstrap interval "
            "over volumes (seeds averaged first). **Clear** is said only where the interval excludes 0, a sign-flip "
            "test over volumes agrees (p < 0.05), and every seed has the same sign: with few volumes the interval "
            "alone is too short, and it does not see that another seed gives another training. With fewer than six "
            "volumes nothing can be clear. Each split is judged on its own."
        )
        if len(results.study.finetune.grid.seeds) == 1:
            yield (
                "One seed: the interval says how far the result carries over to other volumes, not how much another "
                "training run would change it."
            )
    yield from _trainings(results)


def _learning_rates(results: Results) -> Iterator[str]:
    tried = results.study.finetune.grid.lr
    if len(tried) == 1:
        yield f"Only one learning rate was tried ({tried[0]:g}); it may suit one initialisation better."
        return
    yield (
        "The learning rate is chosen for every split and initialisation by foreground Dice on validation "
        f"(`{SELECTION}`, mean over seeds)."
    )
    arms = {split: results.arms(split) for split in results.splits}
    chosen = (
        f"with {split} " + " and ".join(f"{arm.init} {f'{arm.lr:g}' if arm.lr else arm.hole}" for arm in row)
        for split, row in arms.items()
    )
    yield f"Chosen learning rates: {'; '.join(chosen)} (by labelled volumes)."
    rates = [arm.lr for row in arms.values() for arm in row if arm.lr]
    at_edge = sum(rate in (min(tried), max(tried)) for rate in rates)
    if len(tried) > 2 and at_edge:
        yield f"Of {len(rates)} chosen learning rates, {at_edge} lay at the edge of what was tried."


def _trainings(results: Results) -> Iterator[str]:
    finetune, finished = results.study.finetune, results.finished
    if late := sum(trial.metrics.get("selected/step", 0) >= finetune.steps for trial in finished):
        yield (
            f"In {late} of {count_of(len(finished), 'finished cell')} the last checkpoint was the best (step "
            f"{finetune.steps:,}). "
            + (
                "The learning rate had come down to 0 by then; whether a longer schedule changes the answer is open."
                if finetune.optimizer.schedule == "cosine"
                else "Training may have ended too early, and more steps may change the answer."
            )
        )
    if fewer := [trial for trial in finished if 0 < trial.training_volumes < trial.cell.split]:
        named = ", ".join(f"{trial.cell.name} on {trial.training_volumes}" for trial in fewer)
        yield (
            f"**{count_of(len(fewer), 'cell')} trained on fewer volumes than the split says**, without the bad ones: "
            f"{named}."
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


def restoration(pretraining: PretrainingRun) -> str:
    """How well the weights that were kept restore corrupted patches; the run has a validation loss."""
    step, loss = min(pretraining.validation_loss.items(), key=lambda point: point[1])
    text = f"The weights are those of step {step:,}, with the lowest validation loss: L1 {loss:.4f}."
    if identity := pretraining.identity_loss.get(step):
        share = f"{'removes' if loss < identity else 'adds'} {abs(1 - loss / identity):.0%}"
        text += f" Leaving corrupted patches as they are gives {identity:.4f}; the network {share} of it."
    return text


def count_of(number: int, noun: str) -> str:
    """Like `1 volume` or `6 volumes`."""
    return f"{number} {noun}{'' if number == 1 else 's'}"
