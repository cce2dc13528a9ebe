"""A few real steps on random patches, timed where the command runs."""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ssl_ray.cluster.malloc import keep_freed
from ssl_ray.config.schema import Study
from ssl_ray.data.store import Store
from ssl_ray.finetune.learner import SegmentationLearner
from ssl_ray.pretrain.job import Job, Recipe
from ssl_ray.pretrain.learner import PretrainingLearner
from ssl_ray.pretrain.samples import SampleTable
from ssl_ray.pretrain.stream import Feed
from ssl_ray.storage.mirror import Mirror
from ssl_ray.training.precision import autocast, named, resolve

_CALLS, _SECONDS = 20, 15.0
"""So many calls are timed, or fewer where they take longer than this."""


def probe_pretraining(study: Study) -> float:
    """Seconds of a worker's optimizer step on its share of a batch, without reading and exchange between workers."""
    config, here = study.pretrain, Path()  # a step writes nothing there
    world, kept = config.worker_range[1], config.preparation.normalise.storage
    table = SampleTable(0, np.array([config.patch_size]), config.patch_size, 1, config.batch_size, 1)
    feed = Feed(table, Store(here), (), (), kept.dtype, kept.levels)
    device = _device(config.gpu, config.cpus_per_worker)
    precision = named(resolve(config.precision, device))  # `auto` would be written down
    recipe = Recipe(config.model_copy(update={"precision": precision}), study.network, study.seed)
    learner = PretrainingLearner(Job(recipe, feed, feed, here, Mirror(here), "", None), device)  # type: ignore[arg-type]
    learner.world = world
    indices = np.array(table.rank_samples(0, 0, world))
    dtype, pinned = getattr(torch, feed.dtype), device.type == "cuda"  # as the stream's
    shape = len(indices), config.preparation.channels, *config.patch_size
    patches = torch.empty(shape, dtype=dtype, pin_memory=pinned).numpy()
    patches[:] = np.random.default_rng(0).integers(0, kept.levels + 1, shape)
    return _time(lambda: learner.step(patches, indices, config.optimizer.lr), device)


def probe_finetuning(study: Study) -> tuple[float, float]:
    """Seconds of a trial's optimizer step, without reading its patches, and of predicting one sliding window."""
    config, rate = study.finetune, study.finetune.optimizer.lr
    device = _device(config.gpus_per_trial > 0, config.cpus_per_trial)
    learner = SegmentationLearner(config, study.network, device, seed=0)
    learner.thaw(config.steps)  # as in most steps, where the encoder is frozen at first
    patch = config.preparation.channels, *config.patch_size
    images = torch.rand(config.volumes_per_step * config.patches_per_volume, *patch, device=device)
    labels = torch.randint(config.cohort.classes, images[:, :1].shape, device=device, dtype=torch.uint8)
    windows = torch.rand(config.sliding_window_batch, *patch, device=device)

    seconds = _time(lambda: learner.step(images, labels, rate), device)
    learner.network.eval()
    with autocast(device, learner.dtype), torch.inference_mode():
        return seconds, _time(lambda: learner.network(windows), device) / len(windows)


def _device(gpu: bool, cpus: float) -> torch.device:
    keep_freed()  # as workers and trials do
    torch.set_num_threads(max(1, int(cpus)))
    return torch.device("cuda:0" if gpu else "cpu")


def _time(call: Callable[[], Any], device: torch.device) -> float:
    """Mean seconds of a call, after one that warms up."""
    wait = torch.get_device_module(device).synchronize
    call()
    wait()
    start, calls = time.perf_counter(), 0
    while calls < _CALLS and time.perf_counter() - start < _SECONDS:
        call()
        calls += 1
    wait()
    return (time.perf_counter() - start) / calls
