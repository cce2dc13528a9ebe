"""Where a pretraining begins that goes on from weights, its own or those of another one."""

from dataclasses import asdict
from pathlib import Path
from typing import Any

from ssl_ray.networks.transfer import transfer
from ssl_ray.networks.weight_files import load_metadata, load_weights
from ssl_ray.pretrain.job import Recipe
from ssl_ray.pretrain.tasks.protocol import Task
from ssl_ray.pretrain.tasks.registry import build_task


def check_start(recipe: Recipe, weights: Path) -> dict[str, Any]:
    """What a pretraining would take of these weights, before it starts; raises as `start_from` does."""
    settings, channels = recipe.settings, recipe.settings.preparation.channels
    return start_from(weights, build_task(settings.task, recipe.network, settings.patch_size, channels))


def start_from(weights: Path, task: Task) -> dict[str, Any]:
    """Load the file's encoder, the whole of it or nothing, into a task; what was done, by name. Raises as `transfer`.

    What the task has beside the encoder is loaded if the file has all that the task trains, in the same shapes;
    otherwise it stays new. `decoder` says which.
    """
    state = load_weights(weights)
    report = transfer(state, task.encoder, str(weights), load_metadata(weights))
    trained = {name: value.shape for name, value in task.network.named_parameters() if value.requires_grad}
    whole = all(name in state and state[name].shape == shape for name, shape in trained.items())
    if whole:
        task.network.load_state_dict({name: state[name] for name in trained}, strict=False)
    return asdict(report) | {"decoder": "its decoder is taken too" if whole else "the decoder is new"}
