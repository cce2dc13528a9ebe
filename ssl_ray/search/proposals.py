"""The cells that a search has drawn, and what became of them: an Optuna study in a file. Free of Ray.

The file, Optuna's journal, has every draw, score, rung and end: a search that was killed at any moment goes on from it.
Ray Tune's OptunaSearch and ASHAScheduler keep it in memory, and take a stopped trial's score for a finished one's.
"""

import itertools
import math
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import optuna
from optuna.pruners import NopPruner, SuccessiveHalvingPruner
from optuna.samplers import RandomSampler, TPESampler
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial, Trial, TrialState
from pydantic import BaseModel

from ssl_ray.config.overrides import placed
from ssl_ray.config.schema import Finetune, Search
from ssl_ray.config.search import LOGARITHMIC, WHOLE, drawn_number
from ssl_ray.random import number
from ssl_ray.search.cells import Cell
from ssl_ray.storage.files import write_file
from ssl_ray.storage.mirror import Mirror

_STATUS = {"COMPLETE": "finished", "PRUNED": "stopped", "FAIL": "failed", "RUNNING": "unfinished", "WAITING": ""}


def status(trial: FrozenTrial) -> str:
    """What became of a cell; nothing if it was not drawn yet."""
    return "repeated" if "repeats" in trial.user_attrs else _STATUS[trial.state.name]


def open_journal(path: Path, name: str, mode: str) -> optuna.Study:
    """The Optuna study of this name in a journal; both are made if need be, and no other process may use it."""
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    content = path.read_bytes() if path.exists() else b""
    if not content.endswith(b"\n"):  # a line that was cut off, after which Optuna would read nothing
        write_file(path, content[: content.rfind(b"\n") + 1])
    path.with_name(f"{path.name}.lock").unlink(missing_ok=True)  # of a process that was killed
    storage, direction = JournalStorage(JournalFileBackend(str(path))), StudyDirection[f"{mode.upper()}IMIZE"]
    return optuna.create_study(storage=storage, study_name=name, direction=direction, load_if_exists=True)


