"""What MLflow knows of a study, and what can be concluded from it."""

import json
import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from ssl_ray.config.loading import dump, read_yaml
from ssl_ray.config.schema import Study
from ssl_ray.errors import UserError
from ssl_ray.evaluate.scores import organ_keys
from ssl_ray.report.comparison import (
    FOREGROUND,
    Arm,
    Comparison,
    Measure,
    Shared,
    check_precision,
    choose,
    compare,
    matrix,
    shared,
)
from ssl_ray.report.statistics import Array, Estimate, estimate
from ssl_ray.report.trials import Part, PretrainingRun, Trial, in_runs, read_pretraining, read_trial
from ssl_ray.search.cells import BAD_VOLUMES, CELLS, Cell, cells
from ssl_ray.text import shown, without_password
from ssl_ray.tracking.client import STUDY, MlflowRun
from ssl_ray.tracking.tracker import KEY, Tracker

_PLACES = "output", "cache", "scratch"
Curves = Sequence[Mapping[Cell, Mapping[int, float]]]
"""Dice on validation, canonical grid, by step, of the trainings at the chosen learning rates: an organ each."""


@dataclass(frozen=True)
class Results:
    """Everything that the report is made of."""

    study: Study
    grid: MlflowRun
    trials: Sequence[Trial]
    """One for every cell of the study's grid, in the grid's order."""
    arms: Mapping[int, Mapping[str, Arm]]
    """By number of labelled training volumes, ascending, and by the grid's initialisations, random first; the trial of
    a run in folds is of all of them."""
    controls: Mapping[int, Arm]
    """The permuted arm, by size, where the grid has it. Nothing is concluded from it."""
    part: Part
    """The volumes that are reported: test where the cohort has such a split."""
    common: Mapping[int, Shared]
    """By number of labelled volumes: the runs and patients that all numbers in the tables are about."""
    comparisons: Mapping[int, Comparison]
    """The claim by number of labelled volumes, where both arms share a run and a patient."""
    config: str
    """The experiment that the grid was run with, in YAML."""
    as_given: bool
    """Whether this is the very experiment that was given now."""
    transfer: dict[str, Any] | None
    """Report of the weight transfer, as `ssl_ray.networks.transfer` writes it."""
    pretraining: Sequence[PretrainingRun]
    bad: Mapping[str, Sequence[str]]
    """Names of the bad volumes that the study went on without, by part: `unlabelled`, `training`, ..."""

    @property
    def inits(self) -> list[str]:
        """The grid's initialisations, random first."""
        return [*next(iter(self.arms.values()))]

    @property
    def organs(self) -> Sequence[str]:
        """Names of the classes 1, 2, ...; none before a trial has finished."""
        return next((trial.organs for trial in self.trials if trial.organs), ())

    @property
    def finished(self) -> list[Trial]:
        """The trials that have results."""
        return [trial for trial in self.trials if trial.status == "finished"]

    @property
    def late(self) -> list[Trial]:
        """Those whose last checkpoint was the best: more steps might change what they say."""
        return [trial for trial in self.finished if trial.metrics.get("selected/step", 0) >= self.study.finetune.steps]

    @property
    def chosen(self) -> list[Arm]:
        """The arms that have a learning rate."""
        return [arm for arms in self.arms.values() for arm in arms.values() if arm.trials]

    @property
    def primary(self) -> int:
        """The number of labelled volumes that decides the headline."""
        return self.study.finetune.primary or min(self.arms)

    @property
    def subjects(self) -> str:
        """What a patient is called: `patient`, or `volume` where the lists do not say whose the volumes are."""
        cases = (case for trial in self.finished for case in trial.cases[self.part])
        return "patient" if any(case.subject for case in cases) else "volume"

    @property
    def labelled(self) -> str:
        """What the grid's sizes count: subjects where these are drawn from a pool, volumes in published lists."""
        return f"labelled {self.subjects if self.study.finetune.cohort.pool else 'volume'}"

    @property
    def pool(self) -> int | None:
        """Number of subjects that the labelled ones are drawn from; None for published lists, which are one draw."""
        subjects = self.grid.data.params.get("pool_subjects")
        return int(subjects) if self.study.finetune.cohort.pool and subjects else None

    def count(self, part: Part) -> int:
        """Number of validation or test volumes that were scored."""
        return max(len(trial.cases.get(part, ())) for trial in in_runs(self.trials))

    def matrix(self, size: int, init: str, measure: Measure) -> Array:
        """Score (runs, patients) of an arm that has trials; nan where it has none."""
        return matrix(self.arms[size][init], self.common[size], self.part, measure)

    def scores(self, size: int, measure: Measure) -> dict[str, Array]:
        """`matrix` by initialisation, for those that have trials; nan where any of them has no score."""
        found = {init: self.matrix(size, init, measure) for init, arm in self.arms[size].items() if arm.trials}
        missing = np.isnan(sum(found.values()))
        return {init: np.where(missing, np.nan, values) for init, values in found.items()}

    def controlled(self, size: int) -> tuple[Estimate, Estimate] | None:
        """Foreground Dice, permuted - random and pretrained - permuted, over what all three arms share."""
        arms = [*self.arms[size].values(), *filter(None, [self.controls.get(size)])]
        if len(arms) < 3 or not all(arm.trials for arm in arms):
            return None
        over = shared(arms, self.part)
        if not over.runs or not over.patients:
            return None
        random, pretrained, permuted = (matrix(arm, over, self.part, FOREGROUND) for arm in arms)
        return estimate(permuted - random), estimate(pretrained - permuted)

    def difference(self, size: int, measure: Measure) -> float:
        """Mean of pretrained minus random; nan where an arm has no score."""
        scores = self.scores(size, measure)
        if len(scores) < 2 or np.isnan(scores["random"]).all():
            return math.nan
        return float(np.nanmean(scores["pretrained"] - scores["random"]))


