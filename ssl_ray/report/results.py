"""What MLflow knows of a study, and what can be concluded from it."""

import json
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from ssl_ray.config.loading import dump
from ssl_ray.config.schema import Study
from ssl_ray.errors import UserError
from ssl_ray.evaluate.scores import DICE_FOREGROUND, CaseScores
from ssl_ray.report.measures import Measure
from ssl_ray.report.statistics import Difference, difference
from ssl_ray.search.cells import CELLS, FAILURE, Cell, cells
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
    cases: Mapping[str, tuple[CaseScores, ...]] = field(default_factory=dict)
    """Scores of every volume by part (`validation`, `test`)."""
    pretraining_run: str | None = None
    training_volumes: int = 0
    """How many it trained on; 0 where the run does not say."""
    failure: str = ""
    """Why it failed, in one line."""


@dataclass(frozen=True)
class Arm:
    """The finished trials, a seed each, of one split and initialisation at the learning rate best on validation.

    Without a finished trial there is no learning rate, and `hole` says why.
    """

    split: int
    init: str
    expected: int
    """Number of seeds in the grid."""
    trials: tuple[Trial, ...] = ()
    hole: Status = "finished"

    @property
    def lr(self) -> float | None:
        """The learning rate that was chosen."""
        return self.trials[0].cell.lr if self.trials else None

    def seeds(self, metric: str) -> list[float]:
        """The metric of every seed that has it."""
        return [trial.metrics[metric] for trial in self.trials if metric in trial.metrics]

    def scores(self, part: Part, measure: Measure) -> dict[int, dict[str, float]]:
        """The measure by seed and case id; volumes without any organ are left out."""
        return {
            trial.cell.seed: {
                case.case: score for case in trial.cases.get(part, ()) if not np.isnan(score := measure.of(case))
            }
            for trial in self.trials
        }

    def cases(self, part: Part, measure: Measure) -> dict[str, float]:
        """The measure of every volume as mean over seeds, by case id, in the order of the cases."""
        by_seed = list(self.scores(part, measure).values())
        ids = dict.fromkeys(case for scores in by_seed for case in scores)
        return {case: float(np.mean([scores[case] for scores in by_seed if case in scores])) for case in ids}


@dataclass(frozen=True)
class PretrainingRun:
    """One pretraining run, as far as the report shows it."""

    run: "MlflowRun"
    loss: Mapping[int, float]
    validation_loss: Mapping[int, float]
    identity_loss: Mapping[int, float]
    """All three are L1 by step, where the HU window is 0 to 1. `identity_loss` is that of leaving patches corrupted."""
    picture: bytes | None
    """PNG of the last restoration."""
    suffix: str
    """End of the names of this run's figures: empty for the first run, then `_2`, `_3`, ..."""


@dataclass(frozen=True)
class Results:
    """Everything that the report is made of."""

    study: Study
    grid: "MlflowRun"
    trials: tuple[Trial, ...]
    """One for every cell of the study's grid, in the grid's order."""
    as_given: bool
    """Whether the grid was run with this very experiment."""
    others: int
    """Trials of the same grid run that the study's grid does not name."""
    part: Part
    """The volumes that are reported: test where the cohort has such a split."""
    organs: tuple[str, ...]
    """Names of the classes 1, 2, ..."""
    config: str
    """The experiment that the grid was run with, in YAML; empty where the run does not have it."""
    transfer: dict[str, Any] | None
    """Report of the weight transfer, as `ssl_ray.networks.transfer` writes it."""
    pretraining: tuple[PretrainingRun, ...]

    @property
    def splits(self) -> tuple[int, ...]:
        """Numbers of labelled training volumes, ascending."""
        return self.study.finetune.split_sizes

    @property
    def inits(self) -> tuple[str, ...]:
        """The grid's initialisations, random first."""
        return tuple(init for init in ("random", "pretrained") if init in self.study.finetune.grid.init)

    @property
    def finished(self) -> list[Trial]:
        """The trials that have results."""
        return [trial for trial in self.trials if trial.status == "finished"]

    def count(self, part: Part) -> int:
        """Number of validation or test volumes that were scored."""
        return max((len(trial.cases.get(part, ())) for trial in self.trials), default=0)

    def metric(self, name: str) -> str:
        """Name in MLflow of a metric of the selected checkpoint, over the volumes that are reported."""
        return f"selected/{self.part}/{name}"

    def arms(self, split: int) -> list[Arm]:
        """The split's arms, one for every initialisation in the grid, random first."""
        return [self.arm(split, init) for init in self.inits]

    def arm(self, split: int, init: str) -> Arm:
        """The chosen cells of a split and an initialisation.

        The learning rate with the highest mean of `SELECTION` over seeds is chosen. One with more finished seeds goes
        first, so that a learning rate at which trials fail does not win by those that survived.
        """
        mine = [trial for trial in self.trials if (trial.cell.split, trial.cell.init) == (split, init)]
        expected = len(self.study.finetune.grid.seeds)
        by_lr: dict[float, list[Trial]] = defaultdict(list)
        for trial in mine:
            if trial.status == "finished":
                by_lr[trial.cell.lr].append(trial)
        if not by_lr:
            seen = {trial.status for trial in mine}
            holes: tuple[Status, ...] = ("failed", "unfinished")
            return Arm(split, init, expected, hole=next((hole for hole in holes if hole in seen), "missing"))

        def rank(trials: list[Trial]) -> tuple[int, float]:
            return len(trials), float(np.mean([trial.metrics.get(SELECTION, 0.0) for trial in trials]))

        best = max(by_lr.values(), key=rank)
        return Arm(split, init, expected, tuple(best))

    def compare(self, split: int, measure: Measure) -> Difference | None:
        """Pretrained minus random, paired by volume; None where one of them has no scores."""
        random, pretrained = (self.arm(split, init) for init in ("random", "pretrained"))
        before, after = random.cases(self.part, measure), pretrained.cases(self.part, measure)
        shared = [case for case in before if case in after]
        if not shared:
            return None
        ours, theirs = pretrained.scores(self.part, measure), random.scores(self.part, measure)
        by_seed = [
            np.mean([ours[seed][case] - theirs[seed][case] for case in shared if case in ours[seed]])
            for seed in theirs
            if ours.get(seed)
        ]
        return difference(np.array([after[case] - before[case] for case in shared]), np.array(by_seed))


