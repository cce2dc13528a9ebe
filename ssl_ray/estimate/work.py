"""Steps, arithmetic, memory, hours and the bottleneck of a study, out of its configuration and a few measured rates."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from ssl_ray.config.schema import Study
from ssl_ray.data.canonical import levels
from ssl_ray.estimate.probe import Timing
from ssl_ray.estimate.volumes import Survey
from ssl_ray.networks.flops import Device, Flops, autoencoder_flops, unetr_flops
from ssl_ray.networks.unetr import build_autoencoder, build_unetr
from ssl_ray.pretrain.samples import SampleTable
from ssl_ray.pretrain.stream import segments

MFU = {"vit": 0.25, "vit compiled": 0.32, "unetr": 0.05}
"""Share of the bfloat16 peak that the arithmetic of a step reaches. ViT: 0.24 to 0.27 and 0.31 to 0.34 on an H100 SXM
at 64 to 256 patches a step, by experiments/benchmarks/gpu.py. UNETR: a guess, as 4 patches took the time of their
launches; its wide, shallow convolutions are bound by memory."""
MFU_FLOAT32 = {"vit": 0.50, "vit compiled": 0.50, "unetr": 0.10}
"""The same in float32 without TF32: ViT, H100 SXM, 64 patches a step; UNETR in proportion."""
LAUNCH_SECONDS, GRAPH_SECONDS = 0.060, 0.006
"""Least time of a step, where the host launches its kernels one by one (8 to 64 patches beside that H100: 58 to 70 ms)
and where the step is one CUDA graph, which it is for a single worker (8 patches: 6.0 and 7.1 ms)."""
LOOP_SECONDS = 0.020
"""Of Ray Data's scheduling loop for a block, by experiments/benchmarks/scale.py; every worker has a loop of its own."""
_READ_SECONDS, _READ_BYTES = 0.2e-3, 333e6
"""A reading core's time for a patch: fixed, and bytes a second; 350 uint8 patches of 96³ a second."""
_PAGE = 4096
DISK_BYTES = 500e6
"""A second and machine, of patches out of a store that its memory cannot hold: a guess for a local disk."""


@dataclass(frozen=True)
class Cluster:
    """What the study will find: CPUs, GPUs, bytes of object store and of memory, infinite where taken as enough.

    `where` is for people.
    """

    where: str
    cpus: float
    gpus: float
    object_store: float
    memory: float
    nodes: int = 1


@dataclass(frozen=True)
class PretrainingEstimate:
    """The pretraining; rates are those of all workers together, times are in seconds, None where nothing is known."""

    workers: int
    share: int
    steps: int
    epochs: int
    patches: int
    validation_patches: int
    flops_per_patch: float
    flops: float
    patch_bytes: int
    step_seconds: float | None
    arithmetic_rate: float | None
    reader_rate: float
    reader_cores_needed: float | None
    storage_bytes_per_patch: float | None
    storage_rate: float | None
    rate: float | None
    bytes_per_second_per_worker: float | None
    bottleneck: str | None
    seconds: float | None
    object_store_bytes: float
    block_bytes: int
    checkpoint_bytes: int
    checkpoints_kept: int
    checkpoint_minutes: float
    exchanged_bytes: float


@dataclass(frozen=True)
class GridEstimate:
    """The fine-tuning grid; times in seconds."""

    cells: int
    concurrent: int
    steps: int
    patches_per_step: int
    flops_per_step: float
    validations: int
    windows: float | None
    flops: float
    step_seconds: float | None
    validation_seconds: float | None
    trial_seconds: float | None
    seconds: float | None
    checkpoint_bytes: int


