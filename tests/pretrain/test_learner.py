"""One worker's training step: what it computes, what it leaves alone, and what goes into a checkpoint."""

import copy
import logging
from collections.abc import Callable
from dataclasses import replace
from functools import partialmethod
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny_learner import BATCH, CPU, LEVELS, MASKED, SIDE, images_of, make, same, steps, weights
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from ssl_ray.networks import faster
from ssl_ray.networks.weight_files import load_metadata
from ssl_ray.pretrain import learner
from ssl_ray.pretrain.learner import scale
from ssl_ray.pretrain.stream import Feed
from ssl_ray.pretrain.tasks.registry import task_cost
from ssl_ray.pretrain.tasks.restoration.corruption import corrupt, draw, draws_of
from ssl_ray.pretrain.tasks.restoration.settings import Corruption
from ssl_ray.training import gpu
from ssl_ray.training.precision import autocast


@pytest.mark.parametrize("two_views", [False, True])
def test_the_loss_is_that_of_monais_own_forward(tmp_path: Path, two_views: bool) -> None:
    """Computed in parts, the first step's loss is the L1 of `ViTAutoEnc.forward`, to the bit."""
    made = make(tmp_path, task={"contrastive": {"enabled": two_views}})
    images = np.random.default_rng(0).integers(0, LEVELS + 1, (BATCH,) + (SIDE,) * 3, dtype=np.uint8)
    clean = scale(torch.from_numpy(images), LEVELS)
    view = corrupt(clean, draw(made.config.task.corruption, (SIDE,) * 3, 0, np.arange(BATCH)))
    with torch.no_grad(), autocast(CPU, made.dtype):
        expected = (made.network(view)[0] - clean).abs().mean()
    assert steps(made, 0, 1) == [float(expected)]


def test_the_contrastive_view_changes_the_training(tmp_path: Path) -> None:
    """The reported loss is the L1 of the first view, the same before the first step and another after it."""
    one, two = steps(make(tmp_path), 0, 3), steps(make(tmp_path, task={"contrastive": {"enabled": True}}), 0, 3)
    assert two[0] == pytest.approx(one[0], rel=1e-6)
    assert two[1] != one[1]
    assert two[2] != one[2]


TASKS = pytest.mark.parametrize("task", [{}, MASKED], ids=["restoration", "masked"])


@TASKS
def test_a_resumed_learner_goes_on_bit_by_bit(tmp_path: Path, task: dict[str, Any]) -> None:
    """State out, state in: the losses and the state after six more steps are those of the undisturbed learner."""
    undisturbed = make(tmp_path, **task)
    steps(undisturbed, 0, 3)
    state = copy.deepcopy(undisturbed.state())
    losses = steps(undisturbed, 3, 9)
    resumed = make(tmp_path, **task)
    resumed.load(state)
    assert steps(resumed, 3, 9) == losses
    assert same(resumed.state(), undisturbed.state())


@TASKS
def test_accumulated_microbatches_equal_the_whole_batch(tmp_path: Path, task: dict[str, Any]) -> None:
    """Three patches and then one, or four at once: the same losses and, to rounding, the same weights."""
    whole, parts = make(tmp_path, **task), make(tmp_path, microbatch=3, **task)
    np.testing.assert_allclose(steps(parts, 0, 4), steps(whole, 0, 4), rtol=1e-5)
    for name, value in weights(whole).items():
        torch.testing.assert_close(weights(parts)[name], value, rtol=1e-4, atol=1e-5)


@TASKS
def test_a_training_learns(tmp_path: Path, task: dict[str, Any]) -> None:
    """On the same patches again and again the loss falls."""
    made = make(tmp_path, **task)
    losses = [float(made.step(images_of(made, 0), np.arange(BATCH), 1e-2)[0]) for _ in range(20)]
    assert losses[-1] < 0.8 * losses[0]


@TASKS
def test_ddp_finds_no_parameter_unused(tmp_path: Path, task: dict[str, Any]) -> None:
    """A backward pass reaches all that is trainable, and nothing but idle norms is frozen."""
    made = make(tmp_path, **task)
    clean = scale(torch.from_numpy(images_of(made, 0)), LEVELS)
    made.task(made.task.see(clean, [made.task.draw(0, np.arange(BATCH), 0)]), clean)[1].backward()
    parameters = dict(made.network.named_parameters())
    assert {name for name, value in parameters.items() if value.grad is None} == {
        name for name, value in parameters.items() if not value.requires_grad
    }
    assert all("norm_cross_attn" in name for name, value in parameters.items() if not value.requires_grad)
    assert {id(value) for value in made.task.parameters()} == {id(value) for value in parameters.values()}


