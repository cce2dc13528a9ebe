"""A search as the study carries it out: which experiment each cell is, on which volumes and from which weights."""

from collections.abc import Sequence
from pathlib import Path

from ssl_ray.config import depends
from ssl_ray.config.loading import dump
from ssl_ray.config.schema import Study
from ssl_ray.errors import UserError
from ssl_ray.finetune.job import TrialJob
from ssl_ray.pretrain.driver import Pretrained, pretrain, pretraining_key
from ssl_ray.search.cells import JOURNAL, Cell
from ssl_ray.search.grid import trial_jobs
from ssl_ray.search.proposals import Proposals
from ssl_ray.search.rounds import Rounds, run_rounds
from ssl_ray.storage.folders import Folders
from ssl_ray.study import identity
from ssl_ray.study.cohorts import Cohorts, PreparedCohorts, prepare_cohorts
from ssl_ray.study.parts import recipe_of, run_params
from ssl_ray.tracking.tracker import Tracker
from ssl_ray.training.checkpoint import digest


def run_search(
    study: Study,
    folders: Folders,
    tracker: Tracker,
    cohorts: Cohorts,
    prepared: PreparedCohorts,
    given: Sequence[Pretrained],
) -> tuple[str, ...]:
    """Train what the study's search draws -> names of the cells that failed and are tried again by the same command.

    Pretrained cells start from the weights `given`, or else each from those of its own pretraining settings.
    """
    assert study.search
    plain, tuned, seed = study.unsearched, study.finetune, study.seed
    made_by: dict[Path, str | None] = {}
    volumes = {(plain.pretrain.preparation, tuned.preparation): prepared}

    def job_of(cell: Cell, make: bool) -> TrialJob | None:
        own = cell.experiment(plain)
        preparations = own.pretrain.preparation, own.finetune.preparation
        if preparations not in volumes and make:
            volumes[preparations] = prepare_cohorts(own, folders, cohorts)
        start = given
        if (there := volumes.get(preparations)) is None:
            return None
        if cell.init != "random" and not given:
            if not (made := _weights(own, folders, tracker, there, make)):
                return None
            made_by[made.weights], start = made.run_id, [made]
        _, jobs = trial_jobs(own.finetune, own.network, seed, there.splits, there.labelled, start, folders)
        return next(iter(jobs.values()))

    labelled = {"labelled volumes": identity.told(list(prepared.labelled.values()))}
    unlabelled = {"unlabelled volumes": identity.told((*prepared.training, *prepared.validation))}
    identity.record(study, folders, "finetune", labelled)
    if study.pretrains:
        identity.record(study, folders, "pretrain", unlabelled)
    whole = depends.pretraining(plain.pretrain, plain.network), depends.grid(tuned, plain.network), seed
    drawn = study.search.model_dump(include={"space", "metric", "mode"})
    key = digest(*whole, labelled, unlabelled, [one.key for one in given], drawn)
    base = Cell.of(tuned.sizes[0], tuned.grid.init[0], tuned.optimizer.lr)
    path, rung = folders.study / JOURNAL, tuned.validate_every
    proposals = Proposals(study.search, base, plain, path, folders.output, key, seed, rung)
    rounds = Rounds(proposals, job_of, lambda trial: tracker.finished("trial", trial))
    params = run_params(study, "finetune") | dict.fromkeys(study.search.space, "-")  # of what a cell does not read
    return run_rounds(tuned, rounds, key, folders, tracker, params, made_by, dump(study))


def _weights(
    own: Study, folders: Folders, tracker: Tracker, prepared: PreparedCohorts, make: bool
) -> Pretrained | None:
    """The weights that an experiment's pretraining gives, which others may share; None if they are not to be made."""
    recipe, volumes = recipe_of(own), (prepared.training, prepared.validation)
    if not all(volumes):
        raise UserError("pretrain.sources: no usable volume is left for training or validation")
    key = pretraining_key(recipe, *volumes)
    if not make and not tracker.finished("pretraining", key):
        return None
    params = run_params(own, "pretrain") | {"seed": str(recipe.seed), "run": "0"}
    return pretrain(recipe, *volumes, folders, tracker, params, dump(own), f"pretrain-{key[:6]}")
