"""Turns what Ray Tune tells the driver of its trials into MLflow runs, one for each cell, and a progress bar."""

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ray import cloudpickle, tune
from ray.exceptions import RayActorError

from ssl_ray.cluster.connect import first_error
from ssl_ray.console import Bar, say
from ssl_ray.search.cells import FAILURE, Cell
from ssl_ray.search.job import GridJob
from ssl_ray.tracking.tracker import KEY, PRETRAINING_RUN, Run, Tracker


@dataclass
class _Open:
    """The run of a trial that Tune has started and not ended."""

    run: Run
    known: set[int]
    """Steps that the run has metrics of."""
    starts: int
    """How often the trial was started before."""
    failure: str = ""
    """Why the trial gave up by itself."""


class TrialCallback(tune.Callback):
    """A child run in MLflow for each cell. After a fault it is continued, and no step is logged twice."""

    def __init__(
        self, job: GridJob, tracker: Tracker, parent: str, params: Mapping[str, str], bar: Bar, done: int
    ) -> None:
        """Args:
        job: the grid.
        tracker: the study's MLflow experiment.
        parent: id of the grid's run.
        params: of every run.
        bar: shows the steps of all cells.
        done: steps of cells that were finished before.
        """
        self._job, self._tracker, self._parent, self._params = job, tracker, parent, params
        self._bar, self._done = bar, done
        self._open: dict[str, _Open] = {}
        self._steps: dict[str, int] = {}
        self._failed_before = {run.data.tags[KEY] for run in tracker.runs(kind="trial") if run.data.tags.get(FAILURE)}
        self.completed = 0
        self.failed: list[str] = []
        """Names of the cells that failed for good."""
        bar.update(done)

    def __getstate__(self) -> dict[str, Any]:
        """Nothing: Tune pickles its callbacks for `Tuner.restore`, which we do not use."""
        return {}

    def on_trial_start(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """Open the cell's run, unless Tune only tries the trial again."""
        if trial.trial_id in self._open:
            return
        cell: Cell = trial.config["cell"]
        params: dict[str, Any] = {name: value for name, value in self._params.items() if "grid" not in name}
        params |= {"split": cell.split, "init": cell.init, "lr": cell.lr, "seed": cell.seed}
        data = self._job.data[cell.split]  # less than the split lists where bad volumes were skipped
        params |= {f"{part}_volumes": len(getattr(data, part)) for part in ("training", "validation", "test")}
        start = self._job.start(cell)
        tags = {PRETRAINING_RUN: start.run_id} if start and start.run_id else {}
        run = self._tracker.open("trial", self._job.keys[cell], cell.name, params, self._parent, tags)
        self._open[trial.trial_id] = _Open(run, set(run.logged("lr")), len(run.logged("started_at")))

    def on_trial_result(
        self, iteration: int, trials: list[Any], trial: Any, result: dict[str, Any], **info: Any
    ) -> None:
        """Log what MLflow does not know yet: after a fault, a trial repeats its records since the last checkpoint."""
        entry, cell = self._open[trial.trial_id], trial.config["cell"]
        if "failure" in result:
            entry.failure = result["failure"]
        if "metrics" not in result:
            return
        step, metrics = int(result["step"]), result["metrics"]
        self._steps[trial.trial_id] = step
        loss = f"loss {metrics['loss']:.3f} ({cell.name})" if "loss" in metrics else ""
        self._bar.update(self._done + sum(self._steps.values()), loss)
        if "started_at" in metrics:  # the first record of every start
            replayed = max(0, max(entry.known, default=0) - step)
            entry.run.metrics({"started_at": step, "replayed_steps": replayed}, entry.starts)
            entry.starts += 1
        elif "selected/step" in metrics:
            if step not in entry.run.logged("selected/step"):
                entry.run.metrics(metrics, step)
            entry.run.artifact(self._job.trial_folder(cell).pull_evaluation())
        elif step not in entry.known:
            entry.run.metrics(metrics, step)
            entry.known.add(step)

    def on_trial_recover(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """Say that a trial is tried again, and why."""
        cause, _ = _cause(trial)
        say(f"fine-tuning: {trial.config['cell'].name} is tried again from its last checkpoint: {cause}")

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """End the run; it has failed if the trial gave up by itself."""
        entry, cell = self._open.pop(trial.trial_id), trial.config["cell"]
        if entry.failure:
            self._fail(entry.run, cell, entry.failure, entry.failure)
            return
        if self._job.keys[cell] in self._failed_before:
            entry.run.tags({FAILURE: ""})
        entry.run.close()
        self.completed += 1
        self._job.trial_folder(cell).clear()  # not before the result is logged: until then a driver may need it

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """End the run as failed: Tune does not try this trial again."""
        self.on_trial_start(iteration, trials, trial)  # a trial that never started has no run yet
        self._fail(self._open.pop(trial.trial_id).run, trial.config["cell"], *_cause(trial))

    def abandon(self) -> None:
        """End the runs of trials that are still going, e.g. after Ctrl-C; the next command continues them."""
        for entry in self._open.values():
            try:
                entry.run.close("KILLED")
            except Exception as error:  # it must neither keep the other runs open nor hide what ended the grid
                logging.getLogger(__name__).warning("%s", error)
        self._open.clear()

    def _fail(self, run: Run, cell: Cell, cause: str, error: str) -> None:
        run.tags({FAILURE: cause[:500]})
        run.text(error, "failure.txt")
        run.close("FAILED")
        self.failed.append(cell.name)
        say(f"fine-tuning: {cell.name} failed: {cause}")


def _cause(trial: Any) -> tuple[str, str]:
    """What ended a trial: its cause in one line, and the whole text that Ray has of it."""
    error = None
    if trial.pickled_error_file:  # on this machine; Tune copies it to the storage path later
        error = cloudpickle.loads(Path(trial.pickled_error_file).read_bytes())
    text = str(error) if error else Path(trial.error_file).read_text().rpartition("Failure # ")[2]
    if isinstance(error, RayActorError):
        return f"the trial's worker process died: {' '.join(text.split())[:300]}", text
    return first_error(text) or " ".join(text.split())[:300], text
