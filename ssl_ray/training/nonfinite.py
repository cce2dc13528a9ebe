"""Steps whose loss or gradient is not finite: found without making a GPU wait, counted, and kept to reproduce them."""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor

from ssl_ray.config.common import OnNonfinite
from ssl_ray.storage.files import write_file


@dataclass(frozen=True)
class Fault:
    """A step, counted from 0, that `take_step` skipped on the device; `fatal`: the policy allows no more in a row."""

    step: int
    loss: float
    norm: float
    row: int
    fatal: bool


class FiniteSum:
    """Sum over the losses that are finite. It stays on the device: reading one loss would wait for its step."""

    def __init__(self) -> None:
        self._sum: Tensor | float = 0.0
        self._count: Tensor | int = 0

    def add(self, loss: Tensor, count: int = 1) -> None:
        """Add a loss that is the mean over `count` patches."""
        finite = torch.isfinite(loss)
        self._sum = self._sum + torch.where(finite, loss, 0.0) * count
        self._count = self._count + finite * count

    def take(self) -> tuple[float, float]:
        """The sum and the number of patches in it, which both start again from zero."""
        taken = float(self._sum), float(self._count)
        self._sum, self._count = 0.0, 0
        return taken


class Watch:
    """Looks at every step's loss and gradient norm: on a CPU at once, on a GPU while the next step runs."""

    def __init__(self, policy: OnNonfinite, limit: int) -> None:
        """Stop at the first fault, or `skip` up to `limit` of them in a row."""
        self._limit = 0 if policy == "stop" else limit
        self.row = 0  # number of consecutive non-finite steps so far; checkpoints carry it
        self._pending: tuple[int, Tensor, Any] | None = None

    def look(self, step: int, loss: Tensor, norm: Tensor) -> Fault | None:
        """The fault of this step, or on a GPU that of the step before; None where that one was finite.

        The norm is that of all ranks' gradients; where the loss is not finite, it must not be either.
        """
        values = torch.stack([loss.detach(), norm.detach()])
        if not values.is_cuda:
            return self._judge(step, values)
        host = torch.empty_like(values, device="cpu", pin_memory=True).copy_(values, non_blocking=True)
        copied = torch.cuda.Event()
        copied.record()
        before = self.last()
        self._pending = step, host, copied
        return before

    def last(self) -> Fault | None:
        """The fault of the newest step, where `look` has not judged it yet."""
        if self._pending is None:
            return None
        (step, values, copied), self._pending = self._pending, None
        copied.synchronize()
        return self._judge(step, values)

    def _judge(self, step: int, values: Tensor) -> Fault | None:
        loss, norm = values.tolist()
        self.row = 0 if math.isfinite(norm) else self.row + 1
        return Fault(step, loss, norm, self.row, self.row > self._limit) if self.row else None


def keep(fault: Fault, folder: Path, origin: str, tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> str:
    """Write what reproduces a step to `<folder>/step_<n>.safetensors`, for the first three faults of a rank or trial.

    The file counts steps from 1. `origin` says in words which patches these are, and `tensors` are the patches, and the
    weights as `model.<name>`. `facts`, whatever else the step depends on, become JSON under `facts` in the file's
    metadata. Returns loss, gradient norm, origin and file in one line.
    """
    text = f"loss {fault.loss:g}, gradient norm {fault.norm:g}; {origin}"
    path = folder / f"step_{fault.step + 1:07d}.safetensors"
    if not path.is_file() and len(list(folder.glob("*.safetensors"))) >= 3:
        return text  # those that follow have the same cause
    content = {name: value.detach().cpu().contiguous() for name, value in tensors.items()}
    facts = {"step": fault.step + 1, "loss": str(fault.loss), "gradient_norm": str(fault.norm), **facts}
    write_file(path, save(content, {"facts": json.dumps(facts)}))
    return f"{text}; kept in {path}"
