"""Turns what Ray Tune tells the driver of its trials into MLflow runs, one for each cell, and a progress bar."""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ray import tune

from ssl_ray.cluster.connect import first_error
from ssl_ray.config.loading import flatten
from ssl_ray.console import Bar, say
from ssl_ray.evaluate.planes import FILE
from ssl_ray.evaluate.scores import DICE_FOREGROUND, ORIGINAL_DICE_FOREGROUND
from ssl_ray.finetune.job import EVALUATION, TrialJob
from ssl_ray.networks.model_file import MODEL_FILE
from ssl_ray.search.cells import CELL, FAILURE, NONFINITE, RATE, STOPPED, Cell
from ssl_ray.tracking.client import DEVICE
from ssl_ray.tracking.models import told
from ssl_ray.tracking.run import NetworkFile
from ssl_ray.tracking.tracker import NOTE, PRETRAINING_RUN, Run, Tracker
from ssl_ray.tracking.view import DICE, run_link


@dataclass(eq=False)
class TrialCallback(tune.Callback):
    """A child run in MLflow for each cell. After a fault it is continued, and no step is logged twice."""

    tracker: Tracker
    parent: str
    """Id of the grid's run."""
    params: Mapping[str, str]
    """Of every run, but for those of the grid."""
    bar: Bar
    done: int
    """Number of cells that were finished before."""
    steps: int
    """By which the bar counts a cell, whatever number of its own a search has given it."""
    tell: Callable[[Cell, Mapping[str, float] | None], None] = lambda cell, metrics: None
    """Is told of a cell that is not to be tried again: finished with metrics, stopped without any, None: not finite."""
    completed: int = 0
    """Number of cells that ended with a result."""
    failed: list[str] = field(default_factory=list)
    """Names of the cells that failed for good."""
    _open: dict[str, Run] = field(default_factory=dict)
    _steps: dict[str, int] = field(default_factory=dict)

    def __getstate__(self) -> dict[str, Any]:
        """Nothing: Tune pickles its callbacks for `Tuner.restore`, which we do not use."""
        return {}

    def on_trial_start(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """Open the cell's run, unless Tune only tries the trial again."""
        if trial.trial_id in self._open:
            return
        cell, job = _of(trial)
        params: dict[str, Any] = {**self.params, **flatten(job.config, "finetune."), **flatten(job.network, "network.")}
        params |= {"size": cell.size, "init": cell.init, "lr": cell.lr} | dict(cell.settings)
        # MLflow compares runs by the first parameters that differ: these three, and by no other name.
        params = {name: value for name, value in params.items() if "grid" not in name and name != RATE}
        # Fewer volumes than a split lists where bad ones were skipped.
        params |= {f"{part}_volumes": len(getattr(job.data, part)) for part in ("training", "validation", "test")}
        tags = {FAILURE: "", NONFINITE: "", STOPPED: ""}  # of an earlier attempt
        tags |= {
            CELL: cell.name,
            "ssl_ray.run": str(cell.run),
            "ssl_ray.seed": str(job.seed),
            NOTE: _describe(cell, job, self.parent),
        }
        tags |= {} if cell.fold is None else {"ssl_ray.fold": str(cell.fold)}
        if job.made_by:
            tags[PRETRAINING_RUN] = job.made_by
        run = self.tracker.open("trial", job.key, cell.label, params, self.parent, tags)
        run.datasets([*_datasets(cell, job).values()])
        self._open[trial.trial_id] = run

    def on_trial_result(
        self, iteration: int, trials: list[Any], trial: Any, result: dict[str, Any], **info: Any
    ) -> None:
        """Log what MLflow does not know yet: after a fault, a trial repeats its records since the last checkpoint."""
        if "failure" in result:
            return
        run, step, metrics = self._open[trial.trial_id], result["step"], result["metrics"]
        self._steps[trial.trial_id] = step * self.steps // _of(trial)[1].config.steps
        loss = f"loss {metrics['loss']:.3f} ({_of(trial)[0].name})" if "loss" in metrics else ""
        self.bar.update(self.done * self.steps + sum(self._steps.values()), loss)
        if "started_at" in metrics:  # the first record of every start
            run.started(step)
            run.params({"precision": result["precision"]})
            run.tags({DEVICE: result["device"]})
        elif "selected/step" in metrics:
            if step not in run.logged("selected/step"):
                self._result(run, *_of(trial), metrics, result["digest"], step)
            job = _of(trial)[1]
            for path in (job.folder / EVALUATION, job.folder / FILE):
                job.mirror.pull(path)  # another machine may have written it
                run.artifact(path)
        else:
            run.metrics(metrics, step)

    def on_trial_recover(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """Say that a trial is tried again, and why."""
        cause, _ = _cause(trial)
        say(f"fine-tuning: {_of(trial)[0].name} is tried again from its last checkpoint: {cause}")

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """End the run; it has failed if the trial gave up by itself."""
        cell, job = _of(trial)
        if failure := trial.last_result.get("failure"):
            self._fail(trial, failure, failure, {NONFINITE: "true"} if trial.last_result.get("nonfinite") else {})
            return
        run, metrics = self._open.pop(trial.trial_id), trial.last_result["metrics"]
        self._steps[trial.trial_id] = self.steps
        if stopped := "selected/step" not in metrics:
            run.tags({STOPPED: f"at step {trial.last_result['step']}"})
        run.close("KILLED" if stopped else "FINISHED")
        self.completed += not stopped
        self.tell(cell, {} if stopped else metrics)
        job.clear()  # not before the result is logged: until then a driver may need it

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """End the run as failed: Tune does not try this trial again."""
        self.on_trial_start(iteration, trials, trial)  # a trial that never started has no run yet
        self._fail(trial, *_cause(trial))

    def _result(
        self, run: Run, cell: Cell, job: TrialJob, metrics: Mapping[str, float], digest: str, step: int
    ) -> None:
        """Log the network, what it scored, and both in words."""
        part = "test" if f"selected/test/{ORIGINAL_DICE_FOREGROUND}" in metrics else "validation"
        name, weights, settings = cell.file_name.replace(".", "_"), job.folder / MODEL_FILE, job.config.preparation
        grid = settings.channels, settings.spacing
        run.model(NetworkFile(name, str(weights), digest, int(metrics["selected/step"]), True, *grid))
        read = _datasets(cell, job).items()
        scored = {f"selected/{part}": (told["name"], told["digest"]) for part, told in read if part != "training"}
        dice = metrics.get(f"selected/{part}/{ORIGINAL_DICE_FOREGROUND}")
        reported = {} if dice is None else {DICE: dice}  # no volume has an organ
        run.metrics({**reported, **metrics}, step, {DICE: scored[f"selected/{part}"], **scored})
        run.tags({NOTE: _describe(cell, job, self.parent, metrics, part)})

    def abandon(self) -> None:
        """End the runs of trials that are still going, e.g. after Ctrl-C; the next command continues them."""
        while self._open:
            self._open.popitem()[1].close("KILLED")

    def _fail(self, trial: Any, cause: str, error: str, tags: Mapping[str, str] | None = None) -> None:
        run, (cell, _) = self._open.pop(trial.trial_id), _of(trial)
        run.tags({FAILURE: cause[:500], **(tags or {})})
        run.text(error, "failure.txt")
        run.close("FAILED")
        if tags:  # it would fail again
            self.tell(cell, None)
        self.failed.append(cell.name)
        say(f"fine-tuning: {cell.name} failed: {cause}")


def _of(trial: Any) -> tuple[Cell, TrialJob]:
    """What Tune was given for a trial."""
    return trial.config["cell"], trial.config["job"]


def _cause(trial: Any) -> tuple[str, str]:
    """What ended a trial: its cause in one line, and the whole text that Ray has of it."""
    newest = Path(trial.error_file).read_text().rpartition("Failure # ")[2]
    _, _, text = newest.partition("\n")
    if cause := first_error(text):
        return cause, text
    died = "the trial's worker process died: " if re.search(r"The actor\b.*\b(died|unavailable)", text) else ""
    return died + " ".join(text.split())[:300], text


def _datasets(cell: Cell, job: TrialJob) -> dict[str, dict[str, Any]]:
    """The labelled volumes of a trial, by those of its parts that have some."""
    root, found = Path(job.config.cohort.root), {}
    for part in ("training", "validation", "test"):
        name = f"{root.name} {part}" + (f" {cell.size}, run {cell.run}" if part == "training" else "")
        if volumes := getattr(job.data, part):
            found[part] = told(part, name, str(root.absolute()), [(one.key, one.subject) for one in volumes])
    return found


def _describe(
    cell: Cell, job: TrialJob, parent: str, metrics: Mapping[str, float] | None = None, part: str = "test"
) -> str:
    """A trial in Markdown: what it scored on the `part` that is reported, what it started from, where the answer is."""
    text = []
    if metrics:
        dice, selected = metrics.get(f"selected/{part}/{ORIGINAL_DICE_FOREGROUND}"), int(metrics["selected/step"])
        score = "no organ to score" if dice is None else f"**foreground Dice {dice:.3f}**, original grid"
        on = f"{len(getattr(job.data, part))} {part} volumes"
        best = metrics.get(f"selected/validation/{DICE_FOREGROUND}", float("nan"))
        text.append(f"{score}, on {on}. Weights of step {selected:,}, the best on validation ({best:.3f}).")
    start = {"random": "random weights", "permuted": "pretrained weights, shuffled", "pretrained": "pretrained weights"}
    lineage = start[cell.init] + (f" of {run_link(job.made_by, 'this pretraining')}" if job.made_by else "")
    kind, volumes = job.network.kind.upper(), len(job.data.training)
    text.append(f"{kind} trained on {volumes} labelled volumes for {job.config.steps:,} steps, from {lineage}.")
    text.append(f"Answer, table and report: {run_link(parent, 'the run of all cells')}.")
    return "\n\n".join(text)
