"""The cells that a search has drawn from its space, and what became of them: an Optuna study in a file. Free of Ray.

The file, Optuna's journal, is synced at every draw, score and end, with the rungs of successive halving: a search that
was killed at any moment goes on from it. Ray Tune's own OptunaSearch and ASHAScheduler keep all this in memory, where
it would have to be put back piece by piece, and OptunaSearch takes a stopped trial's last score for a finished one's.
"""

import itertools
import json
import time
from pathlib import Path
from typing import Any

import optuna
from optuna.pruners import BasePruner, NopPruner, SuccessiveHalvingPruner
from optuna.samplers import RandomSampler, TPESampler
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import Trial, TrialState
from pydantic import BaseModel

from ssl_ray.config.overrides import leaves, read
from ssl_ray.config.schema import Search
from ssl_ray.random import number
from ssl_ray.search.cells import Cell
from ssl_ray.storage.files import write_file
from ssl_ray.storage.mirror import Mirror

STATUS = {
    TrialState.COMPLETE: "finished",
    TrialState.PRUNED: "stopped",
    TrialState.FAIL: "failed",
    TrialState.RUNNING: "unfinished",
}
"""What we call Optuna's states."""

_REDUCTION = 3
"""Of the cells that reach a rung, one in so many goes on to the next, which comes after so many times the steps
(asynchronous successive halving: Li et al., MLSys 2020)."""


def open_study(path: Path, name: str, mode: str, pruner: BasePruner | None = None) -> optuna.Study:
    """The Optuna study of this name in a journal; both are made if need be, and no other process may use it."""
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    content = path.read_bytes() if path.exists() else b""
    if not content.endswith(b"\n"):  # a line that was cut off, after which Optuna would read nothing
        write_file(path, content[: content.rfind(b"\n") + 1])
    path.with_name(f"{path.name}.lock").unlink(missing_ok=True)  # of a process that was killed
    storage, direction = JournalStorage(JournalFileBackend(str(path))), "maximize" if mode == "max" else "minimize"
    return optuna.create_study(
        storage=storage, study_name=name, direction=direction, pruner=pruner, load_if_exists=True
    )


class Proposals:
    """The cells of one search; Optuna calls them trials.

    Attributes:
        total: how many cells may be drawn.
        open: those that were drawn and have not ended.
    """

    def __init__(
        self,
        search: Search,
        base: Cell,
        experiment: BaseModel,
        path: Path,
        mirror: Mirror,
        name: str,
        seed: int,
        rung: int,
    ) -> None:
        """Args:
        base: what a cell is where the space does not draw it.
        experiment: without the search; it says which of the values drawn are read.
        name: of this search in the journal; another space has another.
        rung: steps of the first rung.
        """
        self.search, self.path, self._base, self._experiment = search, path, base, experiment
        self._mirror, self._seed = mirror, seed
        mirror.pull(path)
        halving = SuccessiveHalvingPruner(min_resource=rung, reduction_factor=_REDUCTION)
        self._study = open_study(path, name, search.mode, halving if search.scheduler == "asha" else NopPruner())
        self._spent, self._began = float(self._study.user_attrs.get("seconds", 0.0)), time.monotonic()
        self.total = search.samples
        if search.algorithm == "grid":
            choices = [[json.dumps(value) for value in one["choice"]] for one in search.space.values()]
            for values in itertools.product(*choices):
                self._study.enqueue_trial(dict(zip(search.space, values, strict=True)), skip_if_exists=True)
            self.total = len(self._study.get_trials(deepcopy=False))
        drawn = self._study.get_trials(states=(TrialState.RUNNING,))
        self.open = {self._cell(trial): trial for trial in (Trial(self._study, one._trial_id) for one in drawn)}

    @property
    def left(self) -> float:
        """Seconds that are left of the budget."""
        hours = self.search.budget
        return float("inf") if hours is None else 3600 * hours - self._seconds

    def counts(self) -> dict[str, int]:
        """Numbers of cells by status."""
        states = [trial.state for trial in self._study.get_trials(deepcopy=False)]
        return {status: states.count(state) for state, status in STATUS.items()}

    def draw(self) -> Cell | None:
        """A further cell, or None where there are enough; it depends on seed, number and what is known by then."""
        while (number_drawn := sum(self.counts().values())) < self.total:
            seed = number(self._seed, "search", number_drawn) % 2**32
            tpe = TPESampler(n_startup_trials=min(10, 1 + self.total // 3), seed=seed)
            self._study.sampler = tpe if self.search.algorithm == "optuna" else RandomSampler(seed)
            trial = self._study.ask()
            cell = self._cell(trial)
            if cell not in self.open:
                self.open[cell] = trial
                self._keep()
                return cell
            trial.set_user_attr("note", f"the same as number {self.open[cell].number}")
            self._study.tell(trial, state=TrialState.FAIL)
        return None

    def begin(self, cell: Cell, key: str) -> bool:
        """Whether a cell is to be trained; another of its key ends it as it has ended itself."""
        trial = self.open[cell]
        trial.set_user_attr("cell", dict(cell.overrides))
        trial.set_user_attr("key", key)
        for other in self._study.get_trials(deepcopy=False):
            if other.number != trial.number and other.user_attrs.get("key") == key:
                stopped = other.state == TrialState.PRUNED
                value = other.value if other.state == TrialState.COMPLETE else None
                self.end(cell, value, stopped, f"the same as number {other.number}")
                return False
        return True

    def report(self, cell: Cell, step: int, value: float) -> bool:
        """Keep a validation's score -> whether the cell is to be stopped; a repeated one changes nothing."""
        trial = self.open[cell]
        if step in self._study.get_trials(deepcopy=False)[trial.number].intermediate_values:
            return False
        trial.report(value, step)
        self._keep()
        return trial.should_prune()

    def end(self, cell: Cell, value: float | None = None, stopped: bool = False, note: str = "") -> None:
        """A cell has finished with a value, was stopped, or has failed."""
        trial = self.open.pop(cell)
        trial.set_user_attr("note", note)
        state = TrialState.PRUNED if stopped else TrialState.FAIL if value is None else TrialState.COMPLETE
        self._study.tell(trial, value, state)
        self._keep()

    @property
    def _seconds(self) -> float:
        return self._spent + time.monotonic() - self._began

    def _keep(self) -> None:
        self._study.set_user_attr("seconds", round(self._seconds, 1))
        self._mirror.push(self.path)

    def _cell(self, trial: Trial) -> Cell:
        """The values of a trial, to four digits; those that it has not drawn yet are drawn."""
        overrides: dict[str, Any] = dict(self._base.overrides)
        for key, one in self.search.space.items():
            ((kind, values),) = one.items()
            value: Any
            if kind == "choice":
                value = json.loads(trial.suggest_categorical(key, [json.dumps(choice) for choice in values]))
            elif kind == "int":
                value = trial.suggest_int(key, *values)
            else:
                drawn = trial.suggest_float(key, *values, log=kind == "loguniform")
                value = min(max(float(f"{drawn:.4g}"), values[0]), values[1])
            overrides |= leaves(key, value)
        apart = {key: overrides.pop(key) for key in ("size", "init")}
        return Cell(tuple(sorted({**apart, **read(self._experiment, overrides)}.items())), 0)
