"""Steps, FLOPs, memory and time of a study's two trainings, out of its configuration, its volumes and a probe."""

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from ssl_ray.config.schema import Study
from ssl_ray.estimate.volumes import Group
from ssl_ray.evaluate.sliding_window import sliding_windows
from ssl_ray.networks.flops import network_cost
from ssl_ray.networks.registry import build_segmentation
from ssl_ray.pretrain.samples import SampleTable
from ssl_ray.pretrain.stream import segments
from ssl_ray.pretrain.tasks.registry import task_cost
from ssl_ray.search.cells import cells

Figures = dict[str, Any]
"""By their names in the JSON, which tell the unit; None stands for what is not known."""


def estimate_pretraining(study: Study, groups: dict[str, Group]) -> Figures:
    """The pretraining, with the most workers that the experiment allows and without times."""
    config, patches, channels = study.pretrain, study.pretrain.patches_per_volume, study.pretrain.preparation.channels
    world = config.worker_range[1]
    shapes = np.ones((config.drawn(groups["unlabelled training"].volumes), 3), np.int64)
    table = SampleTable(study.seed, shapes, config.patch_size, patches, config.batch_size, config.epochs, config.steps)
    checks = groups["unlabelled validation"].volumes * patches * len(table.boundaries(config.validate_every))
    cost = task_cost(config.task, study.network, config.patch_size, channels)
    voxel_bytes = channels * np.dtype(config.preparation.normalise.storage.dtype).itemsize
    block_steps = segments(table, 0, world, config.block_megabytes * 2**20, voxel_bytes)[0].step
    share = len(table.rank_samples(0, 0, world))
    # A worker holds a block, the next is fetched and one waits; the next segment opens before the last has ended.
    in_flight = min(2 * 3 * world * block_steps * share, table.steps * config.batch_size)
    per_step = config.batch_size * cost.training
    return {
        "workers": world,
        "epochs": table.epoch(table.steps) if config.steps else config.epochs,
        "steps": table.steps,
        "patches_per_step": config.batch_size,
        "flops_per_step": per_step,  # of all workers
        "flops": table.steps * per_step + checks * cost.forward,
        "weights_bytes": cost.weights_bytes,  # with `shard`, divided among the workers like the next
        "optimizer_bytes": 2 * cost.trained_bytes,  # Adam's two moments
        "object_store_bytes": in_flight * math.prod(config.patch_size) * voxel_bytes,
    }


def estimate_grid(
    study: Study, groups: dict[str, Group], cluster: Figures, step_seconds: float | None, window_seconds: float | None
) -> Figures:
    """The fine-tuning trials, with the seconds of an optimizer step and of predicting a sliding window."""
    config, sides = study.finetune, study.finetune.patch_size
    trials = study.search.cells if study.search else len(cells(config))
    batch = config.volumes_per_step * config.patches_per_volume
    places = [float(config.max_concurrent_trials or trials)]
    places += [cluster["cpus"] / config.cpus_per_trial] if cluster["cpus"] is not None else []
    # Where a GPU is named, a trial is timed on a whole one if it has no share of its own.
    share = config.gpus_per_trial or float(cluster["cpus"] is None)
    places += [cluster["gpus"] / share] if share else []
    at_once = min(trials, max(1, int(min(places))))
    cost = network_cost(build_segmentation, study.network, sides, config.preparation.channels, config.cohort.classes)
    validations = math.ceil(config.steps / config.validate_every)
    held_out = groups["labelled validation"], groups["labelled test"]
    if folds := config.cohort.folds:  # one is validated on and one scored
        pool = groups["labelled training"]
        held_out = (replace(pool, volumes=math.ceil(pool.volumes / folds)),) * 2
    overlap = config.sliding_window_overlap
    windows, test = (group.volumes * count_windows(group.shape or sides, sides, overlap) for group in held_out)
    flops = trial = None
    if known := all(group.shape or not group.volumes for group in held_out):
        # The final evaluation predicts validation and test volumes once more, with the selected weights.
        predicted = windows * (validations + 1) + test
        flops = trials * (config.steps * batch * cost.training + predicted * cost.forward)
        if step_seconds and window_seconds:
            trial = config.steps * step_seconds + predicted * window_seconds
    return {
        "trials": trials,
        "concurrent_trials": at_once,
        "steps": config.steps,
        "patches_per_step": batch,
        "validations": validations,
        "windows_per_validation": windows if known else None,
        "flops_per_step": batch * cost.training,
        "flops": flops,  # of all trials
        "weights_bytes": cost.weights_bytes,
        "optimizer_bytes": 2 * cost.trained_bytes,
        "step_seconds": step_seconds,
        "trial_seconds": trial,  # without metrics
        "total_seconds": math.ceil(trials / at_once) * trial if trial else None,
    }


def count_windows(shape: Sequence[float], patch_size: Sequence[int], overlap: float) -> int:
    """Windows that a prediction lays over a volume (X, Y, Z) of this shape."""
    padded = [max(round(length), side) for length, side in zip(shape, patch_size, strict=True)]
    return len(sliding_windows(padded, patch_size, overlap))
