"""Ray Tune over labelled split x initialisation x learning rate x seed."""

import itertools
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ray import tune

from ssl_ray.cluster.connect import check_finetuning
from ssl_ray.config.schema import Finetune, Study
from ssl_ray.console import Bar
from ssl_ray.data.datalist import Splits
from ssl_ray.data.store import Store, Volume
from ssl_ray.finetune.job import Cell, TrialData, work
from ssl_ray.finetune.trial_folder import TrialFolder
from ssl_ray.networks.transfer import load_metadata, load_weights, transfer
from ssl_ray.pretrain.driver import Pretrained
from ssl_ray.search.callbacks import TrialCallback
from ssl_ray.tracking.tracker import Tracker, study_params
from ssl_ray.training.checkpoint import digest

_NAMED = frozenset({"grid", "cohort", "weights"})
"""Settings that a cell's key names in another way."""


CELLS = "cells.json"
"""Artifact of the grid's run: the key of every cell, by which the report finds its run."""


BAD_VOLUMES = "bad_volumes.json"
"""In the study's folder, and an artifact of the grid's run: the volumes that were left out, and why."""


@dataclass(frozen=True)
class GridResult:
    """The grid's MLflow run, how many cells were trained now or before, and which failed for good."""

    run_id: str
    trained: int
    finished: int
    failed: tuple[str, ...]


def cells(study: Study) -> list[Cell]:
    """Every cell of the grid, those with few volumes first."""
    grid = study.finetune.grid
    product = itertools.product(study.finetune.split_sizes, grid.init, grid.lr, grid.seeds)
    return [Cell(split, init, lr, seed) for split, init, lr, seed in product]


def check_transfer(study: Study, weights: Path) -> dict[str, Any]:
    """The report of a weight transfer into this study's UNETR, before any trial starts.

    Raises:
        ValueError: when anything of the encoder does not match.
    """
    from ssl_ray.networks.unetr import build_unetr

    unetr = build_unetr(study.network, study.finetune.patch_size, study.finetune.cohort.classes)
    return transfer(load_weights(weights), unetr, str(weights), load_metadata(weights)).summary()


def finetune(
    study: Study,
    splits: Splits,
    volumes: Mapping[str, Volume],
    pretrained: Pretrained | None,
    tracker: Tracker,
    config_yaml: str,
) -> GridResult:
    """Train every cell that is not finished yet.

    Args:
        study: the experiment.
        splits: cases of every split, of validation and of test.
        volumes: prepared volumes by image path; a case that is not in it was skipped as bad.
        pretrained: weights for the cells with `init: pretrained`; None where the grid has none.
        tracker: the study's MLflow experiment.
        config_yaml: the resolved experiment, kept with the grid's run.
    """
    config = study.finetune
    data = {size: _trial_data(study, splits, size, volumes) for size in config.split_sizes}
    base = [
        config.model_dump(mode="json", exclude=Finetune.HOW | _NAMED),
        config.cohort.classes,
        config.gpus_per_trial > 0 if config.precision == "auto" else None,  # `auto` depends on the kind of device
        study.network.model_dump(mode="json"),
        [volume.key for part in ("validation", "test") for volume in getattr(data[config.split_sizes[0]], part)],
    ]
    grid_key = digest(base, pretrained.key if pretrained else None)
    folder = study.folder / f"finetune-{grid_key}"
    keys = {
        cell: digest(
            base,
            [cell.split, cell.init, cell.lr, cell.seed],
            [volume.key for volume in data[cell.split].training],
            pretrained.key if pretrained and cell.init == "pretrained" else None,
        )
        for cell in cells(study)
    }
    grid_run = tracker.open("grid", grid_key, "grid", study_params(study, "finetune"))
    grid_run.text(config_yaml, "experiment.yaml")
    if (study.folder / BAD_VOLUMES).is_file():
        grid_run.artifact(study.folder / BAD_VOLUMES)
    # A grid that was once wider keeps its other cells: keys are digests, so the union is right.
    named = json.loads(tracker.read(grid_run.id, CELLS) or b"{}") | {cell.name: key for cell, key in keys.items()}
    grid_run.text(json.dumps(named, indent=1), CELLS)
    pending = [cell for cell in keys if not tracker.finished("trial", keys[cell])]
    finished = len(keys) - len(pending)
    folders = {cell: folder / f"{cell.name}-{key[:8]}" for cell, key in keys.items()}
    for cell in keys.keys() - set(pending):  # a driver that was killed may have left what it would have deleted next
        TrialFolder(folders[cell], keys[cell], study.mirror).clear()
    with Bar("fine-tuning", len(keys) * config.steps) as bar:
        done = finished * config.steps
        runs = TrialCallback(study, tracker, grid_run.id, pretrained, keys, data, folders, bar, done)
        try:
            if pretrained:
                report = check_transfer(study, pretrained.weights)
                grid_run.text(json.dumps(report, indent=1), "weight_transfer.json")
                grid_run.metrics({"transferred_share": report["share"]}, 0)
            if pending:
                check_finetuning(study)
                _tune(study, pending, keys, data, pretrained, folders, folder.name, runs)
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


def _trial_data(study: Study, splits: Splits, size: int, volumes: Mapping[str, Volume]) -> TrialData:
    def prepared(cases: Any) -> tuple[Volume, ...]:
        return tuple(volumes[str(case.image)] for case in cases if str(case.image) in volumes)

    training, validation = prepared(splits.training[size]), prepared(splits.validation)
    if not training or not validation:
        raise ValueError(f"finetune.cohort.splits.{size}: no usable volume is left for training or validation")
    store = Store(study.cache_folder, study.scratch)
    return TrialData(store, training, validation, prepared(splits.test), splits.organs)


def _tune(
    study: Study,
    pending: list[Cell],
    keys: Mapping[Cell, str],
    data: Mapping[int, TrialData],
    pretrained: Pretrained | None,
    folders: Mapping[Cell, Path],
    name: str,
    runs: TrialCallback,
) -> None:
    config = study.finetune

    def trainable(space: dict[str, Any]) -> None:
        import torch

        cell: Cell = space["cell"]
        torch.set_num_threads(max(1, int(config.cpus_per_trial)))
        device = torch.device("cuda" if config.gpus_per_trial else "cpu")
        weights = pretrained.weights if pretrained and cell.init == "pretrained" else None
        if weights and weights.is_relative_to(study.mirror.folder):
            study.mirror.pull(weights)  # made on another machine
        try:
            for step, metrics in work(study, cell, data[cell.split], weights, folders[cell], device, keys[cell]):
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
            **study.ray_storage,
            failure_config=tune.FailureConfig(max_failures=config.max_failures),
            callbacks=[runs],
            verbose=0,
        ),
    ).fit()
