"""Ray Tune over the cells of the fine-tuning grid: labelled split x initialisation x learning rate x seed."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ray import tune

from ssl_ray.cluster.resources import check_resources
from ssl_ray.config.schema import Finetune, Network
from ssl_ray.console import Bar
from ssl_ray.data.datalist import Splits
from ssl_ray.data.prepare import usable
from ssl_ray.data.store import Store, Volume
from ssl_ray.errors import UserError
from ssl_ray.finetune.job import TrialData, TrialFolder, TrialJob
from ssl_ray.networks.weight_files import load_metadata, load_weights
from ssl_ray.pretrain.driver import Pretrained
from ssl_ray.search.callbacks import TrialCallback
from ssl_ray.search.cells import BAD_VOLUMES, CELLS, Cell, cells
from ssl_ray.storage.files import write_file
from ssl_ray.storage.folders import Folders
from ssl_ray.tracking.tracker import Run, Tracker
from ssl_ray.training.checkpoint import digest

_DIGESTED_APART = frozenset({"grid", "cohort", "weights", "runs", "margin", "primary"})
"""Fields that the grid's digest leaves out, because each cell's own digest covers them."""


@dataclass(frozen=True)
class GridResult:
    """How many cells were trained now and before, and the names of those that failed for good."""

    trained: int
    finished: int
    failed: tuple[str, ...]


def check_transfer(config: Finetune, network: Network, weights: Path) -> dict[str, Any]:
    """The report of a weight transfer into the UNETR of a fine-tuning, before any trial starts.

    Raises:
        UserError: when anything of the encoder does not match.
    """
    from ssl_ray.networks.transfer import transfer  # MONAI takes seconds to load: only where it is needed
    from ssl_ray.networks.unetr import build_unetr

    unetr = build_unetr(network, config.patch_size, config.cohort.classes)
    return asdict(transfer(load_weights(weights), unetr, str(weights), load_metadata(weights)))


def finetune(
    config: Finetune,
    network: Network,
    splits: Splits,
    volumes: Mapping[str, Volume],
    pretrained: Pretrained | None,
    folders: Folders,
    tracker: Tracker,
    params: Mapping[str, str],
    config_yaml: str,
) -> GridResult:
    """Train every cell of the grid that is not finished yet.

    `volumes` are the prepared ones by image path; a case that is not among them was skipped as bad. Cells with
    `init: pretrained` start from `pretrained`, which is None where the grid has no such cell. The grid's MLflow run
    keeps `config_yaml`, and every run gets `params`.

    Raises:
        UserError: when a split has no usable volume left, the pretrained weights do not match, or the cluster cannot
            hold a trial.
    """
    key, jobs = _trial_jobs(config, network, splits, volumes, pretrained, folders)
    grid_run = _open(key, jobs, folders, tracker, params, config_yaml)
    pending = {cell: job for cell, job in jobs.items() if not tracker.finished("trial", job.folder.key)}
    finished = [job for cell, job in jobs.items() if cell not in pending]
    for job in finished:  # a driver that was killed may not have come to this
        job.folder.clear()
    with Bar("fine-tuning", len(jobs) * config.steps) as bar:
        made_by = pretrained.run_id if pretrained else None
        runs = TrialCallback(tracker, grid_run.id, params, pending, made_by, bar, len(finished) * config.steps)
        try:
            if pretrained:
                report = check_transfer(config, network, pretrained.weights)
                grid_run.text(json.dumps(report, indent=1), "weight_transfer.json")
                grid_run.metrics({"transferred_share": report["share"]}, 0)
            if pending:
                needed = config.cpus_per_trial, config.gpus_per_trial
                check_resources("finetune.cpus_per_trial, finetune.gpus_per_trial", "the steps of a trial", *needed)
                _tune(config, pending, folders, key, runs)
        except BaseException as error:
            runs.abandon()
            grid_run.close("KILLED" if isinstance(error, KeyboardInterrupt) else "FAILED")
            raise
    grid_run.close()
    return GridResult(runs.completed, len(finished), tuple(runs.failed))


def _trial_jobs(
    config: Finetune,
    network: Network,
    splits: Splits,
    volumes: Mapping[str, Volume],
    pretrained: Pretrained | None,
    folders: Folders,
) -> tuple[str, dict[Cell, TrialJob]]:
    """The grid's key, a digest of what all cells depend on, and what each cell's trial is started with."""
    store, data = Store(folders.cache, folders.scratch), {}
    validation, test = usable(splits.validation, volumes), usable(splits.test, volumes)
    for size in config.sizes:
        data[size] = TrialData(store, usable(splits.training[size], volumes), validation, test, splits.organs)
        if not data[size].training or not validation:
            raise UserError(f"finetune.cohort.splits.{size}: no usable volume is left for training or validation")
    base = [
        config.model_dump(mode="json", exclude=Finetune.HOW | _DIGESTED_APART),
        config.cohort.classes,
        config.gpus_per_trial > 0 if config.precision == "auto" else None,  # `auto` depends on the kind of device
        network.model_dump(mode="json"),
        [volume.key for volume in validation + test],
    ]
    grid_key = digest(base, pretrained.key if pretrained else None)
    jobs = {}
    for cell in cells(config):
        start = pretrained if cell.init == "pretrained" else None
        volume_keys = [volume.key for volume in data[cell.size].training]
        cell_key = digest(base, [cell.size, cell.init, cell.lr, cell.run], volume_keys, start.key if start else None)
        path = folders.study / f"finetune-{grid_key}" / f"{cell.name}-{cell_key[:8]}"
        folder, weights = TrialFolder(path, cell_key, folders.output), start.weights if start else None
        jobs[cell] = TrialJob(config, network, cell.lr, cell.run, data[cell.size], weights, folder)
    return grid_key, jobs


def _open(
    key: str,
    jobs: Mapping[Cell, TrialJob],
    folders: Folders,
    tracker: Tracker,
    params: Mapping[str, str],
    config_yaml: str,
) -> Run:
    """The grid's MLflow run, with the experiment, the volumes that were left out, and the key of every cell."""
    run = tracker.open("grid", key, "grid", params)
    run.text(config_yaml, "experiment.yaml")
    if (folders.study / BAD_VOLUMES).is_file():
        run.artifact(folders.study / BAD_VOLUMES)
    # A grid that had more cells before keeps them: each key says what its cell depends on, so none is wrong now.
    kept = folders.study / CELLS  # MLflow may be away
    known = json.loads(kept.read_bytes()) if kept.is_file() else {}
    before = json.loads(tracker.read(run.id, CELLS) or b"{}") or known.get(key, {})
    named = before | {cell.name: job.folder.key for cell, job in jobs.items()}
    write_file(kept, json.dumps(known | {key: named}).encode())
    run.text(json.dumps(named, indent=1), CELLS)
    return run