@TASKS
def test_what_is_sharded_and_compiled_is_part_of_the_task(tmp_path: Path, task: dict[str, Any]) -> None:
    """Each block once, and a forward pass calls every part."""
    made = make(tmp_path, **task)
    called: set[int] = set()
    assert len({id(block) for block in made.task.blocks}) == len(made.task.blocks) >= 12
    assert {id(block) for block in made.task.blocks} <= {id(part) for part in made.task.parts}
    for part in made.task.parts:
        part.register_forward_pre_hook(lambda module, _: called.add(id(module)))
    steps(made, 0, 1)
    assert called == {id(part) for part in made.task.parts}


@TASKS
def test_what_is_counted_is_what_a_step_computes(
    tmp_path: Path, task: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Floating-point operations of a patch, on the meta device, against a batch with content."""
    monkeypatch.setattr(faster, "mkl_is_narrow", lambda: False)  # torch does not count oneDNN's products
    made = make(tmp_path, **task)
    cost = task_cost(made.config.task, made.job.recipe.network, made.config.patch_size)
    clean = scale(torch.from_numpy(images_of(made, 0)), LEVELS)
    seen = made.task.see(clean, [made.task.draw(0, np.arange(BATCH), 0)])
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):  # torch does not count the fused one
        made.task(seen, clean)[1].backward()
    assert BATCH * cost.training == counter.get_total_flops()


class Noise(Feed):
    """Patches that no file is needed for, a function of their sample."""

    def read(self, samples: Any) -> Any:
        size = self.table.patch_size
        draws = (np.random.default_rng([sample.volume, *sample.origin]) for sample in samples)
        return np.stack([draw.integers(0, LEVELS + 1, size, dtype=np.uint8) for draw in draws])


@pytest.mark.parametrize(("task", "baseline"), [({}, "identity"), (MASKED, "mean")], ids=["restoration", "masked"])
def test_a_validation_is_fixed_and_has_a_baseline_and_a_picture(
    tmp_path: Path, task: dict[str, Any], baseline: str
) -> None:
    """Its losses are means over all patches, whatever the batches; the best weights say their task."""
    made, parts = make(tmp_path, **task), make(tmp_path, microbatch=3, **task)
    samples = made.job.validation
    for one in (made, parts):
        feed = Noise(samples.table, samples.store, samples.keys, samples.ids, "uint8", LEVELS)
        one.job = replace(one.job, validation=feed)
    found = made.validate(7, picture=True)
    picture = str(found.pop("picture"))
    assert Path(picture).read_bytes().startswith(b"\x89PNG")
    assert [*found] == ["validation_loss", f"validation_{baseline}_loss"]
    assert found == made.validate(8, picture=False)
    assert found == pytest.approx(parts.validate(7, picture=False), rel=1e-5)
    assert made.best == found["validation_loss"]
    facts = load_metadata(made.job.weights)
    assert (facts["task"], facts["step"]) == (made.config.task.kind, "7")


def test_the_error_of_a_picture_is_what_the_task_measures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """L1 over all of a restored patch, and over the dropped voxels of a masked one, whatever is made of the others."""
    titles: list[str] = []
    monkeypatch.setattr(learner, "draw_picture", lambda path, rows, title, *_: titles.append(title))
    truth, seen, made = torch.rand(1, 1, 8, 8, 8), torch.zeros(1, 1, 8, 8, 8), torch.zeros(1, 1, 8, 8, 8)
    seen[..., 4:] = torch.nan
    made[..., 4:] = truth[..., 4:] + 0.25
    drawing = make(tmp_path)
    drawing._picture(3, {"ground truth": truth, "seen": seen, "made": made})
    drawing._picture(3, {"ground truth": truth, "corrupted": seen.nan_to_num(), "restored": truth - 0.5})
    assert titles == ["step 3, L1 0.2500", "step 3, L1 0.5000"]


@pytest.mark.parametrize("poison", [torch.nan, torch.inf])
def test_a_step_that_is_not_finite_changes_nothing(tmp_path: Path, poison: float) -> None:
    """Weights and optimizer state stay bit by bit, the norm says so, and the next step is as if it had not been."""
    made, other = make(tmp_path), make(tmp_path)
    steps(made, 0, 2), steps(other, 0, 2)
    before = copy.deepcopy(made.state())
    handle = made.network.patch_embedding.register_forward_hook(lambda *call: call[-1] * poison)
    images = np.zeros((BATCH,) + (SIDE,) * 3, np.uint8)
    loss, norm = made.step(images, np.arange(BATCH), 1e-3)
    handle.remove()
    assert not torch.isfinite(loss)
    assert not torch.isfinite(norm)
    after = made.state()
    assert same(after["model"], before["model"])
    assert same(after["optimizer"]["state"], before["optimizer"]["state"])
    assert all(parameter.grad is None for parameter in made.network.parameters())
    assert steps(made, 2, 4) == steps(other, 2, 4)


def test_compiled_steps_are_the_eager_ones(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Losses to 1e-5 and weights under the same names; traced alone, without writing C++."""
    monkeypatch.setattr(torch.nn.Module, "compile", partialmethod(torch.nn.Module.compile, backend="eager"))
    eager, fast = make(tmp_path / "eager"), make(tmp_path / "fast", compile=True)
    assert steps(fast, 0, 2) == pytest.approx(steps(eager, 0, 2), rel=1e-5)
    assert weights(fast).keys() == weights(eager).keys()


def test_a_held_step_changes_nothing(tmp_path: Path) -> None:
    """What a CUDA graph warms up with is a whole step that leaves weights and optimizer state as they were."""
    made = make(tmp_path)
    steps(made, 0, 2)
    before = copy.deepcopy(made.state())
    made._go.fill_(False)
    (loss,) = steps(made, 2, 3)
    assert np.isfinite(loss)
    assert same(made.state()["model"], before["model"])
    assert same(made.state()["optimizer"]["state"], before["optimizer"]["state"])


def test_where_a_step_cannot_be_recorded_it_goes_on_with_one_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A CUDA graph that fails costs nothing but itself."""
    expected = steps(make(tmp_path), 0, 3)

    def refuse(*_: Any) -> None:
        raise RuntimeError("operation not permitted when stream is capturing")

    monkeypatch.setattr(gpu, "StepGraph", refuse)
    made = make(tmp_path)
    made.graphs = True
    with caplog.at_level(logging.WARNING, gpu.__name__):
        assert steps(made, 0, 3) == expected
    assert len(caplog.records) == 1
    assert not made.graphs


def test_the_draws_of_some_samples_are_those_samples() -> None:
    """Whether they are drawn alone or are rows of those of a batch."""
    config = Corruption(inpaint_size=(2, 6), outpaint_size=(4, 10), shuffle_size=3)
    drawn = draw(config, (SIDE,) * 3, 3, np.arange(6))
    some = draw(config, (SIDE,) * 3, 3, np.arange(2, 5))
    for name in ("key", "outpaint", "start", "stop", "shuffle", "shuffle_start"):
        assert same(getattr(draws_of(config, drawn.table[2:5]), name), getattr(some, name))


needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
SETTINGS: list[dict[str, Any]] = [
    {},
    {"microbatch": 3},
    {"task": {"contrastive": {"enabled": True}}},
    MASKED,
    {"optimizer": {"name": "adamw", "weight_decay": 0.1, "clip_norm": 0.01}},
]


@needs_gpu
@pytest.mark.parametrize("settings", SETTINGS)
def test_a_recorded_step_computes_what_the_eager_one_does(tmp_path: Path, settings: dict[str, Any]) -> None:
    """Eight steps with a learning rate that changes, as a CUDA graph and without one."""
    cuda = torch.device("cuda", 0)
    graph, eager = make(tmp_path, cuda, **settings), make(tmp_path, cuda, **settings)
    eager.graphs = False
    np.testing.assert_allclose(steps(graph, 0, 8), steps(eager, 0, 8), rtol=1e-4)
    assert graph._graph is not None
    assert eager._graph is None
    kinds: Callable[[Any], Any] = lambda state: [(key, type(value)) for key, value in state.items()]  # noqa: E731
    for one, other in zip(
        graph.state()["optimizer"]["param_groups"], eager.state()["optimizer"]["param_groups"], strict=True
    ):
        assert kinds(one) == kinds(other)
        assert one == other


@needs_gpu
def test_a_recorded_run_resumes_from_a_checkpoint_of_either_kind(tmp_path: Path) -> None:
    """The state of an eager learner goes into a recorded one and the other way round."""
    cuda = torch.device("cuda", 0)
    for first, second in ((True, False), (False, True), (True, True)):
        one, other = make(tmp_path, cuda), make(tmp_path, cuda)
        one.graphs, other.graphs = first, second
        steps(one, 0, 3)
        steps(other, 5, 7)  # recorded before the state is loaded
        other.load(copy.deepcopy(one.state()))
        np.testing.assert_allclose(steps(other, 3, 6), steps(one, 3, 6), rtol=1e-4)


def test_a_pretraining_keeps_the_precision_it_was_begun_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`auto` is settled where the training begins; one that names a type needs no note of it."""
    monkeypatch.setattr("ssl_ray.pretrain.learner.resolve", lambda *_: torch.bfloat16)
    make(tmp_path, precision="auto")
    monkeypatch.undo()
    assert make(tmp_path, precision="auto").dtype == torch.bfloat16
    assert make(tmp_path / "named", precision="float32").dtype == torch.float32
    assert not (tmp_path / "named").exists()
