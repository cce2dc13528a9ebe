"""Ray Tune over labelled split x initialisation x learning rate x seed."""

import itertools
import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from ray import tune

from ssl_ray.checkpoint import digest
from ssl_ray.cluster import check_finetuning
from ssl_ray.cohort.cache import Volume
from ssl_ray.cohort.datalist import Splits
from ssl_ray.config import Study
from ssl_ray.console import Bar
from ssl_ray.finetune.trial import Cell, TrialData, run_trial
from ssl_ray.networks import build_unetr, load_metadata, load_weights, transfer
from ssl_ray.pretrain.train import Pretrained
from ssl_ray.tracking import PRETRAINING_RUN, Run, Tracker, study_params

_NO_EFFECT = {"grid", "cohort", "weights", "max_concurrent_trials", "cpus_per_trial", "gpus_per_trial", "max_failures"}
"""Settings that do not change what one cell computes, or that its key names in another way."""


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
        config.model_dump(mode="json", exclude=_NO_EFFECT),
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
    with Bar("fine-tuning", len(keys) * config.steps) as bar:
        runs = _Runs(study, tracker, grid_run.id, pretrained, keys, data, bar, finished * config.steps)
        try:
            if pretrained:
                report = check_transfer(study, pretrained.weights)
                grid_run.text(json.dumps(report, indent=1), "weight_transfer.json")
                grid_run.metrics({"transferred_share": report["share"]}, 0)
            if pending:
                check_finetuning(study)
                _tune(study, pending, keys, data, pretrained, folder, runs)
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
    return TrialData(study.cache_folder, training, validation, prepared(splits.test), splits.organs)


def _tune(
    study: Study,
    pending: list[Cell],
    keys: Mapping[Cell, str],
    data: Mapping[int, TrialData],
    pretrained: Pretrained | None,
    folder: Path,
    runs: "_Runs",
) -> None:
    config = study.finetune

    def trainable(space: dict[str, Any]) -> None:
        cell: Cell = space["cell"]
        torch.set_num_threads(max(1, int(config.cpus_per_trial)))
        device = torch.device("cuda" if config.gpus_per_trial else "cpu")
        weights = pretrained.weights if pretrained and cell.init == "pretrained" else None
        home = folder / f"{cell.name}-{keys[cell][:8]}"
        for step, metrics in run_trial(study, cell, data[cell.split], weights, home, device):
            tune.report({"step": step, "metrics": metrics, "folder": str(home)})

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
            name=folder.name,
            storage_path=str(study.folder / "ray"),
            failure_config=tune.FailureConfig(max_failures=config.max_failures),
            callbacks=[runs],
            verbose=0,
        ),
    ).fit()


class _Runs(tune.Callback):
    """In the driver: a child run in MLflow for each trial, and the progress bar."""

    def __init__(
        self,
        study: Study,
        tracker: Tracker,
        parent: str,
        pretrained: Pretrained | None,
        keys: Mapping[Cell, str],
        data: Mapping[int, TrialData],
        bar: Bar,
        done: int,
    ) -> None:
        self._study, self._tracker, self._parent, self._pretrained = study, tracker, parent, pretrained
        self._keys, self._data, self._bar, self._done = keys, data, bar, done
        self._open: dict[str, tuple[Run, int]] = {}
        self._steps: dict[str, int] = {}
        self.completed = 0
        self.failed: list[str] = []
        bar.update(done)

    def on_trial_start(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        if trial.trial_id in self._open:
            return
        cell: Cell = trial.config["cell"]
        params: dict[str, Any] = {
            name: value for name, value in study_params(self._study, "finetune").items() if "grid" not in name
        }
        params |= {"split": cell.split, "init": cell.init, "lr": cell.lr, "seed": cell.seed}
        data = self._data[cell.split]  # a bad volume that was skipped makes it fewer than the split says
        params |= {f"{part}_volumes": len(getattr(data, part)) for part in ("training", "validation", "test")}
        tags = {}
        if self._pretrained and self._pretrained.run_id and cell.init == "pretrained":
            tags[PRETRAINING_RUN] = self._pretrained.run_id
        run = self._tracker.open("trial", self._keys[cell], cell.name, params, self._parent, tags)
        self._open[trial.trial_id] = run, run.last_step("loss")

    def on_trial_result(
        self, iteration: int, trials: list[Any], trial: Any, result: dict[str, Any], **info: Any
    ) -> None:
        if "metrics" not in result:
            return
        run, logged = self._open[trial.trial_id]
        step, metrics = int(result["step"]), result["metrics"]
        if step > logged or "selected/step" in metrics:
            run.metrics(metrics, step)
        self._open[trial.trial_id] = run, max(step, logged)
        self._steps[trial.trial_id] = step
        loss = f"loss {metrics['loss']:.3f} ({trial.config['cell'].name})" if "loss" in metrics else ""
        self._bar.update(self._done + sum(self._steps.values()), loss)
        if "selected/step" in metrics:
            run.artifact(Path(result["folder"]) / "evaluation.json")

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        run, _ = self._open.pop(trial.trial_id)
        run.close()
        self.completed += 1
        # Only now that MLflow has the result is there nothing left to go on from.
        shutil.rmtree(Path(trial.last_result["folder"]) / "checkpoint", ignore_errors=True)

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        # A trial that is tried again does not come here; one that never started has no run yet.
        self.on_trial_start(iteration, trials, trial)
        run, _ = self._open.pop(trial.trial_id)
        run.close("FAILED")
        self.failed.append(trial.config["cell"].name)

    def abandon(self) -> None:
        """End the runs of trials that were still going, e.g. after Ctrl-C."""
        for run, _ in self._open.values():
            run.close("KILLED")
        self._open.clear()
