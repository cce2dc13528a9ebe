"""The answer, in a sentence of Markdown for each number of labelled volumes."""

import numpy as np

from ssl_ray.report.measures import FOREGROUND
from ssl_ray.report.results import Results
from ssl_ray.report.statistics import Difference
from ssl_ray.report.tables import over_seeds


def answer(results: Results, split: int) -> str:
    """The answer at one number of labelled volumes, in one sentence that claims no more than the numbers do."""
    start = f"With {count_of(split, 'labelled volume')}"
    arms = results.arms[split]
    if len(arms) == 1:
        ((init, arm),) = arms.items()
        dice = over_seeds(arm, results.metric(FOREGROUND.name), FOREGROUND)
        reached = f"reaches foreground Dice {dice}" if arm.trials else f"is {arm.hole}"
        return f"{start}, {init} initialisation {reached}; the grid has nothing to compare it with."
    if holes := [f"{init} is {arm.hole}" for init, arm in arms.items() if not arm.trials]:
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


def count_of(number: int, noun: str) -> str:
    """Like `1 volume` or `6 volumes`."""
    return f"{number} {noun}{'' if number == 1 else 's'}"
