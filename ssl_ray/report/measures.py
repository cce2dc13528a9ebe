"""What the report measures: how one volume is scored, and how a number is printed."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from operator import attrgetter

from ssl_ray.evaluate.scores import CaseScores, Scores


@dataclass(frozen=True)
class Measure:
    """A mean over the classes that a volume has; `ssl_ray.evaluate.scores` defines the scores."""

    classes: Callable[[CaseScores], Sequence[float | None] | None]
    """The scores of one volume, one a class; None for a class that it lacks, or if it was not scored on this grid."""
    factor: float = 1.0
    """What a score is multiplied by for print."""
    digits: int = 3

    def of(self, case: CaseScores) -> float | None:
        """Score of one volume; None where it has none of the classes."""
        known = [score for score in self.classes(case) or () if score is not None]
        return sum(known) / len(known) if known else None

    def organ(self, number: int) -> "Measure":
        """The same of one organ alone, of those 1, 2, ... the one at this place, counted from 0."""

        def one(case: CaseScores) -> Scores | None:
            scores = self.classes(case)
            return scores and scores[number : number + 1]

        return Measure(one, self.factor, self.digits)

    def value(self, number: float) -> str:
        """Like `0.658`."""
        return f"{number * self.factor:.{self.digits}f}"

    def signed(self, number: float) -> str:
        """Like `-0.012`; `+0.000` where the digits shown are all zero."""
        text = f"{number * self.factor:+.{self.digits}f}"
        return text.replace("-", "+") if float(text) == 0 else text


def _missed(case: CaseScores) -> Scores | None:
    """1 for an organ of the truth that was not predicted at all: its Dice is 0, and it has no HD95."""
    pairs = zip(case.original_dice or (), case.original_hd95 or (), strict=True)
    return [None if dice is None else float(distance is None) for dice, distance in pairs]


WITH_BACKGROUND = Measure(attrgetter("dice"), factor=100, digits=2)  # percent
FOREGROUND = Measure(attrgetter("original_dice"))
HD95 = Measure(attrgetter("original_hd95"), digits=1)  # mm, over the organs that were found
SURFACE_DICE = Measure(attrgetter("original_surface_dice"))
MISSED = Measure(_missed, factor=100, digits=1)  # percent of the organs that a volume has
FALSE_POSITIVES = Measure(attrgetter("false_positives"), factor=100, digits=1)  # percent of the organs that it lacks
