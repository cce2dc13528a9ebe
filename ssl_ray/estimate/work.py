"""Steps, FLOPs, memory and time of a study's two trainings, out of its configuration, its volumes and a probe."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

from ssl_ray.config.schema import Finetune, Pretrain, Study
from ssl_ray.data.canonical import levels
from ssl_ray.estimate.probe import Timing
from ssl_ray.estimate.volumes import Survey
from ssl_ray.networks.flops import autoencoder_flops, unetr_flops
from ssl_ray.networks.unetr import build_autoencoder, build_unetr
from ssl_ray.pretrain.samples import SampleTable
from ssl_ray.pretrain.stream import segments
from ssl_ray.search.cells import cells


@dataclass(frozen=True)
class Cluster:
    """What the study will run on; None stands for as much as it needs."""

    where: str
    cpus: float | None
    gpus: float
    object_store_bytes: float | None


@dataclass(frozen=True)
class PretrainingEstimate:
    """The pretraining, with the most workers that the experiment allows; None where nothing was measured.

    Attributes:
        flops_per_step: of the worker that has most patches of a step.
        flops: of all steps and validations.
        optimizer_bytes: Adam's two moments of the trained weights. With `shard`, workers divide weights and moments.
        object_store_bytes: of the blocks in flight. A worker holds one, the next is fetched and one is waiting; the
            next stream segment opens before the last has ended. No more than the whole run.
        exchanged_bytes_per_step: that each worker sends to others.
        step_seconds: without that exchange.
        patches_per_second: over all workers, at the speed of the bottleneck.
        read_patches_per_second: out of memory, by all cores that the workers leave, without Ray Data's own work.
        bottleneck: `reading` or `steps`, whichever is slower.
        total_seconds: of steps and validations.
    """

    workers: int
    epochs: int
    steps: int
    patches_per_step: int
    flops_per_step: int
    flops: int
    weights_bytes: int
    optimizer_bytes: int
    object_store_bytes: int
    exchanged_bytes_per_step: int
    step_seconds: float | None
    patches_per_second: float | None
    read_patches_per_second: float | None
    bottleneck: str | None
    total_seconds: float | None


@dataclass(frozen=True)
class GridEstimate:
    """The fine-tuning trials; None where nothing was measured.

    Attributes:
        concurrent_trials: that the experiment and the cluster allow at once.
        validations: of one trial.
        windows_per_validation: sliding windows over all validation volumes, of their mean grid.
        flops_per_step: of one trial.
        flops: of all trials, with validations and the final evaluation.
        optimizer_bytes: Adam's two moments of the trained weights.
        trial_seconds: of steps, validations and the final evaluation, without metrics.
        total_seconds: of all trials.
    """

    trials: int
    concurrent_trials: int
    steps: int
    patches_per_step: int
    validations: int
    windows_per_validation: int | None
    flops_per_step: int
    flops: int | None
    weights_bytes: int
    optimizer_bytes: int
    step_seconds: float | None
    trial_seconds: float | None
    total_seconds: float | None


def estimate_pretraining(study: Study, volumes: Survey, cluster: Cluster, timing: Timing | None) -> PretrainingEstimate:
    """The pretraining, with the times of a probe."""
    config = study.pretrain
    world, views = config.worker_range[1], 2 if config.contrastive.enabled else 1
    shapes = np.ones((volumes.volumes("unlabelled training"), 3), np.int64)
    patches = config.patches_per_volume
    table = SampleTable(study.seed, shapes, config.patch_size, patches, config.batch_size, config.epochs)
    share = len(table.rank_samples(0, 0, world))
    checks = volumes.volumes("unlabelled validation") * patches * len(table.boundaries(config.validate_every))
    flops = autoencoder_flops(study.network, config.patch_size)
    trained, checked = table.steps * config.batch_size * views * flops.training, checks * flops.forward
    with torch.device("meta"):
        weights, moments = _bytes(build_autoencoder(study.network, config.patch_size))
    itemsize = 1 if levels(config.preparation.hu_window) == 255 else 2
    segment = segments(table, 0, world, config.block_megabytes * 2**20, itemsize)[0]
    patch_bytes = math.prod(config.patch_size) * itemsize
    in_flight = 2 * 3 * world * segment.block_steps * share * patch_bytes

    step = timing.step_seconds if timing else None
    rate, reading = config.batch_size / step if step else None, None
    if timing and timing.read_seconds and cluster.cpus is not None:
        # Where the workers leave no core, reading tasks run beside them (`stream.open_segment`), on about one of them.
        reading = max(1.0, cluster.cpus - world * config.cpus_per_worker) / timing.read_seconds
    slowest = min(rate, reading or math.inf) if rate else None
    return PretrainingEstimate(
        workers=world,
        epochs=config.epochs,
        steps=table.steps,
        patches_per_step=config.batch_size,
        flops_per_step=share * views * flops.training,
        flops=trained + checked,
        weights_bytes=weights,
        optimizer_bytes=moments,
        object_store_bytes=min(in_flight, table.steps * config.batch_size * patch_bytes),
        exchanged_bytes_per_step=_exchanged(config, share, moments // 2),
        step_seconds=step,
        patches_per_second=slowest,
        read_patches_per_second=reading,
        bottleneck=("reading" if reading < rate else "steps") if rate and reading else None,
        total_seconds=table.steps * config.batch_size / slowest * (1 + checked / trained) if slowest else None,
    )


def estimate_grid(study: Study, volumes: Survey, cluster: Cluster, timing: Timing | None) -> GridEstimate:
    """The fine-tuning trials, with the times of a probe."""
    config, network = study.finetune, study.network
    trials, batch = len(cells(config)), config.volumes_per_step * config.patches_per_volume
    flops = unetr_flops(network, config.patch_size, config.cohort.classes)
    with torch.device("meta"):
        weights, moments = _bytes(build_unetr(network, config.patch_size, config.cohort.classes))
    validations = math.ceil(config.steps / config.validate_every)
    windows, test = (_windows(config, volumes, f"labelled {name}") for name in ("validation", "test"))
    # The final evaluation predicts validation and test volumes once more, with the selected weights.
    predicted = None if windows is None or test is None else windows * (validations + 1) + test
    places = [float(config.max_concurrent_trials or trials)]
    places += [cluster.cpus / config.cpus_per_trial] if cluster.cpus is not None else []
    places += [cluster.gpus / config.gpus_per_trial] if config.gpus_per_trial else []
    at_once = min(trials, max(1, int(min(places))))
    every = trial = None
    if predicted is not None:
        every = trials * (config.steps * batch * flops.training + predicted * flops.forward)
        if timing and timing.window_seconds:
            trial = config.steps * timing.step_seconds + predicted * timing.window_seconds
    return GridEstimate(
        trials=trials,
        concurrent_trials=at_once,
        steps=config.steps,
        patches_per_step=batch,
        validations=validations,
        windows_per_validation=windows,
        flops_per_step=batch * flops.training,
        flops=every,
        weights_bytes=weights,
        optimizer_bytes=moments,
        step_seconds=timing.step_seconds if timing else None,
        trial_seconds=trial,
        total_seconds=math.ceil(trials / at_once) * trial if trial else None,
    )


def count_windows(shape: Sequence[float], patch_size: Sequence[int], overlap: float) -> int:
    """Windows that MONAI's `sliding_window_inference` lays over a volume (X, Y, Z) of this shape."""
    counts = []
    for length, side in zip(shape, patch_size, strict=True):
        interval = max(1, int(side * (1 - overlap)))
        counts.append(max(1, math.ceil((round(length) - side) / interval) + 1))
    return math.prod(counts)


def _windows(config: Finetune, volumes: Survey, name: str) -> int | None:
    """Sliding windows over all volumes of a group; None where their grid is not known."""
    group = volumes.groups.get(name)
    if group is None:
        return 0
    shape, overlap = group.shape, config.sliding_window_overlap
    return group.volumes * count_windows(shape, config.patch_size, overlap) if shape else None


def _bytes(network: nn.Module) -> tuple[int, int]:
    """Float32 bytes of all weights, and of the two moments that Adam keeps of the trained ones."""
    sizes = [(weight.numel(), weight.requires_grad) for weight in network.parameters()]
    return 4 * sum(size for size, _ in sizes), 8 * sum(size for size, trained in sizes if trained)


def _exchanged(config: Pretrain, share: int, trained: int) -> int:
    """Bytes that a worker sends in a step, by rings, of `trained` bytes of weights. DDP reduces gradients and spreads
    them; FSDP gathers weights for each pass forward and backward, and reduces gradients.
    """
    world = config.worker_range[1]
    passes = math.ceil(share / (config.microbatch or share))
    return (2 * passes + 1 if config.shard else 2) * (world - 1) * trained // world
