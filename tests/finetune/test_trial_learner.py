"""A trial's training step: compiled or not it learns the same, and prediction is left alone."""

import copy
import logging
from functools import partialmethod
from typing import Any

import pytest
import torch
from studies import small_study
from torch import Tensor, nn

from ssl_ray.finetune.learner import SegmentationLearner
from ssl_ray.training import gpu

CPU = torch.device("cpu")


def make(device: torch.device = CPU, **finetune: Any) -> SegmentationLearner:
    """A tiny one on patches of 16 x 16 x 32 voxels."""
    defaults = {"cohort": {"classes": 3}, "patch_size": [16, 16, 32], "patches_per_volume": 2}
    study = small_study(finetune=defaults | finetune)
    return SegmentationLearner(study.finetune, study.network, device, 0)


def steps(made: SegmentationLearner, first: int, last: int) -> list[float]:
    """Losses of the steps [first, last) on patches that depend on the step alone."""
    losses = []
    for step in range(first, last):
        random = torch.Generator().manual_seed(step)
        images = torch.rand(2, 1, 16, 16, 32, generator=random)
        labels = torch.randint(3, images.shape, generator=random, dtype=torch.uint8)
        losses.append(float(made.step(images, labels, 1e-2)[0]))
    return losses


@pytest.fixture
def traced(monkeypatch: pytest.MonkeyPatch) -> None:
    """`compile` without writing C++: what is traced is run as it is."""
    monkeypatch.setattr(nn.Module, "compile", partialmethod(nn.Module.compile, backend="eager"))


@pytest.mark.slow
def test_compiled_steps_are_the_eager_ones(traced: None) -> None:
    """Losses to 1e-5, under the same names in the state, also after going on from a state of either kind."""
    eager, fast = make(), make(compile=True)
    assert fast.network.state_dict().keys() == eager.network.state_dict().keys()
    assert all(parameter.grad is None for parameter in fast.network.parameters())
    assert steps(fast, 0, 2) == pytest.approx(steps(eager, 0, 2), rel=1e-5)
    state = copy.deepcopy((eager.network.state_dict(), eager.optimizer.state_dict()))
    resumed = make(compile=True)
    steps(resumed, 0, 1)
    resumed.network.load_state_dict(state[0])
    resumed.optimizer.load_state_dict(state[1])
    with torch.compiler.set_stance("fail_on_recompile"):
        assert steps(resumed, 2, 4) == pytest.approx(steps(eager, 2, 4), rel=1e-5), "without being traced again"


def test_prediction_is_not_compiled(traced: None) -> None:
    """Windows of other batch sizes trace nothing, give what the eager network gives, and training goes on as it was."""
    eager, fast = make(), make(compile=True)
    image = torch.rand(40, 20, 50)
    with torch.compiler.set_stance("fail_on_recompile"):
        assert torch.equal(fast.predict(image[None]), eager.predict(image[None]))
    assert steps(fast, 0, 1) == pytest.approx(steps(eager, 0, 1), rel=1e-5)
    with torch.compiler.set_stance("fail_on_recompile"):
        fast.predict(image[None])
        assert steps(fast, 1, 2) == pytest.approx(steps(eager, 1, 2), rel=1e-5)


def test_two_learners_of_a_process_do_not_share_weights_or_traces(traced: None) -> None:
    """Ray Tune lets a process train one trial after the other: the second trains its own network."""
    first, second = make(compile=True), make(compile=True)
    before = {name: value.clone() for name, value in first.network.state_dict().items()}
    steps(second, 0, 1)
    for name, value in first.network.state_dict().items():
        assert torch.equal(value, before[name]), name
    assert any(not torch.equal(value, before[name]) for name, value in second.network.state_dict().items())


@pytest.mark.parametrize("patch_size", [[16, 16, 32], [32, 16, 16]])
def test_automatic_precision_gives_the_same_gradients_every_time(patch_size: list[int]) -> None:
    """Whatever lay in memory before: on patches 16 voxels deep bfloat16 does not (torch 2.13), and is not taken."""
    made = make(patch_size=patch_size, precision="auto")
    assert patch_size[0] > 16 or made.dtype == torch.float32
    images, labels = torch.rand(2, 1, *patch_size), torch.ones(2, 1, *patch_size, dtype=torch.uint8)
    gradients: list[list[Tensor]] = []
    for _ in range(3):
        rubbish = [torch.full((10**power,), torch.nan) for power in (3, 4, 5, 6)]
        del rubbish
        made.network.zero_grad()
        made.objective(images, labels).backward()
        found = [parameter.grad for parameter in made.network.parameters() if parameter.grad is not None]
        gradients.append([gradient.clone() for gradient in found])
    for first, *others in zip(*gradients, strict=True):
        assert torch.isfinite(first).all()
        assert all(torch.equal(first, other) for other in others)


def test_bfloat16_that_cannot_be_right_is_refused() -> None:
    """Asked for by name, on a CPU, with patches 16 voxels deep; on a GPU it may be."""
    with pytest.raises(ValueError, match=r"more than 16 voxels deep.*got patch_size \[16, 32, 32\]"):
        make(patch_size=[16, 32, 32], precision="bfloat16")
    assert make(patch_size=[32, 16, 16], precision="bfloat16").dtype == torch.bfloat16
    assert make(patch_size=[16, 32, 32], precision="bfloat16", gpus_per_trial=1).config.precision == "bfloat16"


def test_where_a_step_cannot_be_recorded_it_goes_on_with_one_warning(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A CUDA graph that fails costs nothing but itself."""

    def refuse(*_: Any) -> None:
        raise RuntimeError("operation not permitted when stream is capturing")

    monkeypatch.setattr(gpu, "StepGraph", refuse)
    made = make()
    made.graphs = True
    with caplog.at_level(logging.WARNING, gpu.__name__):
        assert steps(made, 0, 3) == steps(make(), 0, 3)
    assert len(caplog.records) == 1
    assert not made.graphs


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("compile", [False, True])
def test_a_step_as_one_cuda_graph_is_the_step(compile: bool) -> None:
    """With a prediction in between, and a batch that is not finite: the losses of steps launched one by one.

    Two runs of the same steps differ by 5e-4 after six of them on an H200, with a graph or without: cuDNN's gradients
    of convolutions are sums in no fixed order.
    """
    device, found = torch.device("cuda:0"), []
    for graphs in (True, False):
        made = make(device, compile=compile)
        made.graphs = graphs
        losses = steps(made, 0, 3)
        made.predict(torch.rand(40, 20, 50, generator=torch.Generator().manual_seed(0)))
        images = torch.full((2, 1, 16, 16, 32), torch.nan)
        assert not made.step(images, torch.zeros(images.shape, dtype=torch.uint8), 1e-2)[1].isfinite()
        found.append(losses + steps(made, 3, 6))
        assert (made._graph is not None) == graphs
    assert found[0][0] == pytest.approx(found[1][0], rel=1e-6)
    assert found[0] == pytest.approx(found[1], rel=3e-3)
