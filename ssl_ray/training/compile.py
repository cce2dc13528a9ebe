"""torch.compile, on machines where it works."""

import logging
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from ssl_ray.text import reason


def compile_or_not(modules: Sequence[nn.Module], attempt: Callable[[], Any], setting: str) -> bool:
    """Compile modules in place, if that works here; the names in their state dicts stay as they are.

    Compiling block by block takes a twelfth of the time of a whole ViT, whose blocks share one graph, and DDP can begin
    to exchange the gradients of one block while the next one's are computed.

    `attempt` is a forward and backward pass in the shapes of a training step: an error of the compiler comes there. If
    one does, this returns False, one warning names the `setting` and the cause, and the modules work as before.
    """
    for module in modules:
        module.compile(dynamic=False)
    try:
        attempt()
    except Exception as error:  # a missing compiler, an operator that it does not know: any library's own error
        for module in modules:
            module._compiled_call_impl = None  # torch has no public way to undo `compile`
        torch.compiler.reset()
        logging.getLogger(__name__).warning("%s: going on without torch.compile: %s", setting, reason(error))
        return False
    return True
