"""Host -> device, beside the step that the device is busy with."""

from collections import deque
from typing import Any

import numpy.typing as npt
import torch
from torch import Tensor


class Upload:
    """Copies arrays to the device on a CUDA stream of its own.

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