def read_results(study: Study, tracker: Tracker) -> Results:
    """Read the study's newest grid, its trials and the pretrainings that these started from.

    Raises:
        UserError: when the study has no grid in MLflow yet.
    """
    grids = tracker.runs(kind="grid")
    if not grids:
        raise UserError(
            f"{tracker.uri}: experiment {tracker.experiment!r} has no fine-tuning grid yet; run the study first"
        )
    # A grid that is taken up again keeps its start, so that the newest is the one that was touched last.
    grids.sort(key=lambda run: max(run.info.start_time, run.info.end_time or 0), reverse=True)
    configs = {run.info.run_id: tracker.read(run.info.run_id, "experiment.yaml") or b"" for run in grids}
    same = [run for run in grids if configs[run.info.run_id] == dump(study).encode()]
    grid = (same or grids)[0]
    # By key, not by parent: a cell that an earlier grid finished already is not trained again under this one.
    keys: dict[str, str] = json.loads(tracker.read(grid.info.run_id, CELLS) or b"{}")
    newest: dict[str, MlflowRun] = {}
    for run in tracker.runs(kind="trial"):
        newest.setdefault(run.data.tags[KEY], run)
    named = {cell: keys.get(cell.name, "") for cell in cells(study.finetune)}
    read = [_trial(tracker, cell, newest.get(key)) for cell, key in named.items()]
    trials = tuple(trial for trial, _ in read)
    lineage = dict.fromkeys(trial.pretraining_run for trial in trials if trial.pretraining_run)
    children = {run.data.tags[KEY] for run in tracker.runs(kind="trial", parent=grid.info.run_id)}
    return Results(
        study=study,
        grid=grid,
        trials=trials,
        as_given=bool(same),
        others=len(children - set(named.values())),
        part="test" if any(trial.cases.get("test") for trial in trials) else "validation",
        organs=next((organs for _, organs in read if organs), ()),
        config=configs[grid.info.run_id].decode(),
        transfer=json.loads(tracker.read(grid.info.run_id, "weight_transfer.json") or b"null"),
        pretraining=tuple(_pretraining(tracker, run_id, number) for number, run_id in enumerate(lineage, start=1)),
    )


def _trial(tracker: Tracker, cell: Cell, run: "MlflowRun | None") -> tuple[Trial, tuple[str, ...]]:
    """The trial, and the organs that it names."""
    if run is None:
        return Trial(cell, "missing"), ()
    run_id, lineage = run.info.run_id, run.data.tags.get(PRETRAINING_RUN)
    if run.info.status == "FAILED":
        return Trial(cell, "failed", run_id, pretraining_run=lineage, failure=run.data.tags.get(FAILURE, "")), ()
    if run.info.status != "FINISHED":
        # A run that was killed was interrupted: it goes on when the study is run again.
        return Trial(cell, "unfinished", run_id, pretraining_run=lineage), ()
    tree: dict[str, Any] = json.loads(tracker.read(run_id, "evaluation.json") or b"{}")
    parts = {name: tuple(CaseScores(**case) for case in tree.get(name, ())) for name in ("validation", "test")}
    curve = tracker.history(run_id, f"validation/{DICE_FOREGROUND}")
    volumes = int(run.data.params.get("training_volumes", 0))
    trial = Trial(cell, "finished", run_id, run.data.metrics, curve, parts, lineage, volumes)
    return trial, tuple(tree.get("organs", ()))


def _pretraining(tracker: Tracker, run_id: str, number: int) -> PretrainingRun:
    pictures = [path for path in tracker.files(run_id, "pictures") if path.endswith(".png")]
    return PretrainingRun(
        run=tracker.client.get_run(run_id),
        loss=tracker.history(run_id, "loss"),
        validation_loss=tracker.history(run_id, "validation_loss"),
        identity_loss=tracker.history(run_id, "validation_identity_loss"),
        picture=tracker.read(run_id, pictures[-1]) if pictures else None,
        suffix=f"_{number}" if number > 1 else "",
    )
