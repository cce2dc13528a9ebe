"""Every private name of torch that this program uses, each with what happens where a torch has it no longer."""

from collections.abc import Iterable

import torch
from torch import nn


def cpu_computes_bfloat16() -> bool:
    """Whether this CPU multiplies matrices in bfloat16 by itself; False, so float32, where torch does not say.

    A CPU that emulates it is five times slower than in float32. Torch has no public question for this.
    """
    try:
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported() and torch.cpu._is_avx512_bf16_supported())
    except (AttributeError, RuntimeError):
        return False


def uncompile(modules: Iterable[nn.Module]) -> None:
    """Undo `module.compile()`; where a torch keeps the compiled call elsewhere, this process compiles nothing more."""
    if not hasattr(nn.Module, "_compiled_call_impl"):
        torch.compiler.set_stance("force_eager")
        return
    for module in modules:
        module._compiled_call_impl = None
