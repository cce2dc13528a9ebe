"""Ray Tune over the cells of the fine-tuning grid: labelled volumes x initialisation x learning rate x run (x fold)."""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from ray import tune
from ray.tune.search import Searcher

from ssl_ray.cluster.connect import check_resources
from ssl_ray.config import depends
from ssl_ray.config.schema import Finetune, Network
from ssl_ray.console import Bar, say
from ssl_ray.data.prepare import usable
from ssl_ray.data.splits import Splits
from ssl_ray.data.store import Store, Volume
from ssl_ray.errors import UserError
from ssl_ray.finetune.job import TrialData, TrialJob
from ssl_ray.networks.model_file import MODEL_FILE
from ssl_ray.networks.weight_files import load_metadata, load_weights
from ssl_ray.pretrain.driver import Pretrained
from ssl_ray.random import run_seed
from ssl_ray.search.callbacks import TrialCallback
from ssl_ray.search.cells import BAD_VOLUMES, CELLS, Cell, cells
from ssl_ray.storage.files import file_digest, write_file
from ssl_ray.storage.folders import Folders
from ssl_ray.storage.object_store import Place
from ssl_ray.tracking.run import Run, ending
from ssl_ray.tracking.tracker import Tracker


def check_transfer(config: Finetune, network: Network, weights: Path) -> dict[str, Any]:
    """The report of a weight transfer into the network of a fine-tuning, before any trial starts; raises as it does."""
    from ssl_ray.networks.registry import build_segmentation
    from ssl_ray.networks.transfer import transfer  # MONAI takes seconds to load: only where it is needed

    built = build_segmentation(network, config.patch_size, config.preparation.channels, config.cohort.classes)
    return asdict(transfer(load_weights(weights), built, str(weights), load_metadata(weights)))


def check_given(config: Finetune, network: Network) -> dict[str, str]:
    """Files of the setting `weights` -> what their encoder's keys begin with; before any trial starts.

    Raises:
        UserError: as a transfer does, and where two files have the same content.
    """
    files = config.weights or ()
    prefixes = {file: check_transfer(config, network, Path(file))["prefix"] for file in files}
    if len({file_digest(Path(file)) for file in files}) < len(files):
        raise UserError(f"finetune.weights: each run needs a pretraining of its own; equal files are among {[*files]}")
    return prefixes


def finetune(
    config: Finetune,
    network: Network,
    seed: int,
    splits: Splits,
    volumes: Mapping[str, Volume],
    pretrained: Sequence[Pretrained],
    folders: Folders,
    tracker: Tracker,
    params: Mapping[str, str],
    config_yaml: str,
) -> tuple[str, ...]:
    """Train every cell of the grid that is not finished yet -> names of the cells that failed for good.

    `seed` is the study's. `volumes` are the prepared ones by image path; a case that is not among them was skipped as
    bad. Cells that are not `init: random` start from the one of `pretrained`, or from that of their run; it is empty
    where the grid has no such cell. The grid's MLflow run keeps `config_yaml`, and every run gets `params`. Weights
    that do not match, and a cluster that cannot hold a trial, are a UserError.
    """
    key, jobs = trial_jobs(config, network, seed, splits, volumes, pretrained, folders)
    counts = {"pool_subjects": str(splits.pool_size(volumes))} if splits.pool else {}
    grid_run = _open(key, jobs, folders, tracker, {**params, **counts}, config_yaml)
    pending = {cell: job for cell, job in jobs.items() if not tracker.finished("trial", job.key)}
    finished = [job for cell, job in jobs.items() if cell not in pending]
    for job in finished:  # a driver that was killed may not have come to this
        job.clear()
    with ending(grid_run), Bar("fine-tuning", len(jobs) * config.steps) as bar:
        bar.update(len(finished) * config.steps)
        runs = TrialCallback(tracker, grid_run.id, params, bar, len(finished), config.steps)
        used = sorted({job.weights for job in pending.values() if job.weights})
        reports = [check_transfer(config, network, weights) for weights in used]
        for report in reports[:1]:  # the others differ in their numbers alone
            grid_run.text(json.dumps(report, indent=1), "weight_transfer.json")
            grid_run.metrics({"transferred_share": report["share"]}, 0)
        if pending:
            tune_cells(config, iter(pending.items()), config.max_concurrent_trials or len(pending), folders, key, runs)
    say(f"fine-tuning: {runs.completed} cells trained now, {len(finished)} were done already")
    for name in runs.failed:
        say(f"fine-tuning: cell {name} FAILED; its log is under {folders.study / 'ray'}")
    return tuple(runs.failed)


def trial_jobs(
    config: Finetune,
    network: Network,
    seed: int,
    splits: Splits,
    volumes: Mapping[str, Volume],
    pretrained: Sequence[Pretrained],
    folders: Folders,
) -> tuple[str, dict[Cell, TrialJob]]:
    """The grid's key, a digest of what all cells depend on, and what each cell's trial is started with."""
    place, jobs = Place.parse(folders.cache), {}
    # Tune writes each trial's job into files: what opens the store goes to the trials another way, see `tune_cells`.
    store = Store(place.local or place.anonymous.uri, folders.scratch)
    whole = [splits.cases] * splits.folds or [splits.validation, splits.test]
    # More runs, with pretrainings of their own, belong to the same grid.
    told = _told([usable(part, volumes) for part in whole])
    grid_key = depends.digest(depends.grid(config, network), told, pretrained[0].key if pretrained else None)
    for cell in cells(config):
        of_cell = splits.parts(cell.size, seed, cell.run, cell.fold, volumes)
        training, validation, test = (usable(part, volumes) for part in of_cell)
        start = pretrained[cell.run % len(pretrained)] if cell.init != "random" else None
        own, trial_seed = cell.apply(config), run_seed(seed, "finetune", cell.run)
        made = start and start.key + ("" if cell.init == "pretrained" else f" {cell.init}")
        parts = [cell.size, trial_seed, [volume.key for volume in training], _told([validation, test]), made]
        cell_key = depends.digest(depends.finetuning(own, network), *parts)
        data = TrialData(store, training, validation, test, splits.organs)
        jobs[cell] = TrialJob(
            config=own,
            network=network,
            seed=trial_seed,
            data=data,
            weights=start.weights if start else None,
            folder=folders.study / "finetune-trials" / f"{cell.file_name}-{cell_key[:8]}",
            mirror=folders.output,
            key=cell_key,
            made_by=start.run_id if start else None,
            permuted=cell.init == "permuted",
            settled=folders.study / "finetune-precision" / f"{cell.size}-{cell.run}",
            lineage=cell.lineage | {"study": folders.name, "pretraining": start.key if start else None},
        )
    return grid_key, jobs