def newest_parent(study: Study, tracker: Tracker, kind: str) -> tuple[MlflowRun, str]:
    """The newest `grid` or `search`, and the YAML that it was run with.

    Rather one of this very experiment, and of this study than of another one that shares its MLflow experiment.
    """
    found = tracker.runs(kind=kind)
    if not found:
        raise UserError(
            f"{without_password(tracker.uri)}: experiment {tracker.experiment!r} has no fine-tuning {kind} yet; run "
            "the study first"
        )
    configs = {run.info.run_id: (tracker.read(run.info.run_id, "experiment.yaml") or b"").decode() for run in found}
    # One that is taken up again keeps its start, so that the newest is the one that was touched last.
    touched = {run.info.run_id: max(run.info.start_time, run.info.end_time or 0) for run in found}
    given = _asked(dump(study))

    def fits(run: MlflowRun) -> tuple[bool, bool, int]:
        run_id = run.info.run_id
        return _asked(configs[run_id]) == given, run.data.tags.get(STUDY) == study.name, touched[run_id]

    newest = max(found, key=fits)
    return newest, configs[newest.info.run_id]


def _asked(config: str) -> dict[str, Any]:
    """An experiment's YAML without where its output lies, on which nothing depends."""
    tree = read_yaml(config, "experiment.yaml, as MLflow has it") or {}
    return {key: value for key, value in tree.items() if key not in _PLACES}


def read_results(study: Study, tracker: Tracker) -> Results:
    """Read the study's newest grid, its trials and the pretrainings that these started from; errors: `write_report`."""
    grid, config = newest_parent(study, tracker, "grid")
    # By key, not by parent: a cell that an earlier grid finished already is not trained again under this one.
    keys: dict[str, str] = json.loads(tracker.read(grid.info.run_id, CELLS) or b"{}")
    wanted = cells(study.finetune)
    if keys and not any(cell.name in keys for cell in wanted):
        raise UserError(
            f"{study.name}: its grid has none of the cells of this experiment (give the --set that the run was given): "
            f"it has {shown(', '.join(keys))}, and not {shown(', '.join(cell.name for cell in wanted))}"
        )
    newest = {run.data.tags[KEY]: run for run in reversed(tracker.runs(kind="trial"))}
    trials = [read_trial(tracker, cell, newest.get(keys.get(cell.name, ""))) for cell in wanted]
    bad = defaultdict(list)
    for row in json.loads(tracker.read(grid.info.run_id, BAD_VOLUMES) or b"[]"):
        bad[row["part"]].append(row["id"])
    lineage = dict.fromkeys(trial.pretraining_run for trial in trials if trial.pretraining_run)
    return conclude(
        study,
        grid,
        trials,
        config=config,
        as_given=_asked(config) == _asked(dump(study)),
        transfer=json.loads(tracker.read(grid.info.run_id, "weight_transfer.json") or b"null"),
        pretraining=[read_pretraining(tracker, run_id, number) for number, run_id in enumerate(lineage, start=1)],
        bad=bad,
    )


def conclude(study: Study, grid: MlflowRun, trials: Sequence[Trial], **more: Any) -> Results:
    """The results of trials that were read; `more` are the fields of `Results` that nothing is concluded from."""
    by_arm = defaultdict(list)
    for trial in in_runs(trials):
        by_arm[trial.cell.size, trial.cell.init].append(trial)
    inits = [init for init in ("random", "pretrained") if init in study.finetune.grid.init]
    arms: dict[int, dict[str, Arm]] = {
        size: {init: choose(by_arm[size, init]) for init in inits} for size in study.finetune.sizes
    }
    for pair in arms.values():
        if len(pair) == 2:
            check_precision(*pair.values())
    part: Part = "test" if any(trial.cases.get("test") for trial in trials) else "validation"
    common = {size: shared([arm for arm in pair.values() if arm.trials], part) for size, pair in arms.items()}
    comparisons = compare(arms, common, part, study.finetune.margin)
    controls = {size: choose(found) for size in arms if (found := by_arm[size, "permuted"])}
    return Results(study, grid, trials, arms, controls, part, common, comparisons, **more)


def read_curves(results: Results, tracker: Tracker) -> Curves:
    """Those of the trainings that have logged them."""
    runs = {trial.cell for arm in results.chosen for trial in arm.trials.values()}
    ids = {one.cell: one.run_id for one in results.trials if replace(one.cell, fold=None) in runs and one.run_id}
    curves = []
    for key in organ_keys(results.organs):
        found = {cell: tracker.history(run_id, f"validation/dice/{key}") for cell, run_id in ids.items()}
        curves.append({cell: curve for cell, curve in found.items() if curve})
    return curves
