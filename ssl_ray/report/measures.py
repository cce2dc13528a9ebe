"""The four metrics that the report is about: how one volume is scored, and how a number is printed."""

from dataclasses import dataclass

from ssl_ray.evaluate.scores import (
    DICE_WITH_BACKGROUND,
    ORIGINAL_DICE_FOREGROUND,
    ORIGINAL_HD95,
    ORIGINAL_SURFACE_DICE,
    CaseScores,
)


@dataclass(frozen=True)
class Measure:
    """A mean over volumes of the mean over the classes that a volume has; `ssl_ray.evaluate.scores` defines each."""

    name: str
    """MLflow's name of the mean over volumes."""
    field: str
    """The field of `CaseScores` with one volume's scores, one a class; names of metrics of one organ begin with it."""
    factor: float = 1.0
    """What the number in MLflow is multiplied by for print."""
    digits: int = 3

    def of(self, case: CaseScores) -> float | None:
        """Score of one volume; None where it has none of the classes, or was not scored on this grid."""
        known = [score for score in getattr(case, self.field) or () if score is not None]
        return sum(known) / len(known) if known else None

    def value(self, number: float) -> str:
        """Like `0.658`."""
        return f"{number * self.factor:.{self.digits}f}"

    def signed(self, number: float) -> str:
        """Like `-0.012`; `+0.000` where the digits shown are all zero."""
        text = f"{number * self.factor:+.{self.digits}f}"
        return text.replace("-", "+") if float(text) == 0 else text


WITH_BACKGROUND = Measure(DICE_WITH_BACKGROUND, "dice", factor=100, digits=2)  # percent
FOREGROUND = Measure(ORIGINAL_DICE_FOREGROUND, "original_dice")
HD95 = Measure(ORIGINAL_HD95, "original_hd95", digits=1)  # mm
SURFACE_DICE = Measure(ORIGINAL_SURFACE_DICE, "original_surface_dice")