def plan_pretraining(
    study: Study, volumes: Survey, device: Device | None, timing: Timing | None, cluster: Cluster
) -> PretrainingEstimate:
    """The pretraining on a named device or, with `timing`, at the measured speed.

    Args:
        study: the experiment; with a range of workers, the most of them.
        volumes: of the study.
        device: a kind of GPU; None: only `timing` counts.
        timing: of a probe.
        cluster: what reads patches.
    """
    config = study.pretrain
    world = config.worker_range[1]
    shapes = np.ones((volumes.training, 3), np.int64)
    plan = SampleTable(
        study.seed, shapes, config.patch_size, config.patches_per_volume, config.batch_size, config.epochs
    )
    views = 2 if config.contrastive.enabled else 1
    flops = autoencoder_flops(study.network, config.patch_size)
    share = len(plan.rank_samples(0, 0, world))
    itemsize = 1 if levels(config.preparation.hu_window) == 255 else 2
    patch_bytes = math.prod(config.patch_size) * itemsize
    patches = plan.steps * config.batch_size
    checks = volumes.validation * config.patches_per_volume * len(plan.boundaries(config.validate_every))

    least = LAUNCH_SECONDS if world > 1 else GRAPH_SECONDS
    network = "vit compiled" if config.compile else "vit"
    step = _step_seconds(flops, share * views, device, config.precision, timing, network, least)
    arithmetic = config.batch_size / step if step else None
    core = 1 / (_READ_SECONDS + patch_bytes / _READ_BYTES)
    # Where the workers leave no core, reading tasks run beside them (`stream.open_segment`): about one core of them.
    readers = max(1.0, cluster.cpus - world * config.cpus_per_worker)
    reading = readers * core
    touched = _touched(volumes, config.patch_size, itemsize)
    fits = volumes.bytes is None or volumes.bytes <= cluster.memory
    storage = None if fits or touched is None else cluster.nodes * DISK_BYTES / touched
    segment = segments(plan, 0, world, config.block_megabytes * 2**20, itemsize)[0]
    looping = segment.block_steps * config.batch_size / LOOP_SECONDS
    rate = min(arithmetic, reading, looping, storage or math.inf) if arithmetic else None
    seconds = None
    if rate:
        seconds = patches / rate + checks * flops.forward / (flops.training * views) / rate
    launches = bool(device and step and timing is None and step <= least)
    bottleneck = None
    if arithmetic:
        slow = "kernel launches (too few patches a worker and step)" if launches else "arithmetic"
        limits = {slow: arithmetic, "feed (cores that read patches)": reading, "storage": storage or math.inf}
        limits["feed (Ray Data's loop: raise pretrain.block_megabytes)"] = looping
        bottleneck = min(limits, key=lambda name: limits[name])

    block = segment.block_steps * share * patch_bytes
    # Each worker holds a block, has one fetched and one waiting; each reading core makes one; two windows overlap.
    needed = arithmetic / core if arithmetic else None
    blocks = 3 * world + math.ceil(min(readers, needed or 1))
    with torch.device("meta"):
        parameters = list(build_autoencoder(study.network, config.patch_size).parameters())
    every, trained = (sum(p.numel() for p in parameters if p.requires_grad or all_) for all_ in (True, False))
    return PretrainingEstimate(
        workers=world,
        share=share,
        steps=plan.steps,
        epochs=config.epochs,
        patches=patches,
        validation_patches=checks,
        flops_per_patch=flops.training * views,
        flops=patches * flops.training * views + checks * flops.forward,
        patch_bytes=patch_bytes,
        step_seconds=step,
        arithmetic_rate=arithmetic,
        reader_rate=reading,
        reader_cores_needed=needed,
        storage_bytes_per_patch=touched,
        storage_rate=storage,
        rate=rate,
        bytes_per_second_per_worker=rate * patch_bytes / world if rate else None,
        bottleneck=bottleneck,
        seconds=seconds,
        object_store_bytes=2 * blocks * block,
        block_bytes=block,
        checkpoint_bytes=4 * (every + 2 * trained),
        checkpoints_kept=config.keep_checkpoints,
        checkpoint_minutes=config.checkpoint_minutes,
        exchanged_bytes=_exchanged(study, share, world) * 4 * trained,
    )


