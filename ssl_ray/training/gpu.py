"""What keeps a GPU from waiting for its host: a step is launched as a whole, and patches are copied beside another."""

import logging
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

import numpy.typing as npt
import torch
from torch import Tensor

from ssl_ray.text import reason

Body = Callable[[Tensor, Sequence[Tensor], Tensor], tuple[Tensor, Tensor]]
"""Patches as they are uploaded, what else a step is given, the learning rate -> loss, gradient norm."""


class StepGraph:
    """A whole step as one CUDA graph, for batches of one shape; calling it is a step on other patches and draws.

    A step of ViT-B on 8 patches is 9 ms of kernels on an H100, and 8 to 60 ms of launches on its host. What the body
    changes it must change in place: weights and the optimizer's state. Those must stay the same tensors.
    """

    def __init__(
        self, body: Body, optimizer: torch.optim.Optimizer, go: Tensor, stored: Tensor, drawn: Sequence[Tensor]
    ) -> None:
        """Warm up and record; neither changes weights or the optimizer's state, as `go` is False on the device.

        `stored` patches and `drawn` tensors on the host have the shapes to come; the optimizer is fused.
        """
        self._optimizer = optimizer
        self._stored = stored.clone()
        self._drawn = [values.to(stored.device) for values in drawn]
        self._lr = torch.zeros((), device=stored.device)

        go.fill_(False)
        try:
            aside, current = torch.cuda.Stream(), torch.cuda.current_stream()
            aside.wait_stream(current)
            with torch.cuda.stream(aside):
                for _ in range(3):  # builds kernels and plans, which cannot be done while recording
                    body(self._stored, self._drawn, self._lr)
            current.wait_stream(aside)
            for group in optimizer.param_groups:
                group["capturable"] = True
            self._graph = torch.cuda.CUDAGraph()
            # Not "global": another thread of this process pins memory for the batches to come.
            with torch.cuda.graph(self._graph, capture_error_mode="thread_local"):
                self._loss, self._norm = body(self._stored, self._drawn, self._lr)
        finally:
            for group in optimizer.param_groups:
                group["capturable"] = False  # as in a checkpoint of any other step
            optimizer.zero_grad(set_to_none=True)
            go.fill_(True)

    def __call__(self, stored: Tensor, drawn: Sequence[Tensor], lr: float) -> tuple[Tensor, Tensor]:
        """One step; loss and norm are the caller's, the next step does not overwrite them."""
        assert stored.shape == self._stored.shape, "a graph is of batches of one shape"
        self._stored.copy_(stored)
        for there, values in zip(self._drawn, drawn, strict=True):
            there.copy_(values.pin_memory(), non_blocking=True)
        self._lr.fill_(lr)
        self._graph.replay()
        for group in self._optimizer.param_groups:
            group["lr"] = lr
        return self._loss.clone(), self._norm.clone()


def to_device(values: Tensor, device: torch.device) -> Tensor:
    """A small tensor on the device; on a GPU it is copied from pinned memory, for which the host does not wait."""
    return (values.pin_memory() if device.type == "cuda" else values).to(device, non_blocking=True)


def record(
    body: Body, optimizer: torch.optim.Optimizer, go: Tensor, stored: Tensor, drawn: Sequence[Tensor]
) -> StepGraph | None:
    """The step's `StepGraph`; None where it cannot be recorded, which one warning says, and steps go on without."""
    try:
        return StepGraph(body, optimizer, go, stored, drawn)
    except Exception as error:  # out of memory, or an operator that cannot be recorded
        logging.getLogger(__name__).warning("going on without a CUDA graph of the step: %s", reason(error))
        return None


class Upload:
    """Copies arrays to the device, on a GPU in a CUDA stream of its own.

    While the host is a step ahead of the device, a copy costs no time: provided that the memory is pinned, as the
    pretraining's stream gives it. From other memory a large copy waits for the steps before it.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._held: deque[tuple[Tensor, torch.cuda.Event]] = deque()

    def __call__(self, array: npt.NDArray[Any]) -> Tensor:
        """The array on the device, for the current stream. The caller may drop the array at once, not overwrite it."""
        host = torch.from_numpy(array)
        if self._stream is None:
            return host.to(self._device)
        with torch.cuda.stream(self._stream):
            there = host.to(self._device, non_blocking=True)
            copied = self._stream.record_event()
        while self._held and self._held[0][1].query():
            self._held.popleft()
        self._held.append((host, copied))  # pinned memory that is let go is given to the next batch
        current = torch.cuda.current_stream(self._device)
        current.wait_event(copied)
        there.record_stream(current)
        return there
