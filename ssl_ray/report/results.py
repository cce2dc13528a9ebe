"""What MLflow knows of a study, and what can be concluded from it."""

import json
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np

from ssl_ray.config.loading import dump
from ssl_ray.config.schema import Study
from ssl_ray.errors import UserError
from ssl_ray.evaluate.scores import DICE_FOREGROUND, CaseScores
from ssl_ray.report.measures import Measure
from ssl_ray.report.statistics import Difference, difference
from ssl_ray.search.cells import CELLS, FAILURE, Cell, cells
from ssl_ray.text import without_password
from ssl_ray.tracking.tracker import KEY, PRETRAINING_RUN, Tracker

if TYPE_CHECKING:
    from mlflow.entities import Run as MlflowRun

SELECTION = f"selected/validation/{DICE_FOREGROUND}"
"""The metric by which a trial selects its checkpoint (`ssl_ray.finetune.trial`), and the report a learning rate."""

Part = Literal["validation", "test"]
Status = Literal["finished", "failed", "unfinished", "missing"]


@dataclass(frozen=True)
class Trial:
    """One cell of the grid and its newest run."""

    cell: Cell
    status: Status
    run_id: str | None = None
    metrics: Mapping[str, float] = field(default_factory=dict)
    """Last value of every metric."""
    curve: Mapping[int, float] = field(default_factory=dict)
    """Foreground Dice on validation, on the canonical grid, by step."""
    cases: Mapping[Part, Sequence[CaseScores]] = field(default_factory=dict)
    organs: Sequence[str] = ()
    """Names of the classes 1, 2, ..."""
    pretraining_run: str | None = None
    left_out: int = 0
    """How many bad volumes it did not train on."""
    failure: str = ""
    """Why it failed, in one line."""


@dataclass(frozen=True)
class Arm:
    """The finished trials, a seed each, of one split and initialisation at the learning rate best on validation."""

    expected: int
    """Number of seeds in the grid."""
    trials: Sequence[Trial] = ()
    hole: Status = "finished"
    """Why there is no finished trial."""

    @property
    def lr(self) -> float:
        """The learning rate that was chosen, where any trial has finished."""
        return self.trials[0].cell.lr

    def seeds(self, metric: str) -> list[float]:
        """The metric of every seed that has it."""
        return [trial.metrics[metric] for trial in self.trials if metric in trial.metrics]

    def scores(self, part: Part, measure: Measure) -> dict[str, dict[int, float]]:
        """The measure by case id and seed, in the order of the cases; volumes without any organ are left out."""
        found: dict[str, dict[int, float]] = defaultdict(dict)
        for trial in self.trials:
            for case in trial.cases[part]:
                if (score := measure.of(case)) is not None:
                    found[case.case][trial.cell.run] = score
        return dict(found)


@dataclass(frozen=True)
class PretrainingRun:
    """One pretraining run. Its losses are L1 by step, where the HU window is 0 to 1."""

    run: "MlflowRun"
    loss: Mapping[int, float]
    validation_loss: Mapping[int, float]
    identity_loss: Mapping[int, float]
    """Validation loss of leaving patches corrupted."""
    picture: bytes | None
    """PNG of the last restoration."""
    suffix: str
    """End of the names of this run's figures: empty for the first run, then `_2`, `_3`, ..."""


@dataclass(frozen=True)
class Results:
    """Everything that the report is made of."""

    study: Study
    grid: "MlflowRun"
    config: str
    """The experiment that the grid was run with, in YAML."""
    as_given: bool
    """Whether this is the very experiment that was given now."""
    transfer: dict[str, Any] | None
    """Report of the weight transfer, as `ssl_ray.networks.transfer` writes it."""
    trials: Sequence[Trial]
    """One for every cell of the study's grid, in the grid's order."""
    arms: Mapping[int, Mapping[str, Arm]]
    """By number of labelled training volumes, ascending, and by the grid's initialisations, random first."""
    part: Part
    """The volumes that are reported: test where the cohort has such a split."""
    pretraining: Sequence[PretrainingRun]

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
    def chosen(self) -> list[Arm]:
        """The arms that have a learning rate."""
        return [arm for arms in self.arms.values() for arm in arms.values() if arm.trials]

    def count(self, part: Part) -> int:
        """Number of validation or test volumes that were scored."""
        return max(len(trial.cases.get(part, ())) for trial in self.trials)

    def metric(self, name: str) -> str:
        """Name in MLflow of a metric of the selected checkpoint, over the volumes that are reported."""
        return f"selected/{self.part}/{name}"

    def compare(self, split: int, measure: Measure) -> Difference | None:
        """Pretrained minus random, paired by volume; None where one of them has no scores."""
        if len(self.arms[split]) < 2:
            return None
        random, pretrained = (arm.scores(self.part, measure) for arm in self.arms[split].values())
        shared = [case for case in random if case in pretrained]
        if not shared:
            return None
        # A volume's organs are those of its truth, so that every seed has scored the same volumes.
        seeds = [seed for seed in random[shared[0]] if seed in pretrained[shared[0]]]
        values = [np.mean([*pretrained[case].values()]) - np.mean([*random[case].values()]) for case in shared]
        by_seed = [np.mean([pretrained[case][seed] - random[case][seed] for case in shared]) for seed in seeds]
        return difference(np.array(values), np.array(by_seed))


