"""The steps of a study, in their order; each finds out what is done already and does the rest."""

from collections.abc import Sequence
from pathlib import Path

from ssl_ray.cluster.connect import check_shared, hardware
from ssl_ray.config.loading import dump
from ssl_ray.config.schema import Study
from ssl_ray.console import say
from ssl_ray.data.consistency import Cohorts
from ssl_ray.data.prepare import usable
from ssl_ray.errors import UserError
from ssl_ray.networks.model_file import versions
from ssl_ray.pretrain.driver import Pretrained, known_pretraining, pretrain
from ssl_ray.search.cells import cells
from ssl_ray.search.grid import check_room, finetune, trial_jobs
from ssl_ray.storage.files import file_digest
from ssl_ray.storage.folders import Folders
from ssl_ray.storage.object_store import Place
from ssl_ray.study import identity
from ssl_ray.study.cohorts import PreparedCohorts, prepare_cohorts
from ssl_ray.study.experiment import Step
from ssl_ray.study.parts import recipe_of, run_params
from ssl_ray.tracking.tracker import Tracker


def carry_out_stages(
    study: Study, folders: Folders, cohorts: Cohorts, tracker: Tracker | None, last: Step, verify: bool = False
) -> tuple[str, ...]:
    """The steps before the report, on the cluster that is joined -> names of cells that failed for good.

    Without a `tracker` volumes are prepared, and no more.
    """
    if tracker is None:
        _prepare(study, folders, cohorts, verify)
        return ()
    tracker.facts |= {"ssl_ray.versions": ", ".join(f"{name} {one}" for name, one in versions().items())}
    tracker.facts |= {"ssl_ray.hardware": hardware()}
    try:
        prepared = _prepare(study, folders, cohorts, verify)
        trials = last != "pretrain"
        pretrained = _make_weights(study, folders, tracker, prepared, trials) if study.needs_weights else []
        return () if last == "pretrain" else _fine_tune(study, folders, tracker, prepared, pretrained)
    finally:
        tracker.settle()
        tracker.stop()


def _prepare(study: Study, folders: Folders, cohorts: Cohorts, verify: bool) -> PreparedCohorts:
    """All volumes, once it is known that the nodes share the folders that they are to write to."""
    cache, output = Place.parse(folders.cache).local, folders.output
    check_shared(**({"cache": cache} if cache else {}), **({} if output.origin else {"output": output.folder}))
    return prepare_cohorts(study, folders, cohorts, verify)


def _make_weights(
    study: Study, folders: Folders, tracker: Tracker, prepared: PreparedCohorts, trials: bool
) -> list[Pretrained]:
    """The weights that `init: pretrained` starts from: those given, or the study's own, unless a search makes them.

    Where `trials` follow, weights that are gone are made again only if one of them needs them.
    """
    by_cell = study.search is not None and trials
    if given := study.finetune.weights:
        say(f"pretrained weights are given: {', '.join(given)}")
        return [Pretrained(Path(file).absolute(), file_digest(Path(file))) for file in given]
    if not prepared.training or not prepared.validation:
        raise UserError("pretrain.sources: no usable volume is left for training or validation")
    parts = {"training": prepared.training, "validation": prepared.validation}
    content = {f"unlabelled {part} volumes": identity.told(volumes) for part, volumes in parts.items()}
    content["weights to go on from"] = file_digest(Path(start)) if (start := study.pretrain.weights) else "none"
    identity.record(study, folders, "pretrain", content)
    params, resolved = run_params(study, "pretrain"), dump(study)
    volumes = prepared.training, prepared.validation
    recipes = [recipe_of(study, number) for number in range(0 if by_cell else study.pretrain.pretrainings)]
    made = [known_pretraining(recipe, *volumes, folders, tracker) for recipe in recipes]
    gone = [number for number, one in enumerate(made) if one.run_id and not folders.output.pull(one.weights)]
    spared = {*gone} - _needed(study, folders, tracker, prepared, made) if trials and gone else set()
    for number, recipe in enumerate(recipes):
        if number in spared:
            say(
                f"pretraining of run {number} was done already, and so were its cells: its weights are gone, not needed"
            )
            continue
        if trials and not made[number].run_id:
            check_room(study.finetune)  # not only after days of pretraining
        name = f"pretrain-run{number}" if number else "pretrain"
        own = params | {"seed": str(recipe.seed), "run": str(number)}
        made[number] = done = pretrain(recipe, *volumes, folders, tracker, own, resolved, name, prepared.probed)
        say(f"pretraining {'is done' if done.fresh else 'was done already'} in {done.precision}: {done.weights}")
    return made


def _needed(
    study: Study, folders: Folders, tracker: Tracker, prepared: PreparedCohorts, made: Sequence[Pretrained]
) -> set[int]:
    """Numbers of the pretrainings whose weights a cell starts from that is not finished."""
    given = study.seed, prepared.splits, prepared.labelled, made, folders
    jobs = trial_jobs(study.finetune, study.network, *given)[1]
    return {
        cell.run % len(made) for cell, job in jobs.items() if job.weights and not tracker.finished("trial", job.key)
    }


def _fine_tune(
    study: Study, folders: Folders, tracker: Tracker, prepared: PreparedCohorts, pretrained: Sequence[Pretrained]
) -> tuple[str, ...]:
    """Every cell of the grid, or those of the search -> names of those that failed."""
    config, splits, labelled = study.finetune, prepared.splits, prepared.labelled
    held_out = {"validation": splits.validation, "test": splits.test}
    content = {f"labelled {part} volumes": identity.told(usable(cases, labelled)) for part, cases in held_out.items()}
    content["organs"] = ", ".join(splits.organs)
    content |= {"folds": f"{splits.folds} of {identity.told(usable(splits.cases, labelled))}"} if splits.folds else {}
    for cell in cells(config):
        parts = splits.parts(cell.size, study.seed, cell.run, cell.fold, labelled)
        drawn, validation, test = (usable(part, labelled) for part in parts)
        if not drawn or not validation or (splits.folds and not test):
            raise UserError(f"finetune.cohort: no usable volume is left for training (size {cell.size}) or validation")
        place = f"run {cell.run}" + ("" if cell.fold is None else f", fold {cell.fold}")
        content[f"labelled volumes, size {cell.size}, {place}"] = identity.told(drawn)
        if pretrained:
            content[f"pretrained weights, run {cell.run}"] = pretrained[cell.run % len(pretrained)].key
    identity.record(study, folders, "finetune", content)
    if study.search:
        from ssl_ray.study.searching import run_search  # it loads Optuna

        return run_search(study, folders, tracker, prepared, pretrained, content)
    given = study.seed, splits, labelled, pretrained, folders, tracker
    return finetune(config, study.network, *given, run_params(study, "finetune"), dump(study))
