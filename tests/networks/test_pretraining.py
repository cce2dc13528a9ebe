"""A network of another kind is pretrained by any task: exactly resumed, and taken over by its own segmentation."""

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from studies import small_study
from tiny_learner import BATCH, CPU, LEVELS, same, steps

from ssl_ray.data.store import Store
from ssl_ray.networks.primus.settings import Primus
from ssl_ray.networks.registry import build_segmentation
from ssl_ray.networks.transfer import transfer
from ssl_ray.networks.weight_files import describe, load_metadata, load_weights
from ssl_ray.pretrain.job import Job
from ssl_ray.pretrain.learner import PretrainingLearner
from ssl_ray.pretrain.samples import SampleTable
from ssl_ray.pretrain.stream import Feed
from ssl_ray.storage.mirror import Mirror
from ssl_ray.study.parts import recipe_of

PRIMUS = Primus(token=4, hidden_size=48, layers=2, num_heads=4)
MASKED = {"kind": "masked", "decoder": {"layers": 1, "hidden_size": 32, "mlp_dim": 48, "num_heads": 4}}
TASKS = pytest.mark.parametrize("task", [{}, {"task": MASKED}], ids=["restoration", "masked"])


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def make(folder: Path, **pretrain: Any) -> PretrainingLearner:
    """A tiny learner outside Ray."""
    study = small_study(folder, network=PRIMUS.model_dump(), pretrain={"batch_size": BATCH} | pretrain)
    table = SampleTable(0, np.array([[32] * 3] * 4), study.pretrain.patch_size, 2, BATCH, 1)
    feed = Feed(table, Store(folder), ("a",) * 4, ("a",) * 4, "uint8", LEVELS)
    return PretrainingLearner(Job(recipe_of(study), feed, feed, folder, Mirror(folder), "key", None), CPU)  # type: ignore[arg-type]


@TASKS
def test_a_resumed_pretraining_goes_on_bit_by_bit(tmp_path: Path, task: dict[str, Any]) -> None:
    """State out, state in; and it learns."""
    undisturbed = make(tmp_path, **task)
    first = steps(undisturbed, 0, 3)
    state = copy.deepcopy(undisturbed.state())
    losses = steps(undisturbed, 3, 9)
    resumed = make(tmp_path, **task)
    resumed.load(state)
    assert steps(resumed, 3, 9) == losses
    assert same(resumed.state(), undisturbed.state())
    assert losses[-1] < first[0]


@TASKS
def test_microbatches_equal_the_whole_batch(tmp_path: Path, task: dict[str, Any]) -> None:
    """To rounding."""
    whole, parts = make(tmp_path, **task), make(tmp_path, microbatch=3, **task)
    np.testing.assert_allclose(steps(parts, 0, 4), steps(whole, 0, 4), rtol=1e-5)


@TASKS
def test_what_it_exports_is_taken_over(tmp_path: Path, task: dict[str, Any]) -> None:
    """Through its file, with the metadata that name kind, token and layers."""
    made = make(tmp_path, **task)
    steps(made, 0, 2)
    made.best = 1.0
    made._export(2)
    weights, metadata = load_weights(made.job.weights), load_metadata(made.job.weights)
    side = made.config.patch_size
    assert metadata.items() >= describe(PRIMUS, side).items()
    network: Any = build_segmentation(PRIMUS, side, 1, 3)
    assert transfer(weights, network, "weights", metadata).share == 1
    own = made.task.encoder.state_dict()
    assert all(torch.equal(value, own[name]) for name, value in network.encoder.state_dict().items())
