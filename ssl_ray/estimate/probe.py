"""A few real steps on random patches, and the reading of a few stored ones, timed here or on a worker of a cluster."""

import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ssl_ray.cluster.malloc import keep_freed
from ssl_ray.config.schema import Study
from ssl_ray.data.canonical import levels
from ssl_ray.data.store import Store, Volume
from ssl_ray.finetune.learner import SegmentationLearner
from ssl_ray.pretrain.job import Job, Recipe
from ssl_ray.pretrain.learner import PretrainingLearner
from ssl_ray.pretrain.samples import SampleTable
from ssl_ray.pretrain.stream import Feed
from ssl_ray.storage.folders import Folders
from ssl_ray.storage.mirror import Mirror
from ssl_ray.training.precision import autocast

STEPS = 20
_SECONDS = 15.0
"""Fewer steps are timed where they would take longer than this."""
_VOLUMES = 32
"""Stored volumes that a patch each is read from."""
_WAIT_SECONDS = 120.0
"""For the resources that a probe on a cluster asks for."""


@dataclass(frozen=True)
class Timing:
    """What a probe measured.

    Attributes:
        step_seconds: of an optimizer step, the mean over `steps` of them.
        steps: that were timed.
        device: its name.
        dtype: that it computed in.
        read_seconds: of reading one patch out of memory on one core; None where the store has no volume.
        window_seconds: of the prediction of one sliding window; None for pretraining.
    """

    step_seconds: float
    steps: int
    device: str
    dtype: str
    read_seconds: float | None = None
    window_seconds: float | None = None


def attempt(
    title: str, call: Callable[[], Timing], cpus: float, gpus: float, gpus_there: float, warnings: list[str]
) -> Timing | None:
    """Call a probe here or, with these resources, on the cluster in RAY_ADDRESS, to which this process is connected.

    Returns:
        None where that was not possible; `warnings` then says why.
    """
    if gpus > gpus_there:
        warnings.append(f"{title}: no times, as there is no GPU to probe; name one with --gpu")
        return None
    try:
        return _on_worker(call, cpus, gpus) if os.environ.get("RAY_ADDRESS") else call()
    except TimeoutError as error:
        warnings.append(f"{title}: {error}")
    except torch.OutOfMemoryError as error:
        warnings.append(f"{title}: a step does not fit into the device's memory: {str(error).partition('. ')[0]}")
    return None


def probe_pretraining(study: Study, folders: Folders, stored: tuple[Volume, ...]) -> Timing:
    """Optimizer steps of one worker on its share of a batch, without what workers tell each other.

    Args:
        study: the experiment.
        folders: of the study.
        stored: volumes of the pretraining that the store has.
    """
    config, stored = study.pretrain, stored[:_VOLUMES]
    world, top = config.worker_range[1], levels(config.preparation.hu_window)
    shapes = np.array([volume.shape for volume in stored] or [config.patch_size])
    table = SampleTable(0, shapes, config.patch_size, 1, config.batch_size, 1)
    keys, ids = (tuple(getattr(volume, name) for volume in stored) for name in ("key", "id"))
    feed = Feed(table, Store(folders.cache, folders.scratch), keys, ids, "uint8" if top == 255 else "uint16", top)
    recipe, here = Recipe(config, study.network, study.seed), Path()  # steps alone write nothing into its folder
    job = Job(recipe, feed, feed, here, Mirror(here), "", None)  # type: ignore[arg-type]
    device = _device(config.gpu, config.cpus_per_worker)
    learner = PretrainingLearner(job, device)
    share = len(table.rank_samples(0, 0, world))
    patches = np.random.default_rng(0).integers(0, top + 1, (share, *config.patch_size)).astype(feed.dtype)
    if device.type == "cuda":  # pinned, as the stream's
        patches = torch.from_numpy(patches).pin_memory().numpy()
    seconds, calls = _time(lambda: learner.step(patches, np.arange(share), world, config.optimizer.lr), device)
    reading = None
    if stored:
        samples = list(table.validation())
        reading = _time(lambda: feed.read(samples), torch.device("cpu"))[0] / len(samples)
    return Timing(seconds, calls, *_names(device, learner.dtype), read_seconds=reading)


def probe_finetuning(study: Study) -> Timing:
    """Optimizer steps of a trial, without reading its patches, and forward passes of its sliding windows."""
    config = study.finetune
    device = _device(config.gpus_per_trial > 0, config.cpus_per_trial)
    rate = config.optimizer.lr
    learner = SegmentationLearner(config, study.network, device, rate, seed=0)
    images = torch.rand(config.volumes_per_step * config.patches_per_volume, 1, *config.patch_size, device=device)
    labels = torch.randint(config.cohort.classes, images.shape, device=device, dtype=torch.uint8)
    windows = torch.rand(config.sliding_window_batch, 1, *config.patch_size, device=device)

    def forward() -> None:
        with autocast(device, learner.dtype), torch.inference_mode():
            learner.network(windows)

    seconds, calls = _time(lambda: learner.step(images, labels, rate), device)
    learner.network.eval()
    window = _time(forward, device)[0] / len(windows)
    return Timing(seconds, calls, *_names(device, learner.dtype), window_seconds=window)


def _on_worker(call: Callable[[], Timing], cpus: float, gpus: float) -> Timing:
    import ray

    task = ray.remote(num_cpus=cpus, num_gpus=gpus, max_retries=0)(lambda: call()).remote()
    done, _ = ray.wait([task], timeout=_WAIT_SECONDS)
    if not done:
        ray.cancel(task, force=True)
        raise TimeoutError(f"no room on the cluster for a probe of {cpus:g} CPUs and {gpus:g} GPUs")
    timing: Timing = ray.get(task)
    return timing


def _device(gpu: bool, cpus: float) -> torch.device:
    keep_freed()  # as workers and trials do
    torch.set_num_threads(max(1, int(cpus)))
    return torch.device("cuda:0" if gpu else "cpu")


def _names(device: torch.device, dtype: torch.dtype) -> tuple[str, str]:
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    return name, str(dtype).removeprefix("torch.")


def _time(call: Callable[[], Any], device: torch.device) -> tuple[float, int]:
    """Mean seconds of a call after one that warms up, and the number of calls."""

    def now() -> float:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter()

    begun = now()
    call()
    start = now()
    if start - begun > _SECONDS:  # warming up is a small part of so long a call
        return start - begun, 1
    calls = max(1, min(STEPS, int(_SECONDS / (start - begun))))
    for _ in range(calls):
        call()
    return (now() - start) / calls, calls