def read_results(study: Study, tracker: Tracker) -> Results:
    """Read the study's newest grid, its trials and the pretrainings that these started from.

    Raises:
        UserError: when the study has no grid in MLflow yet.
    """
    grids = tracker.runs(kind="grid")
    if not grids:
        raise UserError(
            f"{without_password(tracker.uri)}: experiment {tracker.experiment!r} has no fine-tuning grid yet; run the "
            "study first"
        )
    configs = {run.info.run_id: (tracker.read(run.info.run_id, "experiment.yaml") or b"").decode() for run in grids}
    # A grid that is taken up again keeps its start, so that the newest is the one that was touched last.
    touched = {run.info.run_id: max(run.info.start_time, run.info.end_time or 0) for run in grids}
    given = dump(study)
    grid = max(grids, key=lambda run: (configs[run.info.run_id] == given, touched[run.info.run_id]))
    # By key, not by parent: a cell that an earlier grid finished already is not trained again under this one.
    keys: dict[str, str] = json.loads(tracker.read(grid.info.run_id, CELLS) or b"{}")
    newest = {run.data.tags[KEY]: run for run in reversed(tracker.runs(kind="trial"))}
    trials = [_trial(tracker, cell, newest.get(keys.get(cell.name, ""))) for cell in cells(study.finetune)]
    by_arm = defaultdict(list)
    for trial in trials:
        by_arm[trial.cell.size, trial.cell.init].append(trial)
    inits = [init for init in ("random", "pretrained") if init in study.finetune.grid.init]
    lineage = dict.fromkeys(trial.pretraining_run for trial in trials if trial.pretraining_run)
    return Results(
        study=study,
        grid=grid,
        config=configs[grid.info.run_id],
        as_given=configs[grid.info.run_id] == given,
        transfer=json.loads(tracker.read(grid.info.run_id, "weight_transfer.json") or b"null"),
        trials=trials,
        arms={split: {init: _arm(by_arm[split, init]) for init in inits} for split in study.finetune.sizes},
        part="test" if any(trial.cases.get("test") for trial in trials) else "validation",
        pretraining=[_pretraining(tracker, run_id, number) for number, run_id in enumerate(lineage, start=1)],
    )


def _trial(tracker: Tracker, cell: Cell, run: "MlflowRun | None") -> Trial:
    if run is None:
        return Trial(cell, "missing")
    # A run that was killed was interrupted: it goes on when the study is run again.
    statuses: dict[str, Status] = {"FINISHED": "finished", "FAILED": "failed"}
    status = statuses.get(run.info.status, "unfinished")
    run_id, tags = run.info.run_id, run.data.tags
    tree: dict[str, Any] = json.loads(tracker.read(run_id, "evaluation.json") or b"{}")
    return Trial(
        cell,
        status,
        run_id,
        metrics=run.data.metrics,
        curve=tracker.history(run_id, f"validation/{DICE_FOREGROUND}"),
        cases={part: [CaseScores(**case) for case in tree.get(part, ())] for part in get_args(Part)},
        organs=tree.get("organs", ()),
        pretraining_run=tags.get(PRETRAINING_RUN),
        left_out=cell.size - int(run.data.params.get("training_volumes", cell.size)),
        failure=tags.get(FAILURE, "") if status == "failed" else "",
    )


def _arm(trials: Sequence[Trial]) -> Arm:
    """The trials at the learning rate with the highest mean of `SELECTION` over seeds.

    One with more finished seeds goes first, so that a learning rate at which trials fail does not win by those that
    survived.
    """
    by_lr = defaultdict(list)
    for trial in trials:
        if trial.status == "finished":
            by_lr[trial.cell.lr].append(trial)
    expected = len({trial.cell.run for trial in trials})
    if not by_lr:
        return Arm(
            expected, hole=min((trial.status for trial in trials), key=("failed", "unfinished", "missing").index)
        )

    def rank(trials: Sequence[Trial]) -> tuple[int, float]:
        return len(trials), float(np.mean([trial.metrics.get(SELECTION, 0.0) for trial in trials]))

    return Arm(expected, max(by_lr.values(), key=rank))


def _pretraining(tracker: Tracker, run_id: str, number: int) -> PretrainingRun:
    pictures = tracker.files(run_id, "pictures")
    return PretrainingRun(
        run=tracker.client.get_run(run_id),
        loss=tracker.history(run_id, "loss"),
        validation_loss=tracker.history(run_id, "validation_loss"),
        identity_loss=tracker.history(run_id, "validation_identity_loss"),
        picture=tracker.read(run_id, pictures[-1]) if pictures else None,
        suffix=f"_{number}" if number > 1 else "",
    )
