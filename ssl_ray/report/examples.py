"""What was segmented: the best, the median and the worst patient of each arm, out of the planes that trials kept."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from ssl_ray.evaluate.overlay import draw
from ssl_ray.evaluate.planes import FILE, Planes, from_npz
from ssl_ray.report.comparison import FOREGROUND
from ssl_ray.report.results import Results
from ssl_ray.tracking.tracker import Tracker


@dataclass(frozen=True)
class Example:
    """A volume of one patient, as a run of the arm segments it."""

    rank: str
    """`best`, `median` or `worst`."""
    case: str
    cell: str
    """Name of the cell whose run it is."""
    dice: float
    """Foreground Dice of the patient on the original grid, mean over the arm's runs."""
    planes: Planes


def read_examples(results: Results, tracker: Tracker) -> dict[str, list[Example]]:
    """By initialisation, at the primary number of labelled volumes; without those whose planes MLflow has not.

    The planes are those of the first run that all arms finished. Of a patient's volumes, that with the lowest Dice.
    """
    over, found = results.common[results.primary], {}
    for init, arm in results.arms[results.primary].items():
        if not arm.trials or not over.runs or not over.patients:
            continue
        trial = arm.trials[over.runs[0]]
        kept: dict[str, Planes] = {}
        for fold in results.trials:
            if replace(fold.cell, fold=None) == trial.cell and fold.run_id:
                content = tracker.read(fold.run_id, FILE)
                kept |= from_npz(content) if content else {}
        dice = results.matrix(results.primary, init, FOREGROUND).mean(0)
        order, last = np.argsort(-dice, kind="stable"), len(dice) - 1
        ranks, examples = {last // 2: "median", last: "worst", 0: "best"}, []  # of one patient or two, the last word
        for rank in sorted(ranks):
            place = order[rank]
            volumes = [case for case in trial.cases[results.part] if case.case in kept]
            volumes = [case for case in volumes if (case.subject or case.case) == over.patients[place]]
            if volumes:
                case = min(volumes, key=lambda case: FOREGROUND.of(case) or 0.0).case
                examples.append(Example(ranks[rank], case, trial.cell.name, float(dice[place]), kept[case]))
        found[init] = examples
    return {init: examples for init, examples in found.items() if examples}


def draw_examples(results: Results, examples: Sequence[Example]) -> bytes:
    """PNG, a row each."""
    titles = [f"{one.rank}: {one.case}, Dice {FOREGROUND.value(one.dice)}" for one in examples]
    return draw([one.planes for one in examples], results.organs, titles)
