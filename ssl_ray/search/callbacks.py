"""In the driver: what Ray Tune says of the trials becomes MLflow runs, one a cell, and the progress bar."""

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ray import cloudpickle, tune
from ray.exceptions import RayActorError

from ssl_ray.cluster.connect import first_error
from ssl_ray.console import Bar, say
from ssl_ray.finetune.job import TrialData
from ssl_ray.finetune.trial_folder import TrialFolder
from ssl_ray.pretrain.driver import Pretrained
from ssl_ray.search.cells import FAILURE, Cell
from ssl_ray.storage.mirror import Mirror
from ssl_ray.tracking.tracker import KEY, PRETRAINING_RUN, Run, Tracker


@dataclass
class _Open:
    """A run that is being written, the steps of it that are known, and how often its trial was started before."""

    run: Run
    known: set[int]
    starts: int
    failure: str = ""


class TrialCallback(tune.Callback):
    """A child run in MLflow for each cell: taken up again after a fault, without a step twice."""

    def __init__(
        self,
        params: Mapping[str, str],
        mirror: Mirror,
        tracker: Tracker,
        parent: str,
        pretrained: Pretrained | None,
        keys: Mapping[Cell, str],
        data: Mapping[int, TrialData],
        folders: Mapping[Cell, Path],
        bar: Bar,
        done: int,
    ) -> None:
        """Args:
        params: of every run.
        mirror: of the output.
        tracker: the study's MLflow experiment.
        parent: id of the grid's run.
        pretrained: where pretrained cells start from.
        keys: of every cell.
        data: of every split.
        folders: of every cell.
        bar: shows the steps of all cells.
        done: steps of cells that were finished before.
        """
        self._params, self._mirror, self._tracker = params, mirror, tracker
        self._parent, self._pretrained = parent, pretrained
        self._keys, self._data, self._folders, self._bar, self._done = keys, data, folders, bar, done
        self._open: dict[str, _Open] = {}
        self._steps: dict[str, int] = {}
        self._failed_before = {run.data.tags[KEY] for run in tracker.runs(kind="trial") if run.data.tags.get(FAILURE)}
        self.completed = 0
        self.failed: list[str] = []
        """Names of the cells that failed for good."""
        bar.update(done)

    def __getstate__(self) -> dict[str, Any]:
        """Nothing: Tune writes its callbacks to disk for `Tuner.restore`, which is not used."""
        return {}

    def on_trial_start(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """Open the cell's run; a trial that is tried again has it open."""
        if trial.trial_id in self._open:
            return
        cell: Cell = trial.config["cell"]
        params: dict[str, Any] = {name: value for name, value in self._params.items() if "grid" not in name}
        params |= {"split": cell.split, "init": cell.init, "lr": cell.lr, "seed": cell.seed}
        data = self._data[cell.split]  # a bad volume that was skipped makes it fewer than the split says
        params |= {f"{part}_volumes": len(getattr(data, part)) for part in ("training", "validation", "test")}
        tags = {}
        if self._pretrained and self._pretrained.run_id and cell.init == "pretrained":
            tags[PRETRAINING_RUN] = self._pretrained.run_id
        run = self._tracker.open("trial", self._keys[cell], cell.name, params, self._parent, tags)
        self._open[trial.trial_id] = _Open(run, set(run.logged("lr")), len(run.logged("started_at")))

    def on_trial_result(
        self, iteration: int, trials: list[Any], trial: Any, result: dict[str, Any], **info: Any
    ) -> None:
        """Log what MLflow does not know yet: after a fault, a trial says again what it said since its checkpoint."""
        entry, cell = self._open[trial.trial_id], trial.config["cell"]
        if "failure" in result:
            entry.failure = result["failure"]
        if "metrics" not in result:
            return
        step, metrics = int(result["step"]), result["metrics"]
        self._steps[trial.trial_id] = step
        loss = f"loss {metrics['loss']:.3f} ({cell.name})" if "loss" in metrics else ""
        self._bar.update(self._done + sum(self._steps.values()), loss)
        if "started_at" in metrics:  # once a start: 0, and after every fault the step that the trial went on from
            replayed = max(0, max(entry.known, default=0) - step)
            entry.run.metrics({"started_at": step, "replayed_steps": replayed}, entry.starts)
            entry.starts += 1
        elif "selected/step" in metrics:
            if step not in entry.run.logged("selected/step"):
                entry.run.metrics(metrics, step)
            self._mirror.pull(self._folders[cell] / "evaluation.json")
            entry.run.artifact(self._folders[cell] / "evaluation.json")
        elif step not in entry.known:
            entry.run.metrics(metrics, step)
            entry.known.add(step)

    def on_trial_recover(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """Say that and why a trial is tried again."""
        cause, _ = _cause(trial)
        say(f"fine-tuning: {trial.config['cell'].name} is tried again from its last checkpoint: {cause}")

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """End the run, as failed where the trial itself gave up."""
        entry, cell = self._open.pop(trial.trial_id), trial.config["cell"]
        if entry.failure:
            self._fail(entry.run, cell, entry.failure, entry.failure)
            return
        if self._keys[cell] in self._failed_before:
            entry.run.tags({FAILURE: ""})
        entry.run.close()
        self.completed += 1
        # Only now that MLflow has the result is there nothing left to go on from.
        TrialFolder(self._folders[cell], self._keys[cell], self._mirror).clear()

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """End the run as failed: this trial is not tried again. One that never started has no run yet."""
        self.on_trial_start(iteration, trials, trial)
        self._fail(self._open.pop(trial.trial_id).run, trial.config["cell"], *_cause(trial))

    def abandon(self) -> None:
        """End the runs of trials that were still going, e.g. after Ctrl-C; they are taken up again."""
        for entry in self._open.values():
            try:
                entry.run.close("KILLED")
            except Exception as error:  # the others are to be ended too, and what ended the grid is to be seen
                logging.getLogger(__name__).warning("%s", error)
        self._open.clear()

    def _fail(self, run: Run, cell: Cell, cause: str, error: str) -> None:
        run.tags({FAILURE: cause[:500]})
        run.text(error, "failure.txt")
        run.close("FAILED")
        self.failed.append(cell.name)
        say(f"fine-tuning: {cell.name} failed: {cause}")


def _cause(trial: Any) -> tuple[str, str]:
    """What ended a trial: in one line, and all that Ray has of it."""
    error = None
    if trial.pickled_error_file:  # on this machine; the copy in the storage path may not be there yet
        error = cloudpickle.loads(Path(trial.pickled_error_file).read_bytes())
    text = str(error) if error else Path(trial.error_file).read_text().rpartition("Failure # ")[2]
    if isinstance(error, RayActorError):
        return f"the trial's worker process died: {' '.join(text.split())[:300]}", text
    return first_error(text) or " ".join(text.split())[:300], text
