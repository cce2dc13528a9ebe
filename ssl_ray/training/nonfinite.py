"""Finds training steps whose loss or gradient is not finite, without making a GPU wait, and keeps them."""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

import torch
from safetensors.torch import save
from torch import Tensor

from ssl_ray.config.common import OnNonfinite
from ssl_ray.storage.files import appearing

_KEPT = 3
"""Faults of one kind that are kept on disk; those that follow have the same cause."""

T = TypeVar("T")


@dataclass(frozen=True)
class Fault(Generic[T]):
    """One step that `take_step` skipped on the device; `what` names it, `row` is how many such steps it ends."""

    what: T
    loss: float
    norm: float
    row: int


class FiniteSum:
    """Sum of the losses that are finite, and what they are the losses of; both stay on the device until they are taken.

    Reading one at a step would wait for that step.
    """

    def __init__(self) -> None:
        self._sum: Tensor | float = 0.0
        self._count: Tensor | int = 0

    def add(self, loss: Tensor, count: int = 1) -> None:
        """Count a loss, a mean over `count`."""
        finite = torch.isfinite(loss)
        self._sum = self._sum + torch.where(finite, loss, 0.0) * count
        self._count = self._count + finite * count

    def take(self) -> tuple[float, float]:
        """Sum and count, and begin anew."""
        taken = float(self._sum), float(self._count)
        self._sum, self._count = 0.0, 0
        return taken


class Watch(Generic[T]):
    """Looks at every step's loss and gradient norm: on the CPU at once, on a GPU while the next step runs."""

    def __init__(self, policy: OnNonfinite, limit: int) -> None:
        """Args:
        policy: `skip`, or `stop` at the first.
        limit: how many in a row may be skipped.
        """
        self._limit = 0 if policy == "stop" else limit
        self.row = 0
        """Faults in a row so far; belongs into a checkpoint."""
        self._pending: tuple[T, Tensor, Any] | None = None

    def look(self, what: T, loss: Tensor, norm: Tensor) -> Fault[T] | None:
        """The fault of this step, or on a GPU of the one before.

        Args:
            what: handed back in the fault.
            loss: of the step; where it is not finite, the norm must not be either.
            norm: of the gradients of all ranks.
        """
        values = torch.stack([loss.detach(), norm.detach()])
        if not values.is_cuda:
            return self._judge(what, values)
        host = torch.empty_like(values, device="cpu", pin_memory=True).copy_(values, non_blocking=True)
        copied = torch.cuda.Event()
        copied.record()
        before, self._pending = self._pending, (what, host, copied)
        return self._settle(before)

    def last(self) -> Fault[T] | None:
        """The fault of the last step, where that has not been looked at yet."""
        before, self._pending = self._pending, None
        return self._settle(before)

    def fatal(self, fault: Fault[T]) -> bool:
        """Whether the policy ends the training here."""
        return fault.row > self._limit

    def _settle(self, pending: tuple[T, Tensor, Any] | None) -> Fault[T] | None:
        if pending is None:
            return None
        what, values, copied = pending
        copied.synchronize()
        return self._judge(what, values)

    def _judge(self, what: T, values: Tensor) -> Fault[T] | None:
        loss, norm = values.tolist()
        self.row = 0 if math.isfinite(norm) else self.row + 1
        return Fault(what, loss, norm, self.row) if self.row else None


def keep(path: Path, others: str, tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> bool:
    """Write what reproduces a step, as safetensors and JSON.

    Args:
        path: ends with `.safetensors`.
        others: pattern of the JSON files beside it of which three are enough.
        tensors: patches and weights.
        facts: where they come from.

    Returns:
        Whether it is there; False for all but the first three.
    """
    if not path.is_file() and len(list(path.parent.glob(others))) >= _KEPT:
        return False
    path.parent.mkdir(parents=True, exist_ok=True)
    contents = {
        path: save({name: value.detach().cpu().contiguous() for name, value in tensors.items()}),
        path.with_suffix(".json"): json.dumps(facts, indent=1).encode(),
    }
    for target, content in contents.items():
        with appearing(target) as part:
            part.write_bytes(content)
    return True
