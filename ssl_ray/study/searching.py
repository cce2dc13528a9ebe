"""A search as the study carries it out, in rounds: between two of them the weights are made that its next cells need.

A pretraining takes the whole cluster, and Ray Data would wait for CPUs as long as trials hold them all. Within a round,
a place that a trial leaves is taken by the next cell that needs nothing made.
"""

import math
import signal
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain, islice
from typing import Any

import ray
from optuna.trial import TrialState
from pydantic import ValidationError

from ssl_ray.config import depends
from ssl_ray.config.loading import dump
from ssl_ray.config.schema import Study
from ssl_ray.config.search import resolved
from ssl_ray.console import Bar, say
from ssl_ray.errors import UserError
from ssl_ray.finetune.job import TrialJob
from ssl_ray.pretrain.driver import Pretrained, known_pretraining, pretrain
from ssl_ray.search.callbacks import TrialCallback
from ssl_ray.search.cells import JOURNAL, Cell
from ssl_ray.search.grid import trial_jobs, tune_cells
from ssl_ray.search.proposals import Proposals
from ssl_ray.storage.folders import Folders
from ssl_ray.study.cohorts import PreparedCohorts, prepare_cohorts, read_cohorts
from ssl_ray.study.parts import recipe_of, run_params
from ssl_ray.text import reason
from ssl_ray.tracking.run import ending
from ssl_ray.tracking.tracker import Tracker


@dataclass(eq=False)
class Rounds:
    """The cells of a search, each with the job of its trial."""

    study: Study
    proposals: Proposals
    folders: Folders
    tracker: Tracker
    prepared: PreparedCohorts
    given: Sequence[Pretrained] = ()
    """Weights that pretrained cells start from, instead of each from those of its own pretraining settings."""

    def __post_init__(self) -> None:
        self._waiting = self.proposals.unfinished()
        self._volumes = {_preparations(self.study): self.prepared}

    def __call__(self, places: int) -> Iterator[Iterator[tuple[Cell, TrialJob]]]:
        """Rounds of cells: the weights and volumes of the first ones, for so many places, are made before it begins."""
        while self.proposals.left > 0 and (first := list(islice(iter(lambda: self._next(make=True), None), places))):
            yield chain(first, iter(lambda: self._next(make=False), None))

    def _next(self, make: bool) -> tuple[Cell, TrialJob] | None:
        """The next cell that is to be trained; None if there is none, or if it needs what is not to be made now."""
        while trial := self._waiting.pop(0) if self._waiting else self.proposals.draw():
            cell = self.proposals.cell(trial)
            try:
                job = self._job(resolved(self.study, dict(cell.overrides)), make)
            except (ValidationError, FloatingPointError, UserError, RuntimeError) as error:
                say(f"search: {cell.name} is not trained: {reason(error)}")
                if isinstance(error, ValidationError | FloatingPointError):  # it would fail again
                    self.proposals.end(trial, TrialState.FAIL, note=reason(error))
                continue
            if job is None:
                self._waiting.insert(0, trial)
                return None
            if self.proposals.begin(trial, cell, job.key):
                known = self.tracker.runs(kind="trial", key=job.key)
                done = [run for run in known if run.info.status == "FINISHED"]  # in another search, or not told yet
                if not done:
                    return cell, job
                self.proposals.tell(cell, done[0].data.metrics)
        return None

    def _job(self, own: Study, make: bool) -> TrialJob | None:
        """What the only cell of an experiment is trained with; None if something is missing and not to be made."""
        if make and _preparations(own) not in self._volumes:
            self._volumes[_preparations(own)] = prepare_cohorts(own, self.folders, read_cohorts(own))
        if not (there := self._volumes.get(_preparations(own))):
            return None
        start = self.given
        if own.pretrains:
            recipe, volumes = recipe_of(own), (there.training, there.validation)
            known = known_pretraining(recipe, *volumes, self.folders, self.tracker)  # others may share it
            if not make and not (known.run_id and self.folders.output.kept(known.weights).list()):
                return None
            params = run_params(own, "pretrain") | {"seed": str(recipe.seed), "run": "0"}
            name = f"pretrain-{known.key[:6]}"
            start = [pretrain(recipe, *volumes, self.folders, self.tracker, params, dump(own), name, there.probed)]
        labelled = own.seed, there.splits, there.labelled
        jobs = trial_jobs(own.finetune, own.network, *labelled, start, self.folders)[1]
        # Other cells have settings of their own, and are no arms of a comparison with it.
        return replace(next(iter(jobs.values())), settled=None)


def _preparations(study: Study) -> Any:
    return study.pretrain.preparation, study.finetune.preparation


def run_search(
    study: Study,
    folders: Folders,
    tracker: Tracker,
    prepared: PreparedCohorts,
    given: Sequence[Pretrained],
    content: Mapping[str, str],
) -> tuple[str, ...]:
    """Train what the study's search draws -> names of the cells that failed and are tried again by the same command.

    `content` has digests of the volumes and weights that it depends on.
    """
    assert study.search
    config, drawn = study.finetune, study.search.model_dump(include={"space", "metric", "mode"})
    settings = depends.pretraining(study.pretrain, study.network), depends.grid(config, study.network)
    key = depends.digest(*settings, study.seed, content, drawn)
    proposals = Proposals(study.search, config, study, folders.study / JOURNAL, folders.output, key)
    there, needed = ray.cluster_resources(), {"CPU": config.cpus_per_trial, "GPU": config.gpus_per_trial}
    room = [there.get(name, 0.0) / share for name, share in needed.items() if share]
    places = max(1, int(min(*room, config.max_concurrent_trials or math.inf)))
    params = run_params(study, "finetune")
    names = dict.fromkeys([*params, *study.search.space], "-")  # of what a cell does not read
    parent = tracker.open("search", key, "search", params)
    parent.text(dump(study), "experiment.yaml")
    # When the budget ends, so does whatever is going on, as after Ctrl-C.
    signal.signal(signal.SIGALRM, lambda *_: signal.raise_signal(signal.SIGINT))
    signal.setitimer(signal.ITIMER_REAL, 0 if math.isinf(proposals.left) else max(proposals.left, 0.1))
    with ending(parent):
        try:
            for cells in Rounds(study, proposals, folders, tracker, prepared, given)(places):
                with Bar("search", proposals.total * config.steps) as bar:
                    done = proposals.counts().total() - len(proposals.unfinished())
                    runs = TrialCallback(tracker, parent.id, names, bar, done, config.steps, proposals.tell)
                    tune_cells(config, cells, places, folders, key, runs, proposals.stop)
        except KeyboardInterrupt:
            if proposals.left > 0:
                raise
            say("search: its budget is used up; with more, the same command goes on")
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            proposals.keep()  # a pretraining may have been cut off, whose time counts
            parent.artifact(proposals.path)
    say(f"search: {', '.join(f'{count} {status}' for status, count in proposals.counts().items())}")
    return tuple(proposals.cell(one).name for one in proposals.unfinished() if proposals.left > 0)
