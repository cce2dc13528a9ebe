"""Pretraining tasks by their kind, whose module is imported when one is built, and not before."""

from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache
from importlib import import_module

import numpy as np
import torch

from ssl_ray.config.pretrain import AnyTask
from ssl_ray.config.schema import Network
from ssl_ray.networks.flops import Cost, counted
from ssl_ray.pretrain.tasks.protocol import Task


def build_task(settings: AnyTask, network: Network, patch_size: Sequence[int], channels: int = 1) -> Task:
    """The task around a new network, whose initial weights come from torch's generator."""
    module = import_module(f"ssl_ray.pretrain.tasks.{settings.kind}.task")
    task: Task = module.build_task(settings, network, patch_size, channels)
    return task


@lru_cache(maxsize=8)
def task_cost(settings: AnyTask, network: Network, patch_size: tuple[int, ...], channels: int = 1) -> Cost:
    """Floating-point operations for one patch: `training` of all its views, `forward` of its validation."""
    clean = torch.zeros(1, channels, *patch_size)
    with torch.device("meta"):
        task = build_task(settings, network, patch_size, channels)
    seen = task.see(clean, [task.draw(0, np.zeros(1, np.int64), 0)]).to("meta")
    cost = counted(task.network, lambda: task.validate(seen, clean.to("meta"))[0]["loss"])
    return replace(cost, training=task.views * cost.training)
