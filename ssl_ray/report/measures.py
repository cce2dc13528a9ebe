"""What the report measures: how one volume is scored, and how a number is printed."""

from collections.abc import Callable
from dataclasses import dataclass
from operator import attrgetter

from ssl_ray.evaluate.scores import CaseScores, Scores


@dataclass(frozen=True)
class Measure:
    """A mean over the classes that a volume has, or their sum; `ssl_ray.evaluate.scores` defines the scores."""

    classes: Callable[[CaseScores], Scores]
    """The scores of one volume, one a class; None for a class that it lacks."""
    factor: float = 1.0
    """What a score is multiplied by for print."""
    digits: int = 3
    total: bool = False
    """Whether a volume's score is the sum over its classes, which is 0 where it has none of them."""
    absent: bool = False
    """Whether it is about organs that a volume lacks, so that patients without any organ count too."""

    def of(self, case: CaseScores) -> float | None:
        """Score of one volume; None where it has none of the classes, unless they are added up."""
        known = [float(score) for score in self.classes(case) if score is not None]
        return sum(known) / (1 if self.total else len(known)) if known or self.total else None

    def organ(self, number: int) -> "Measure":
        """The mean for one organ alone, the class after the one of this number; in percent where organs are counted."""

        def one(case: CaseScores) -> Scores:
            return self.classes(case)[number : number + 1]

        return Measure(one, 100, 1, absent=self.absent) if self.total else Measure(one, self.factor, self.digits)

    def value(self, number: float) -> str:
        """Like `0.658`."""
        return f"{number * self.factor:.{self.digits}f}"

    def signed(self, number: float) -> str:
        """Like `-0.012`; `+0.000` where the digits shown are all zero."""
        text = f"{number * self.factor:+.{self.digits}f}"
        return text.replace("-", "+") if float(text) == 0 else text


WITH_BACKGROUND = Measure(attrgetter("dice"), factor=100, digits=2)  # percent
FOREGROUND = Measure(attrgetter("original_dice"))
HD95 = Measure(attrgetter("original_hd95"), digits=1)  # mm, over the organs that were found
SURFACE_DICE = Measure(attrgetter("original_surface_dice"))
MISSED = Measure(attrgetter("missed"), factor=100, digits=1)  # percent of the organs that a volume has
FALSE_POSITIVES = Measure(attrgetter("false_positives"), digits=2, total=True, absent=True)  # organs
