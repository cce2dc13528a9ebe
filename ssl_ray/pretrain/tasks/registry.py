"""Pretraining tasks by their kind, whose module is imported when one is built, and weights that one starts from."""

from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache
from importlib import import_module
from pathlib import Path

import numpy as np
import torch

from ssl_ray.config.pretrain import AnyTask, Pretrain
from ssl_ray.config.schema import Network
from ssl_ray.networks.flops import Cost, counted
from ssl_ray.networks.transfer import transfer
from ssl_ray.networks.weight_files import load_metadata, load_weights
from ssl_ray.pretrain.tasks.protocol import Task


def build_task(settings: AnyTask, network: Network, patch_size: Sequence[int], channels: int = 1) -> Task:
    """The task around a new network, whose initial weights come from torch's generator."""
    module = import_module(f"ssl_ray.pretrain.tasks.{settings.kind}.task")
    task: Task = module.build_task(settings, network, patch_size, channels)
    return task


def start_from(weights: Path, task: Task) -> bool:
    """Load a file's encoder, the whole of it or nothing, into a task; raises as `transfer` does.

    What the task has beside the encoder is loaded too, and the answer is True, if the file has all that the task
    trains, in the same shapes; otherwise it stays new.
    """
    state = load_weights(weights)
    transfer(state, task.encoder, str(weights), load_metadata(weights))
    trained = {name: value.shape for name, value in task.network.named_parameters() if value.requires_grad}
    whole = all(name in state and state[name].shape == shape for name, shape in trained.items())
    if whole:
        task.network.load_state_dict({name: state[name] for name in trained}, strict=False)
    return whole


def check_start(config: Pretrain, network: Network, weights: str) -> bool:
    """Whether a pretraining that goes on from a file takes its decoder, too; raises before it starts, as it would."""
    return start_from(Path(weights), build_task(config.task, network, config.patch_size, config.preparation.channels))


@lru_cache(maxsize=8)
def task_cost(settings: AnyTask, network: Network, patch_size: tuple[int, ...], channels: int = 1) -> Cost:
    """Floating-point operations for one patch: `training` of all its views, `forward` of its validation."""
    clean = torch.zeros(1, channels, *patch_size)
    with torch.device("meta"):
        task = build_task(settings, network, patch_size, channels)
    seen = task.see(clean, [task.draw(0, np.zeros(1, np.int64), 0)]).to("meta")
    cost = counted(task.network, lambda: task.validate(seen, clean.to("meta"))[0]["loss"])
    return replace(cost, training=task.views * cost.training)
