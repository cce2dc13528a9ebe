"""Where a pretraining begins that goes on from weights, its own or those of another one."""

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ssl_ray.networks.transfer import take
from ssl_ray.networks.weight_files import load_metadata, load_weights
from ssl_ray.pretrain.job import Recipe
from ssl_ray.pretrain.tasks.protocol import Task
from ssl_ray.pretrain.tasks.registry import build_task


def check_start(recipe: Recipe, weights: Path) -> dict[str, Any]:
    """What a pretraining would take of these weights, before it starts; raises as `start_from` does."""
    settings = recipe.settings
    task = build_task(settings.task, recipe.network, settings.patch_size, settings.preparation.channels)
    return start_from(weights, task, settings.patch_size)


def start_from(weights: Path, task: Task, patch_size: Sequence[int]) -> dict[str, Any]:
    """Load the file's encoder, the whole of it or nothing, into a task; what was done, by name.

    What the task has beside the encoder is loaded if the file has all of it, as one of the same task does; otherwise
    it stays new. `decoder` says which.

    Raises:
        UserError: as `take` does.
    """
    state = load_weights(weights)
    report = take(state, task.encoder, task.encoder.grid(patch_size), str(weights), load_metadata(weights))
    named, other = task.encoder.named_parameters(), task.encoder.beside
    encoder = {id(value) for name, value in named if not name.startswith(other)}
    beside = {name: value for name, value in task.network.named_parameters() if id(value) not in encoder}
    same = {name: state[name] for name, value in beside.items() if name in state and state[name].shape == value.shape}
    if whole := same.keys() == beside.keys():
        task.network.load_state_dict(same, strict=False)
    return asdict(report) | {"decoder": "its decoder is taken too" if whole else "the decoder is new"}
