"""A few real steps on random patches: how long they take on this machine, or on a worker of a cluster."""

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
from ssl_ray.data.store import Store
from ssl_ray.finetune.learner import SegmentationLearner
from ssl_ray.pretrain import learner as pretraining
from ssl_ray.pretrain.job import Job, Recipe
from ssl_ray.pretrain.samples import SampleTable
from ssl_ray.pretrain.stream import Feed
from ssl_ray.storage.mirror import Mirror
from ssl_ray.training.precision import autocast

STEPS = 20
_SECONDS = 15.0
_WAIT_SECONDS = 120.0
"""For room on a cluster."""


@dataclass(frozen=True)
class Timing:
    """Seconds of one call, the number of calls that were timed, the device's name and what it computed in."""

    seconds: float
    calls: int
    device: str
    dtype: str


def probe_pretraining(study: Study) -> Timing:
    """Optimizer steps of one worker on its share of a batch; what workers tell each other is not in it."""
    config = study.pretrain
    world = config.worker_range[1]
    plan = SampleTable(0, np.array([config.patch_size]), config.patch_size, 1, config.batch_size, 1)
    top = levels(config.preparation.hu_window)
    feed = Feed(plan, Store("."), ("",), ("",), "uint8" if top == 255 else "uint16", top)
    device = _device(config.gpu, config.cpus_per_worker)
    recipe, here = Recipe(config, study.network, study.seed), Path()
    job = Job(recipe, feed, feed, here, Mirror(here), "", None)  # type: ignore[arg-type]
    learner = pretraining.PretrainingLearner(job, device)
    share = len(plan.rank_samples(0, 0, world))
    patches = np.random.default_rng(0).integers(0, top + 1, (share, *config.patch_size)).astype(feed.dtype)
    if device.type == "cuda":  # as `stream` has them
        patches = torch.from_numpy(patches).pin_memory().numpy()
    rate = config.optimizer.lr
    seconds, calls = _time(lambda: learner.step(patches, np.arange(share), world, rate), device)
    return Timing(seconds, calls, _name(device), _short(learner.dtype))


def probe_finetuning(study: Study) -> tuple[Timing, Timing]:
    """Optimizer steps of a trial without reading its patches, and forward passes of `sliding_window_batch` windows."""
    config = study.finetune
    device = _device(config.gpus_per_trial > 0, config.cpus_per_trial)
    learner, rate = SegmentationLearner(config, study.network, device, config.optimizer.lr, seed=0), config.optimizer.lr
    images = torch.rand(config.volumes_per_step * config.patches_per_volume, 1, *config.patch_size, device=device)
    labels = torch.randint(config.cohort.classes, images.shape, device=device, dtype=torch.uint8)
    windows = torch.rand(config.sliding_window_batch, 1, *config.patch_size, device=device)

    def forward() -> None:
        with autocast(device, learner.dtype), torch.inference_mode():
            learner.network(windows)

    name = _name(device), _short(learner.dtype)
    trained = Timing(*_time(lambda: learner.step(images, labels, rate), device), *name)
    learner.network.eval()
    return trained, Timing(*_time(forward, device), *name)


def on_worker(function: Callable[[Study], Any], study: Study, cpus: float, gpus: float) -> Any:
    """Call a probe on the cluster that this process is connected to, with the resources of what it stands for.

    Raises:
        TimeoutError: when the cluster has no room for it for two minutes.
    """
    import ray

    task = ray.remote(num_cpus=cpus, num_gpus=gpus, max_retries=0)(function).remote(study)
    done, _ = ray.wait([task], timeout=_WAIT_SECONDS)
    if not done:
        ray.cancel(task, force=True)
        raise TimeoutError(f"no room on the cluster for a probe of {cpus:g} CPUs and {gpus:g} GPUs")
    return ray.get(task)


def _device(gpu: bool, cpus: float) -> torch.device:
    keep_freed()  # as the workers do
    torch.set_num_threads(max(1, int(cpus)))
    return torch.device("cuda:0" if gpu else "cpu")


def _name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _time(call: Callable[[], Any], device: torch.device) -> tuple[float, int]:
    """Seconds of a call, and the number of calls: `STEPS` after one that warms up, or fewer where they are slow."""

    def settled() -> float:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter()

    begun = settled()
    call()
    start = settled()
    if start - begun > _SECONDS:  # seconds a step: warming up is a small part of it
        return start - begun, 1
    calls = max(1, min(STEPS, int(_SECONDS / (start - begun))))
    for _ in range(calls):
        call()
    return (settled() - start) / calls, calls
