"""A torch without the private names that are used: training goes on, in the safe way."""

from typing import Any

import pytest
import torch
from torch import nn

from ssl_ray.training.precision import resolve
from ssl_ray.training.private import uncompile


def test_a_cpu_that_torch_says_nothing_of_computes_in_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    """Emulated bfloat16 would be several times slower."""
    monkeypatch.delattr(torch.cpu, "_is_avx512_bf16_supported")
    assert resolve("auto", torch.device("cpu")) == torch.float32


@pytest.mark.parametrize("gone", [False, True])
def test_a_module_that_cannot_be_compiled_works_again(monkeypatch: pytest.MonkeyPatch, gone: bool) -> None:
    """Whether or not torch still has the name under which a module keeps its compiled call."""

    def refuse(*_: Any) -> None:
        raise RuntimeError("no compiler")

    module, batch = nn.Linear(3, 2), torch.ones(1, 3)
    expected = module(batch)
    module.compile(backend=refuse)
    if gone:
        monkeypatch.delattr(nn.Module, "_compiled_call_impl")
    try:
        uncompile([module])
        assert torch.equal(module(batch), expected)
    finally:
        torch.compiler.set_stance("default")