class Proposals:
    """The cells of one search, Optuna's trials: at most `total`, of which those that are `open` are being trained."""

    def __init__(
        self, search: Search, tuned: Finetune, experiment: BaseModel, path: Path, mirror: Mirror, name: str
    ) -> None:
        """The cells that the journal `path` has under this name, a digest of what the search depends on."""
        self.search, self.path, self._tuned, self._experiment = search, path, tuned, experiment
        self._mirror, self._name = mirror, name
        mirror.pull(path)
        self._drawn = open_journal(path, name, self.search.mode)
        # Li et al., MLSys 2020: one in three goes on from a rung to the next, at three times the steps.
        halving = SuccessiveHalvingPruner(min_resource=tuned.validate_every, reduction_factor=3)
        self._drawn.pruner = halving if self.search.scheduler == "asha" else NopPruner()
        self._began = time.monotonic() - float(self._drawn.user_attrs.get("seconds", 0.0))
        self.open: dict[Cell, Trial] = {}
        self.total = self.search.samples
        if self.search.algorithm == "grid":
            for values in itertools.product(*(_labels(one["choice"]) for one in self.search.space.values())):
                self._drawn.enqueue_trial(dict(zip(self.search.space, values, strict=True)), skip_if_exists=True)
            self.total = len(self._trials())

    def __getstate__(self) -> dict[str, Any]:
        """Nothing: Tune pickles `stop` into a file, and the experiment has the passwords of its URIs."""
        return {}

    @property
    def left(self) -> float:
        """Seconds that are left of the budget."""
        return 3600 * (self.search.budget or math.inf) - (time.monotonic() - self._began)

    def counts(self) -> Counter[str]:
        """Numbers of cells by status."""
        return Counter(filter(None, map(status, self._trials())))

    def unfinished(self) -> list[Trial]:
        """Cells that were drawn and have not ended."""
        return [Trial(self._drawn, one._trial_id) for one in self._trials() if one.state == TrialState.RUNNING]

    def draw(self) -> Trial | None:
        """A further cell, by the search, its number and what is known by then; None where there are enough."""
        if (drawn := self.counts().total()) >= self.total:
            return None
        seed = number(self._name, drawn) % 2**32
        tpe = TPESampler(n_startup_trials=min(10, 1 + self.total // 3), seed=seed)
        self._drawn.sampler = tpe if self.search.algorithm == "optuna" else RandomSampler(seed)
        return self._drawn.ask()

    def cell(self, trial: Trial) -> Cell:
        """The values of a trial, numbers to four digits; those that it has not drawn yet are drawn."""
        drawn: dict[str, Any] = {"size": self._tuned.sizes[0], "init": self._tuned.grid.init[0]}
        drawn["finetune.optimizer.lr"] = self._tuned.optimizer.lr
        for key, kind, values in ((key, *item) for key, one in self.search.space.items() for item in one.items()):
            if kind == "choice":
                labels = _labels(values)
                drawn[key] = values[labels.index(trial.suggest_categorical(key, labels))]
            elif kind in WHOLE:
                drawn[key] = trial.suggest_int(key, *values, log=kind in LOGARITHMIC)
            else:
                exact = trial.suggest_float(key, *values, log=kind in LOGARITHMIC)
                drawn[key] = drawn_number(exact, *values)
        if drawn["init"] == "random":
            drawn = {key: value for key, value in drawn.items() if not key.startswith("pretrain.")}
        chosen = {"size": drawn["size"], "init": drawn["init"], **placed(self._experiment, drawn)[1]}
        return Cell(tuple(sorted(chosen.items())), 0)

    def begin(self, trial: Trial, cell: Cell, key: str) -> bool:
        """Whether a cell is to be trained: no earlier one has its key."""
        trial.set_user_attr("cell", dict(cell.overrides))
        trial.set_user_attr("key", key)
        for other in self._trials()[: trial.number]:
            if other.user_attrs.get("key") == key:
                trial.set_user_attr("repeats", other.number)
                self.end(trial, TrialState.FAIL, note=f"the same as number {other.number}")
                return False
        self.open[cell] = trial
        self.keep()
        return True

    def stop(self, trial_id: str, result: Mapping[str, Any]) -> bool:
        """Keep the score in a record that Ray Tune got -> whether its trial is to end here, before its last step."""
        score = result.get("metrics", {}).get(f"validation/{self.search.metric}")
        if score is None:
            return False
        trial, step = self.open[result["config"]["cell"]], int(result["step"])
        if step in self._trials()[trial.number].intermediate_values:  # again, after a fault
            return False
        trial.report(score, step)
        self.keep()
        return trial.should_prune() and step < result["config"]["job"].config.steps

    def tell(self, cell: Cell, metrics: Mapping[str, float] | None) -> None:
        """A cell has finished with these metrics, was stopped where there are none, has failed where they are None."""
        value = (metrics or {}).get(f"selected/validation/{self.search.metric}")
        lost = TrialState.PRUNED if metrics == {} else TrialState.FAIL
        self.end(self.open.pop(cell), lost if value is None else TrialState.COMPLETE, value)

    def end(self, trial: Trial, state: TrialState, value: float | None = None, note: str = "") -> None:
        """Nothing more comes of a cell."""
        trial.set_user_attr("note", note)
        self._drawn.tell(trial, value, state)
        self.keep()

    def keep(self) -> None:
        """Write down how much of the budget is used up, and bring the journal to where it is kept."""
        self._drawn.set_user_attr("seconds", round(time.monotonic() - self._began, 1))
        self._mirror.push(self.path)

    def _trials(self) -> list[FrozenTrial]:
        return self._drawn.get_trials(deepcopy=False)


def _labels(values: Sequence[Any]) -> list[Any]:
    """Choices as Optuna takes them."""
    return [value if isinstance(value, str | int | float | None) else str(value) for value in values]
