"""Faults at moments that anyone could see: a file is named, a network computes, an optimizer has taken so many steps.

Each is a context manager for the process that it is used in. `fault` is called at the moment, before what happens there
does happen, and raises, kills the process or waits.
"""

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_pre_hook
from torch.optim.optimizer import register_optimizer_step_pre_hook


@contextmanager
def on_open(pattern: str, fault: Callable[[Path], None]) -> Iterator[None]:
    """The first time that a file is opened whose path matches, such as one that was just written and is digested."""
    with _audit("open", 0, pattern, fault):
        yield


@contextmanager
def on_rename(pattern: str, fault: Callable[[Path], None]) -> Iterator[None]:
    """The first time that a file or folder is to get a name that matches: what is written appears whole by that."""
    with _audit("os.rename", 1, pattern, fault):
        yield


@contextmanager
def _audit(event: str, place: int, pattern: str, fault: Callable[[Path], None]) -> Iterator[None]:
    waiting = [True]

    def hook(name: str, arguments: tuple[Any, ...]) -> None:
        if waiting and name == event and isinstance(arguments[place], str | bytes | os.PathLike):
            path = os.fsdecode(arguments[place])
            if fnmatch(path, pattern):
                waiting.clear()
                fault(Path(path))

    sys.addaudithook(hook)  # for as long as the process lives
    try:
        yield
    finally:
        waiting.clear()


@contextmanager
def after_steps(steps: int, fault: Callable[[], None]) -> Iterator[None]:
    """In an optimizer that has taken so many steps, before it takes the next one."""

    def hook(optimizer: Any, *_: Any) -> None:
        if next((int(state["step"]) for state in optimizer.state.values()), 0) == steps:
            fault()

    handle = register_optimizer_step_pre_hook(hook)
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def in_network(kind: type[nn.Module], fault: Callable[[nn.Module, Tensor], Tensor | None]) -> Iterator[None]:
    """In every forward pass of a network, with its input; the input is replaced by what `fault` returns."""

    def hook(module: nn.Module, arguments: tuple[Tensor, ...]) -> Tensor | None:
        return fault(module, arguments[0]) if isinstance(module, kind) else None

    handle = register_module_forward_pre_hook(hook)  # type: ignore[arg-type]  # it may return an input
    try:
        yield
    finally:
        handle.remove()
