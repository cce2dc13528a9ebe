"""A network of another kind is pretrained by any task: exactly resumed, and taken over by its own segmentation."""

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny_learner import MASKED_PRIMUS, PRIMUS, make, same, steps

from ssl_ray.networks.primus.settings import Primus
from ssl_ray.networks.registry import build_segmentation
from ssl_ray.networks.transfer import transfer
from ssl_ray.networks.weight_files import describe, load_metadata, load_weights

SETTINGS = pytest.mark.parametrize("settings", [{"network": PRIMUS}, MASKED_PRIMUS], ids=["restoration", "masked"])


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@SETTINGS
def test_a_resumed_pretraining_goes_on_bit_by_bit(tmp_path: Path, settings: dict[str, Any]) -> None:
    """State out, state in; and it learns."""
    undisturbed = make(tmp_path, **settings)
    first = steps(undisturbed, 0, 3)
    state = copy.deepcopy(undisturbed.state())
    losses = steps(undisturbed, 3, 9)
    resumed = make(tmp_path, **settings)
    resumed.load(state)
    assert steps(resumed, 3, 9) == losses
    assert same(resumed.state(), undisturbed.state())
    assert losses[-1] < first[0]


@SETTINGS
def test_microbatches_equal_the_whole_batch(tmp_path: Path, settings: dict[str, Any]) -> None:
    """To rounding."""
    whole, parts = make(tmp_path, **settings), make(tmp_path, microbatch=3, **settings)
    np.testing.assert_allclose(steps(parts, 0, 4), steps(whole, 0, 4), rtol=1e-5)


@SETTINGS
def test_what_it_exports_is_taken_over(tmp_path: Path, settings: dict[str, Any]) -> None:
    """Through its file, with the metadata that name kind, token and layers."""
    made = make(tmp_path, **settings)
    steps(made, 0, 2)
    made.best = 1.0
    made._export(2)
    weights, metadata = load_weights(made.job.weights), load_metadata(made.job.weights)
    network, side = Primus.model_validate(PRIMUS), made.config.patch_size
    assert metadata.items() >= describe(network, side).items()
    segmentation: Any = build_segmentation(network, side, 1, 3)
    assert transfer(weights, segmentation, "weights", metadata).share == 1
    own = made.task.encoder.state_dict()
    assert all(torch.equal(value, own[name]) for name, value in segmentation.encoder.state_dict().items())