def _tune(config: Finetune, jobs: Mapping[Cell, TrialJob], folders: Folders, key: str, runs: TrialCallback) -> None:
    def trainable(space: Mapping[str, Any]) -> None:
        import torch

        from ssl_ray.finetune.trial import Trial  # the trial's process loads MONAI, the driver does not

        torch.set_num_threads(max(1, int(config.cpus_per_trial)))
        device = torch.device("cuda" if config.gpus_per_trial else "cpu")
        job = jobs[space["cell"]]
        if job.weights and job.weights.is_relative_to(folders.output.folder):
            folders.output.pull(job.weights)  # another machine may have written them
        try:
            trial = Trial(job, device)
            for step, metrics in trial.train():
                tune.report({"step": step, "metrics": metrics})
            tune.report({"step": config.steps, "metrics": trial.evaluate()})
        except FloatingPointError as error:  # reported, not raised: Tune would try the trial again, with the same end
            tune.report({"failure": str(error)})

    resources = {"cpu": config.cpus_per_trial, "gpu": config.gpus_per_trial}
    tune.Tuner(
        tune.with_resources(trainable, resources),
        param_space={"cell": tune.grid_search(list(jobs))},
        tune_config=tune.TuneConfig(
            max_concurrent_trials=config.max_concurrent_trials,
            reuse_actors=True,
            trial_dirname_creator=lambda trial: trial.trial_id,
        ),
        run_config=tune.RunConfig(
            name=f"finetune-{key}",
            **folders.ray_storage,
            failure_config=tune.FailureConfig(max_failures=config.max_failures),
            callbacks=[runs],
            verbose=0,
        ),
    ).fit()
