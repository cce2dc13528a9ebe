"""A search under Ray Tune, in rounds: between two of them the weights are made that its next cells start from.

A pretraining takes the whole cluster, and Ray Data would wait for CPUs as long as trials hold them all. Within a round,
a place that a trial leaves is taken by the next cell that needs nothing made.
"""

import json
import signal
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import ray
from pydantic import ValidationError
from ray.tune.search import Searcher

from ssl_ray.cluster.connect import check_resources
from ssl_ray.config.schema import Finetune
from ssl_ray.console import Bar, say
from ssl_ray.evaluate.scores import CaseScores, aggregate
from ssl_ray.finetune.job import TrialJob
from ssl_ray.search.callbacks import TrialCallback
from ssl_ray.search.cells import Cell
from ssl_ray.search.grid import tune_cells
from ssl_ray.search.proposals import Proposals
from ssl_ray.storage.folders import Folders
from ssl_ray.text import reason
from ssl_ray.tracking.tracker import Tracker


class Rounds(Searcher):
    """What Tune asks for cells; `jobs` are those of all cells so far."""

    def __init__(
        self, proposals: Proposals, job_of: Callable[[Cell, bool], TrialJob | None], done: Callable[[str], object]
    ) -> None:
        """Args:
        job_of: what a cell is trained with. Weights and volumes that are not there yet it makes if its second argument
            is true; if not, it gives None.
        done: whether the trial of a key has finished.
        """
        super().__init__()
        self.proposals, self._job_of, self._done = proposals, job_of, done
        self._waiting, self._ready = list(proposals.open), list[Cell]()
        self._cells: dict[str, Cell] = {}  # by id of the Tune trial
        self.jobs: dict[Cell, TrialJob] = {}

    def __getstate__(self) -> dict[str, Any]:
        """Nothing: Tune pickles it for `Tuner.restore`, which we do not use."""
        return {}

    def fill(self, places: int) -> bool:
        """Draw cells for so many places and make what they need -> whether there is anything to train.

        When the budget ends, so does a pretraining, as after Ctrl-C: it goes on when there is more.
        """
        waiting, self._waiting = self._waiting, []
        try:
            with _interrupted_after(self.proposals.left):
                while self.proposals.left > 0 and (waiting or len(self._ready) < places):
                    cell = waiting.pop(0) if waiting else self.proposals.draw()
                    if cell is None:
                        break
                    self._prepare(cell, make=True)
        except KeyboardInterrupt:
            if self.proposals.left > 0:
                raise
        if self.proposals.left <= 0:
            say("search: its budget is used up; with more, the same command goes on")
        return self.proposals.left > 0 and bool(self._ready)

    def suggest(self, trial_id: str) -> Any:
        """The next cell of this round with its job, or FINISHED."""
        while not (self._ready or self._waiting) and self.proposals.left > 0 and (cell := self.proposals.draw()):
            self._prepare(cell, make=False)
        if not self._ready or self.proposals.left <= 0:
            return self.FINISHED
        cell = self._cells[trial_id] = self._ready.pop(0)
        return {"cell": cell, "job": self.jobs[cell]}

    def stop(self, trial_id: str, result: Mapping[str, Any]) -> bool:
        """Whether a trial is to end with this record, before its last step."""
        cell, score = self._cells[trial_id], result.get("metrics", {}).get(f"validation/{self.proposals.search.metric}")
        worse = score is not None and self.proposals.report(cell, result["step"], score)
        going_on = "failure" not in result and result["step"] < self.jobs[cell].config.steps
        return going_on and (worse or self.proposals.left <= 0)

    def tell(self, cell: Cell, metrics: Mapping[str, float] | None) -> bool:
        """A cell has ended: stopped where there are no metrics, failed where they are None -> whether for good.

        What the budget cuts off goes on when there is more; what failed otherwise, the same command tries again.
        """
        stopped = metrics is not None and not metrics
        if not stopped or self.proposals.left > 0:
            self.proposals.end(
                cell, (metrics or {}).get(f"selected/validation/{self.proposals.search.metric}"), stopped
            )
        return cell not in self.proposals.open

    def on_trial_complete(self, trial_id: str, result: Any = None, error: bool = False) -> None:
        """Nothing: `tell` comes once MLflow knows of it."""

    def save(self, checkpoint_path: str) -> None:
        """Nothing: the proposals are on disk."""

    def _prepare(self, cell: Cell, make: bool) -> None:
        """A cell becomes ready, or waits for the next round, or ends: it cannot be trained, or was."""
        try:
            job = self._job_of(cell, make)
        except (ValidationError, FloatingPointError, RuntimeError) as error:
            say(f"search: {cell.name} is not trained: {reason(error)}")
            if not isinstance(error, RuntimeError):  # it would fail again
                self.proposals.end(cell, note=reason(error))
            return
        if job is None:
            self._waiting.append(cell)
        elif self.proposals.begin(cell, job.folder.key) and self._done(job.folder.key):  # killed before it was told
            tree = json.loads(job.folder.pull_evaluation().read_bytes())
            found = aggregate([CaseScores(**case) for case in tree["validation"]], tree["organs"])
            self.proposals.end(cell, found.get(self.proposals.search.metric))
        elif cell in self.proposals.open:
            self.jobs[cell] = job
            self._ready.append(cell)


@contextmanager
def _interrupted_after(seconds: float) -> Iterator[None]:
    """What Ctrl-C does comes after so many seconds by itself, unless they are infinite."""
    if seconds == float("inf"):
        yield
        return
    before = signal.signal(signal.SIGALRM, lambda *_: signal.raise_signal(signal.SIGINT))
    signal.setitimer(signal.ITIMER_REAL, max(seconds, 0) + 0.1)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def run_rounds(
    config: Finetune,
    rounds: Rounds,
    key: str,
    folders: Folders,
    tracker: Tracker,
    params: Mapping[str, str],
    made_by: Mapping[Path, str | None],
    config_yaml: str,
) -> tuple[str, ...]:
    """Train the cells of a search -> names of those that failed and that the same command tries again.

    `made_by` are the MLflow runs that made the cells' weights. The search's own run keeps `config_yaml`.
    """
    needed, there = (config.cpus_per_trial, config.gpus_per_trial), ray.cluster_resources()
    check_resources("finetune.cpus_per_trial, finetune.gpus_per_trial", "the steps of a trial", *needed)
    places = [there.get(name, 0.0) / share for name, share in zip(("CPU", "GPU"), needed, strict=True) if share]
    places += [float(config.max_concurrent_trials)] if config.max_concurrent_trials else []
    proposals, status = rounds.proposals, "FAILED"
    parent = tracker.open("search", key, "search", params)
    parent.text(config_yaml, "experiment.yaml")
    try:
        while rounds.fill(max(1, int(min(places)))):
            with Bar("search", proposals.total * config.steps) as bar:
                counts = proposals.counts()
                done = (sum(counts.values()) - counts["unfinished"]) * config.steps
                runs = TrialCallback(tracker, parent.id, params, rounds.jobs, made_by, bar, done, rounds.tell)
                try:
                    tune_cells(config, {}, folders, key, runs, rounds, rounds.stop)
                finally:
                    runs.abandon()
        status = "FINISHED"
    except KeyboardInterrupt:
        status = "KILLED"
        raise
    finally:
        parent.artifact(proposals.path)
        parent.close(status)
    counts = proposals.counts()
    say(f"search: {', '.join(f'{count} cells {status}' for status, count in counts.items() if count)}")
    return tuple(cell.name for cell in proposals.open) if proposals.left > 0 else ()
