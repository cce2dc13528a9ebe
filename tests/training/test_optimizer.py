"""Learning rate and optimizer step against torch's own."""

from typing import Literal

import pytest
import torch
from torch import nn

from ssl_ray.config.schema import Optimizer
from ssl_ray.training.optimizer import build_optimizer, learning_rate, take_step
from ssl_ray.training.precision import autocast, resolve


def test_warm_up_then_cosine_equals_torch() -> None:
    """The cosine after the warm-up is that of torch's CosineAnnealingLR."""
    config = Optimizer(lr=0.1, schedule="cosine", warmup_steps=5)
    reference = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.1)
    cosine = torch.optim.lr_scheduler.CosineAnnealingLR(reference, T_max=20)
    for step in range(25):
        if step < 5:
            assert learning_rate(config, step, 25) == pytest.approx(0.1 * (step + 1) / 5)
            continue
        assert learning_rate(config, step, 25) == pytest.approx(reference.param_groups[0]["lr"], abs=1e-12)
        reference.step()
        cosine.step()


def test_a_constant_rate_stays() -> None:
    """Without a schedule every step after the warm-up has the rate asked for."""
    config = Optimizer(lr=0.1, warmup_steps=2)
    assert [learning_rate(config, step, 6) for step in range(6)] == [0.05, 0.1, 0.1, 0.1, 0.1, 0.1]


@pytest.mark.parametrize("name", ["adam", "adamw"])
def test_steps_equal_torch_with_clipping(name: Literal["adam", "adamw"]) -> None:
    """Five clipped steps give the weights of torch's optimizer and `clip_grad_norm_`; frozen parameters stay."""
    torch.manual_seed(0)
    ours, theirs = nn.Linear(4, 3), nn.Linear(4, 3)
    theirs.load_state_dict(ours.state_dict())
    frozen = nn.Parameter(torch.ones(2), requires_grad=False)
    config = Optimizer(name=name, lr=0.05, weight_decay=0.1, clip_norm=0.5)
    optimizer = build_optimizer(config, [*ours.parameters(), frozen])
    kind = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}[name]
    reference = kind(theirs.parameters(), lr=0.05, weight_decay=0.1)
    for _ in range(5):
        batch = torch.randn(8, 4)
        ours(batch).square().sum().backward()
        theirs(batch).square().sum().backward()
        expected = nn.utils.clip_grad_norm_(theirs.parameters(), 0.5)
        assert torch.allclose(take_step(optimizer, config, 0.05), expected)
        reference.step()
        reference.zero_grad()
    for mine, other in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert mine.grad is None
        torch.testing.assert_close(mine, other)
    assert torch.equal(frozen, torch.ones(2))


def test_precision_is_what_was_asked_for() -> None:
    """float32 computes in float32, bfloat16 in bfloat16, and auto in one of them."""
    cpu = torch.device("cpu")
    weight, batch = torch.randn(3, 3), torch.randn(3, 3)
    for name, dtype in {"float32": torch.float32, "bfloat16": torch.bfloat16}.items():
        with autocast(cpu, resolve(name, cpu)):
            assert (weight @ batch).dtype == dtype
    assert resolve("auto", cpu) in (torch.float32, torch.bfloat16)


def test_a_cpu_that_torch_says_nothing_of_computes_in_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    """Emulated bfloat16 would be several times slower."""
    monkeypatch.delattr(torch.cpu, "_is_avx512_bf16_supported")
    assert resolve("auto", torch.device("cpu")) == torch.float32
