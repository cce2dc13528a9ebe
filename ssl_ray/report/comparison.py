"""From trials to the claim: which measure, learning rate, runs and patients, and what their differences say."""

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from operator import attrgetter

import numpy as np

from ssl_ray.errors import UserError
from ssl_ray.evaluate.scores import DICE_FOREGROUND, CaseScores, Scores
from ssl_ray.report.statistics import Array, Estimate, Multiplier, Verdict, estimate, holm, judge, multiplier
from ssl_ray.report.trials import Part, Status, Trial

SELECTION = f"selected/validation/{DICE_FOREGROUND}"
"""The metric by which a trial selects its checkpoint (`ssl_ray.finetune.trial`), and the report a learning rate."""


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


@dataclass(frozen=True)
class Arm:
    """The finished trials, a run each, of one size and initialisation at the learning rate best on validation."""

    trials: Mapping[int, Trial]
    """By run."""
    nonfinite: Sequence[Trial] = ()
    """Those at this learning rate that failed because their loss or gradient was not finite."""
    hole: Status = "finished"
    """Why there is no finished trial."""

    @property
    def lr(self) -> float:
        """The learning rate that was chosen, where any trial has finished."""
        return next(iter(self.trials.values())).cell.lr


def choose(trials: Sequence[Trial]) -> Arm:
    """The arm at the learning rate with the highest mean of `SELECTION`, over the runs that all rates finished.

    So no rate wins by the runs that others lost. One that finished no run at all is out; where no run was finished by
    all of the others, the one with the most runs is taken.
    """
    by_lr: dict[float, dict[int, Trial]] = defaultdict(dict)
    for trial in trials:
        if trial.status == "finished":
            by_lr[trial.cell.lr][trial.cell.run] = trial
    if not by_lr:
        hole = min((trial.status for trial in trials), key=("failed", "unfinished", "missing").index)
        return Arm({}, [trial for trial in trials if trial.nonfinite], hole)
    by_all = set.intersection(*map(set, by_lr.values()))

    def rank(lr: float) -> tuple[float, int]:
        known = [by_lr[lr][run].metrics.get(SELECTION, 0.0) for run in by_all]
        return float(np.mean(known or [0.0])), len(by_lr[lr])

    lr = max(by_lr, key=rank)
    return Arm(by_lr[lr], [trial for trial in trials if trial.nonfinite and trial.cell.lr == lr])


@dataclass(frozen=True)
class Shared:
    """What several arms have in common: runs that each finished, and patients whose volumes were scored in all."""

    runs: Sequence[int]
    patients: Sequence[str]
    """Subjects that have an organ; a volume without a subject stands for itself."""
    healthy: Sequence[str]
    """Subjects without any organ, in whom only false positives can be counted."""
    dropped_patients: int


def shared(arms: Sequence[Arm], part: Part) -> Shared:
    """The common runs and patients of arms that each have a trial; what only some of them have is dropped."""
    runs = [set(arm.trials) for arm in arms]
    common = sorted(set.intersection(*runs)) if runs else []
    scored = [_by_patient(arm.trials[run].cases[part]) for arm in arms for run in common]
    seen = list(dict.fromkeys(patient for one in scored for patient in one))
    volumes = {patient: {frozenset(case.case for case in one.get(patient, ())) for one in scored} for patient in seen}
    kept = [patient for patient in seen if len(volumes[patient]) == 1]
    healthy = [one for one in kept if all(FOREGROUND.of(case) is None for found in scored for case in found[one])]
    return Shared(common, [one for one in kept if one not in healthy], healthy, len(seen) - len(kept))


def _by_patient(cases: Sequence[CaseScores]) -> dict[str, list[CaseScores]]:
    """The volumes of every patient, those without any organ too."""
    found = defaultdict(list)
    for case in cases:
        found[case.subject or case.case].append(case)
    return found


def matrix(arm: Arm, over: Shared, part: Part, measure: Measure) -> Array:
    """Mean over a patient's volumes: (runs, patients), nan where none of them has a score."""
    patients = [*over.patients, *over.healthy] if measure.absent else over.patients
    values = np.full((len(over.runs), len(patients)), np.nan)
    for row, run in zip(values, over.runs, strict=True):
        by_patient = _by_patient(arm.trials[run].cases[part])
        for column, patient in enumerate(patients):
            scores = [score for case in by_patient[patient] if (score := measure.of(case)) is not None]
            if scores:
                row[column] = np.mean(scores)
    return values


def check_precision(random: Arm, pretrained: Arm) -> None:
    """Two cells that are compared must have computed in the same precision; a UserError names a pair that did not."""
    for run in set(random.trials) & set(pretrained.trials):
        one, other = random.trials[run], pretrained.trials[run]
        if one.precision and other.precision and one.precision != other.precision:
            raise UserError(
                f"finetune.precision: {one.cell.name} was trained in {one.precision} and {other.cell.name} in "
                f"{other.precision}, so that their difference is not the pretraining's alone; name one of them there "
                "instead of 'auto', and run the study again with --fresh"
            )


@dataclass(frozen=True)
class Comparison:
    """The claim at one number of labelled volumes: foreground Dice on the original grid, pretrained minus random."""

    differences: Array
    """(runs, patients), complete."""
    found: Estimate
    adjusted: float
    """p after Holm, over all numbers of labelled volumes; nan without an interval."""
    verdict: Verdict
    worth: Multiplier | None
    """What pretraining is worth in labels; None where more labels did not help, or nothing finished at all sizes."""


def compare(
    arms: Mapping[int, Mapping[str, Arm]], common: Mapping[int, Shared], part: Part, margin: float
) -> dict[int, Comparison]:
    """The comparison at every size at which both arms, random first, share a run and a patient."""
    matrices = {}
    for size, pair in arms.items():
        over = common[size]
        if len(pair) == 2 and all(arm.trials for arm in pair.values()) and over.runs and over.patients:
            random, pretrained = (matrix(arm, over, part, FOREGROUND) for arm in pair.values())
            matrices[size] = pretrained - random
    found = {size: estimate(differences) for size, differences in matrices.items()}
    # A size without an interval, or without any result, was asked about all the same.
    asked = np.array([found[size].p if size in found else np.nan for size in arms])
    adjusted = dict(zip(arms, holm(np.nan_to_num(asked, nan=1.0)), strict=True))
    comparisons = {}
    for size, differences in matrices.items():
        one = found[size]
        p = np.nan if np.isnan(one.p) else float(adjusted[size])
        verdict = judge(one, differences.shape, p, margin)
        comparisons[size] = Comparison(differences, one, p, verdict, _worth(arms, size, part))
    return comparisons


def _worth(arms: Mapping[int, Mapping[str, Arm]], size: int, part: Part) -> Multiplier | None:
    """`Comparison.worth`, over what pretrained at `size` and all finished random arms share."""
    pretrained = arms[size]["pretrained"]
    random = {count: pair["random"] for count, pair in arms.items() if pair["random"].trials}
    over = shared([pretrained, *random.values()], part)
    if len(random) < 2 or not over.runs or not over.patients:
        return None
    levels = np.stack([matrix(arm, over, part, FOREGROUND) for arm in random.values()])
    return multiplier(matrix(pretrained, over, part, FOREGROUND), levels, [*random], size)
