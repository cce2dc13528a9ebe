"""Ray Tune over labelled split x initialisation x learning rate x seed."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ray import tune

from ssl_ray.cluster.connect import check_finetuning
from ssl_ray.config.schema import Finetune, Network
from ssl_ray.console import Bar
from ssl_ray.data.datalist import Splits
from ssl_ray.data.store import Store, Volume
from ssl_ray.finetune.job import TrialData, work
from ssl_ray.finetune.trial_folder import TrialFolder
from ssl_ray.networks.transfer import load_metadata, load_weights, transfer
from ssl_ray.pretrain.driver import Pretrained
from ssl_ray.search.callbacks import TrialCallback
from ssl_ray.search.cells import BAD_VOLUMES, CELLS, Cell, cells
from ssl_ray.storage.folders import Folders
from ssl_ray.tracking.tracker import Tracker
from ssl_ray.training.checkpoint import digest

_NAMED = frozenset({"grid", "cohort", "weights"})
"""Settings that a cell's key names in another way."""


@dataclass(frozen=True)
class GridResult:
    """The grid's MLflow run, how many cells were trained now or before, and which failed for good."""

    run_id: str
    trained: int
    finished: int
    failed: tuple[str, ...]


def check_transfer(config: Finetune, network: Network, weights: Path) -> dict[str, Any]:
    """The report of a weight transfer into the UNETR of a fine-tuning, before any trial starts.

    Raises:
        ValueError: when anything of the encoder does not match.
    """
    from ssl_ray.networks.unetr import build_unetr

    unetr = build_unetr(network, config.patch_size, config.cohort.classes)
    return transfer(load_weights(weights), unetr, str(weights), load_metadata(weights)).summary()


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
    """Train every cell that is not finished yet.

    Args:
        config: the fine-tuning and its grid.
        network: the widths of the UNETR.
        splits: cases of every split, of validation and of test.
        volumes: prepared volumes by image path; a case that is not in it was skipped as bad.
        pretrained: weights for the cells with `init: pretrained`; None where the grid has none.
        folders: of the study.
        tracker: the study's MLflow experiment.
        params: of every MLflow run.
        config_yaml: the resolved experiment, kept with the grid's run.
    """
    store = Store(folders.cache, folders.scratch)
    data = {size: _trial_data(store, splits, size, volumes) for size in config.split_sizes}
    base = [
        config.model_dump(mode="json", exclude=Finetune.HOW | _NAMED),
        config.cohort.classes,
        config.gpus_per_trial > 0 if config.precision == "auto" else None,  # `auto` depends on the kind of device
        network.model_dump(mode="json"),
        [volume.key for part in ("validation", "test") for volume in getattr(data[config.split_sizes[0]], part)],
    ]
    grid_key = digest(base, pretrained.key if pretrained else None)
    folder = folders.study / f"finetune-{grid_key}"
    keys = {
        cell: digest(
            base,
            [cell.split, cell.init, cell.lr, cell.seed],
            [volume.key for volume in data[cell.split].training],
            pretrained.key if pretrained and cell.init == "pretrained" else None,
        )
        for cell in cells(config)
    }
    grid_run = tracker.open("grid", grid_key, "grid", params)
    grid_run.text(config_yaml, "experiment.yaml")
    if (folders.study / BAD_VOLUMES).is_file():
        grid_run.artifact(folders.study / BAD_VOLUMES)
    # A grid that was once wider keeps its other cells: keys are digests, so the union is right.
    named = json.loads(tracker.read(grid_run.id, CELLS) or b"{}") | {cell.name: key for cell, key in keys.items()}
    grid_run.text(json.dumps(named, indent=1), CELLS)
    pending = [cell for cell in keys if not tracker.finished("trial", keys[cell])]
    finished = len(keys) - len(pending)
    homes = {cell: folder / f"{cell.name}-{key[:8]}" for cell, key in keys.items()}
    for cell in keys.keys() - set(pending):  # a driver that was killed may have left what it would have deleted next
        TrialFolder(homes[cell], keys[cell], folders.output).clear()
    with Bar("fine-tuning", len(keys) * config.steps) as bar:
        done = finished * config.steps
        runs = TrialCallback(params, folders.output, tracker, grid_run.id, pretrained, keys, data, homes, bar, done)
        try:
            if pretrained:
                report = check_transfer(config, network, pretrained.weights)
                grid_run.text(json.dumps(report, indent=1), "weight_transfer.json")
                grid_run.metrics({"transferred_share": report["share"]}, 0)
            if pending:
                check_finetuning(config)
                _tune(config, network, pending, keys, data, pretrained, homes, folder.name, folders, runs)
        except KeyboardInterrupt:
            runs.abandon()
            grid_run.close("KILLED")
            raise
        except BaseException:
            runs.abandon()
            grid_run.close("FAILED")
            raise
    grid_run.close()
    return GridResult(grid_run.id, runs.completed, finished, tuple(runs.failed))


def _trial_data(store: Store, splits: Splits, size: int, volumes: Mapping[str, Volume]) -> TrialData:
    def prepared(cases: Any) -> tuple[Volume, ...]:
        return tuple(volumes[str(case.image)] for case in cases if str(case.image) in volumes)

    training, validation = prepared(splits.training[size]), prepared(splits.validation)
    if not training or not validation:
        raise ValueError(f"finetune.cohort.splits.{size}: no usable volume is left for training or validation")
    return TrialData(store, training, validation, prepared(splits.test), splits.organs)


def _tune(
    config: Finetune,
    network: Network,
    pending: list[Cell],
    keys: Mapping[Cell, str],
    data: Mapping[int, TrialData],
    pretrained: Pretrained | None,
    homes: Mapping[Cell, Path],
    name: str,
    folders: Folders,
    runs: TrialCallback,
) -> None:
    mirror = folders.output

    def trainable(space: dict[str, Any]) -> None:
        import torch

        cell: Cell = space["cell"]
        torch.set_num_threads(max(1, int(config.cpus_per_trial)))
        device = torch.device("cuda" if config.gpus_per_trial else "cpu")
        weights = pretrained.weights if pretrained and cell.init == "pretrained" else None
        if weights and weights.is_relative_to(mirror.folder):
            mirror.pull(weights)  # made on another machine
        try:
            folder = TrialFolder(homes[cell], keys[cell], mirror)
            for step, metrics in work(config, network, cell.lr, cell.seed, data[cell.split], weights, folder, device):
                tune.report({"step": step, "metrics": metrics})
        except FloatingPointError as error:  # said, not raised: tried again, it would come to the same
            tune.report({"failure": str(error)})

    resources = {"cpu": config.cpus_per_trial, "gpu": config.gpus_per_trial}
    tune.Tuner(
        tune.with_resources(trainable, resources),
        param_space={"cell": tune.grid_search(pending)},
        tune_config=tune.TuneConfig(
            max_concurrent_trials=config.max_concurrent_trials,
            reuse_actors=True,
            trial_dirname_creator=lambda trial: trial.trial_id,
        ),
        run_config=tune.RunConfig(
            name=name,
            **folders.ray_storage,
            failure_config=tune.FailureConfig(max_failures=config.max_failures),
            callbacks=[runs],
            verbose=0,
        ),
    ).fit()