def _told(held_out: Sequence[Sequence[Volume]]) -> list[list[tuple[str, str]]]:
    """Whose scan it is counts, too: the scores of a trial are kept with their patients."""
    return [[(volume.key, volume.subject) for volume in part] for part in held_out]


def _open(
    key: str,
    jobs: Mapping[Cell, TrialJob],
    folders: Folders,
    tracker: Tracker,
    params: Mapping[str, str],
    config_yaml: str,
) -> Run:
    """The grid's MLflow run, with the experiment, the volumes that were left out, and the key of every cell."""
    run = tracker.open("grid", key, f"{folders.name}: does pretraining help?", params)
    run.text(config_yaml, "experiment.yaml")
    if (folders.study / BAD_VOLUMES).is_file():
        run.artifact(folders.study / BAD_VOLUMES)
    # A grid that had more cells before keeps them: each key says what its cell depends on, so none is wrong now.
    kept = folders.study / CELLS  # MLflow may be away
    known = json.loads(kept.read_bytes()) if kept.is_file() else {}
    before = json.loads(tracker.read(run.id, CELLS) or b"{}") or known.get(key, {})
    named = before | {cell.name: job.key for cell, job in jobs.items()}
    write_file(kept, json.dumps(known | {key: named}).encode())
    run.text(json.dumps(named, indent=1), CELLS)
    return run


class _Cells(Searcher):
    """Gives Tune one cell after the other, each with its job. How they end, `TrialCallback` tells."""

    def __init__(self, cells: Iterator[tuple[Cell, TrialJob]]) -> None:
        super().__init__()
        self._cells = cells

    def suggest(self, trial_id: str) -> Any:
        cell, job = next(self._cells, (None, None))
        return {"cell": cell, "job": job} if cell else self.FINISHED

    def on_trial_complete(self, *args: Any, **more: Any) -> None: ...

    def save(self, checkpoint_path: str) -> None: ...

    def __getstate__(self) -> dict[str, Any]:
        return {}  # Tune pickles it for `Tuner.restore`, which we do not use


def check_room(config: Finetune) -> None:
    """Refuse a cluster in which a trial does not find room."""
    share = config.cpus_per_trial, config.gpus_per_trial
    check_resources("finetune.cpus_per_trial, finetune.gpus_per_trial", "the steps of a trial", 1, *share)


def tune_cells(
    config: Finetune,
    cells: Iterator[tuple[Cell, TrialJob]],
    places: int,
    folders: Folders,
    key: str,
    runs: TrialCallback,
    stop: Callable[[str, dict[str, Any]], bool] | None = None,
) -> None:
    """Have Ray Tune train these cells, so many at once where there is room; `stop` ends a trial at a record of its."""
    check_room(config)

    def trainable(space: Mapping[str, Any], store: Store) -> None:
        import torch

        from ssl_ray.finetune.trial import Trial  # the trial's process loads MONAI, the driver does not

        torch.set_num_threads(max(1, int(config.cpus_per_trial)))
        job: TrialJob = replace(space["job"], data=replace(space["job"].data, store=store))
        if job.weights and job.weights.is_relative_to(job.mirror.folder):
            job.mirror.pull(job.weights)  # another machine may have written them
        try:
            trial = Trial(job, torch.device("cuda" if config.gpus_per_trial else "cpu"))
        except UserError as error:  # reported, not raised: Tune would try the trial again, with the same end
            tune.report({"failure": str(error)})
            return
        try:
            for step, metrics in trial.train():
                tune.report({"step": step, "metrics": metrics, **trial.facts})
            found = trial.evaluate()
            digest = file_digest(job.folder / MODEL_FILE)
            job.clear_copies()
            tune.report({"step": job.config.steps, "metrics": found, "digest": digest})
        except FloatingPointError as error:  # the same; anything else, such as a disk that is away, may pass
            tune.report({"failure": str(error), "nonfinite": True})

    # Through Ray's memory, into no file of Tune's: the store's place may hold a password.
    opened = tune.with_parameters(trainable, store=Store(folders.cache, folders.scratch))
    tuner = tune.Tuner(
        tune.with_resources(opened, {"cpu": config.cpus_per_trial, "gpu": config.gpus_per_trial}),
        tune_config=tune.TuneConfig(
            search_alg=_Cells(cells),
            num_samples=-1,
            max_concurrent_trials=places,
            reuse_actors=True,
            trial_dirname_creator=lambda trial: trial.trial_id,
        ),
        run_config=tune.RunConfig(
            name=f"finetune-{key}",
            **folders.ray_storage,
            stop=stop,  # which Tune pickles into a file, too
            failure_config=tune.FailureConfig(max_failures=config.max_failures),
            callbacks=[runs],
            verbose=0,
        ),
    )
    try:
        tuner.fit()
    finally:
        runs.abandon()