def plan_grid(
    study: Study,
    volumes: Survey,
    device: Device | None,
    timings: tuple[Timing, Timing] | None,
    cluster: Cluster,
) -> GridEstimate:
    """The fine-tuning grid; arguments as for `plan_pretraining`, `timings` of a step and of a batch of windows."""
    config = study.finetune
    grid = config.grid
    cells = len(config.split_sizes) * len(grid.init) * len(grid.lr) * len(grid.seeds)
    flops = unetr_flops(study.network, config.patch_size, config.cohort.classes)
    batch = config.volumes_per_step * config.patches_per_volume
    validations = math.ceil(config.steps / config.validate_every)
    held_out = volumes.group("labelled validation")
    per_volume = None
    if held_out and held_out.shape:
        per_volume = float(count_windows(held_out.shape, config.patch_size, config.sliding_window_overlap))
    count = per_volume * held_out.volumes if per_volume and held_out else None
    # At the end validation and test volumes are segmented once more with the selected weights.
    test = volumes.group("labelled test")
    last = (per_volume or 0) * ((held_out.volumes if held_out else 0) + (test.volumes if test else 0))
    all_windows = (count or 0) * validations + last

    trained, segmented = timings or (None, None)
    slow = 1 / config.gpus_per_trial if device and 0 < config.gpus_per_trial < 1 else 1.0  # trials share the GPU
    step = _step_seconds(flops, batch, device, config.precision, trained, "unetr", LAUNCH_SECONDS)
    window = None
    if segmented:
        window = segmented.seconds / config.sliding_window_batch
    elif device:
        least = LAUNCH_SECONDS / 3 / config.sliding_window_batch  # a third of a step's kernels
        window = max(least, flops.forward / _speed(device, config.precision, "unetr"))
    validation = count * window * slow if count and window else None
    trial = None
    if step and window:
        trial = (config.steps * step + all_windows * window) * slow
    places = _concurrent(study, cells, cluster)
    with torch.device("meta"):
        unetr = build_unetr(study.network, config.patch_size, config.cohort.classes)
    every, learned = (sum(p.numel() for p in unetr.parameters() if p.requires_grad or all_) for all_ in (True, False))
    return GridEstimate(
        cells=cells,
        concurrent=places,
        steps=config.steps,
        patches_per_step=batch,
        flops_per_step=batch * flops.training,
        validations=validations,
        windows=count,
        flops=cells * (config.steps * batch * flops.training + all_windows * flops.forward),
        step_seconds=step * slow if step else None,
        validation_seconds=validation,
        trial_seconds=trial,
        seconds=math.ceil(cells / places) * trial if trial else None,
        checkpoint_bytes=4 * (2 * every + 2 * learned),
    )


def count_windows(shape: Sequence[float], patch_size: Sequence[int], overlap: float) -> int:
    """Windows that MONAI's `sliding_window_inference` lays over a volume."""
    counts = []
    for length, side in zip(shape, patch_size, strict=True):
        interval = max(1, int(side * (1 - overlap)))
        counts.append(max(1, math.ceil((round(length) - side) / interval) + 1))
    return math.prod(counts)


def full_share(flops: float, device: Device, precision: str) -> int:
    """Patches a step from which on the arithmetic of a step takes longer than launching its kernels."""
    return math.ceil(LAUNCH_SECONDS * _speed(device, precision, "vit") / flops)


def _exchanged(study: Study, share: int, world: int) -> float:
    """What a worker sends in a step, as a multiple of the trained weights, by rings: DDP reduces gradients and spreads
    them; FSDP gathers weights for each pass forward and backward, and reduces gradients.
    """
    passes = math.ceil(share / (study.pretrain.microbatch or share))
    return (2 * passes + 1 if study.pretrain.shard else 2) * (world - 1) / world


def _touched(volumes: Survey, patch_size: Sequence[int], itemsize: int) -> float | None:
    """Bytes of the pages that a patch of a volume of mean size lies in; rows along the last axis are contiguous."""
    shape = next((group.shape for group in volumes.groups if not group.labelled and group.shape), None)
    if shape is None:
        return None
    x, y = (min(side, length) for side, length in zip(patch_size[:2], shape[:2], strict=True))
    return x * min(y * shape[2] * itemsize + _PAGE, shape[1] * shape[2] * itemsize)


def _step_seconds(
    flops: Flops,
    views: int,
    device: Device | None,
    precision: str,
    timing: Timing | None,
    network: str,
    least: float,
) -> float | None:
    if timing:
        return timing.seconds
    if device is None:
        return None
    return max(least, flops.training * views / _speed(device, precision, network))


def utilisation(device: Device, precision: str, network: str) -> tuple[float, float, str]:
    """Share of the peak that the steps of a network reach, that peak in FLOP/s, and the dtype.

    Args:
        device: kind of GPU.
        precision: as configured.
        network: a key of `MFU`.
    """
    dtype = device.dtype(precision)
    shares = MFU_FLOAT32 if dtype == "float32" else MFU
    return shares[network], device.peak(dtype), dtype


def _speed(device: Device, precision: str, network: str) -> float:
    share, peak, _ = utilisation(device, precision, network)
    return share * peak


def _concurrent(study: Study, cells: int, cluster: Cluster) -> int:
    config = study.finetune
    places = [float(cells), float(config.max_concurrent_trials or cells)]
    places.append(cluster.cpus / config.cpus_per_trial)
    if config.gpus_per_trial:
        places.append(cluster.gpus / config.gpus_per_trial)
    return max(1, int(min(places)))
