"""A tiny pretraining learner outside Ray, and what tests do with it."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from studies import small_study

from ssl_ray.data.store import Store
from ssl_ray.pretrain.job import Job
from ssl_ray.pretrain.learner import PretrainingLearner
from ssl_ray.pretrain.samples import SampleTable
from ssl_ray.pretrain.stream import Feed
from ssl_ray.storage.mirror import Mirror
from ssl_ray.study.parts import recipe_of

BATCH, SIDE, LEVELS = 4, 16, 221
CPU = torch.device("cpu")
MASKED: dict[str, Any] = {
    "patch_size": 32,
    "task": {"kind": "masked", "decoder_layers": 1, "decoder_size": 32},
}
"""The other task, which needs patches of several tokens."""
PRIMUS: dict[str, Any] = {"kind": "primus", "token": 4, "hidden_size": 48, "layers": 2, "num_heads": 4}
MASKED_PRIMUS: dict[str, Any] = {"network": PRIMUS, "task": MASKED["task"]}


def make(
    tmp_path: Path, device: torch.device = CPU, network: dict[str, Any] | None = None, **pretrain: Any
) -> PretrainingLearner:
    """A tiny learner outside Ray."""
    other = {"network": network} if network else {}
    study = small_study(tmp_path, pretrain={"batch_size": BATCH} | pretrain, **other)
    table = SampleTable(0, np.array([[32] * 3] * 4), study.pretrain.patch_size, 2, BATCH, 1)
    feed = Feed(table, Store(tmp_path), ("a",) * 4, ("a",) * 4, "uint8", LEVELS)
    return PretrainingLearner(Job(recipe_of(study), feed, feed, tmp_path, Mirror(tmp_path), "key", None), device)  # type: ignore[arg-type]


def steps(made: PretrainingLearner, first: int, last: int) -> list[float]:
    """Losses of the steps [first, last) on patches that depend on the step alone."""
    losses = []
    for step in range(first, last):
        images = images_of(made, step)
        indices = np.arange(step * BATCH, (step + 1) * BATCH)
        losses.append(float(made.step(images, indices, 1e-3 / (1 + step))[0]))
    return losses


def images_of(made: PretrainingLearner, seed: int) -> np.ndarray:
    """Patches as stored, (B, X, Y, Z)."""
    shape = BATCH, *made.config.patch_size
    return np.random.default_rng(seed).integers(0, LEVELS + 1, shape, dtype=np.uint8)


def weights(made: PretrainingLearner) -> dict[str, torch.Tensor]:
    return {name: value.detach().clone() for name, value in made.network.state_dict().items()}


def same(one: Any, other: Any) -> bool:
    """Bit by bit, and of the same types."""
    if isinstance(one, torch.Tensor):
        return torch.equal(one, other) and one.dtype == other.dtype
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if isinstance(one, list):
        return len(one) == len(other) and all(map(same, one, other))
    return type(one) is type(other) and bool(one == other)
