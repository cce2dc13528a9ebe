"""The worker's end of what a run reports: sums over steps and ranks, and records on their way to the driver."""

import time
from collections.abc import Sequence
from typing import Any

import torch
from ray.util.queue import Queue
from torch import Tensor, distributed

from ssl_ray.training.meters import WORKER_MEMORY, arithmetic_rate, peak_memory
from ssl_ray.training.nonfinite import FiniteSum


class Totals:
    """Sums over the steps since the last record; `patch_flops` is the training on one patch, all its views included."""

    def __init__(self, world: int, patch_flops: float, device: torch.device, dtype: torch.dtype) -> None:
        self._world, self._flops, self._device, self._dtype = world, patch_flops, device, dtype
        self._losses = FiniteSum()
        self._patches, self._waited, self._start = 0, 0.0, time.perf_counter()

    def add(self, loss: Tensor, patches: int, waited: float) -> None:
        """Count one step of this rank: its mean loss, the patches that it is of, the seconds waited for them."""
        self._losses.add(loss, patches)
        self._patches += patches
        self._waited += waited

    def gather(self, due: Sequence[bool]) -> tuple[dict[str, float], list[bool]]:
        """Metrics of all ranks since the last call, and what rank 0 says is due; all ranks must call it."""
        sums = [*self._losses.take(), float(self._patches), self._waited]
        sums += [time.perf_counter() - self._start, peak_memory(self._device), *due]
        self._patches, self._waited, self._start = 0, 0.0, time.perf_counter()
        mine = torch.tensor(sums, dtype=torch.float64, device=self._device)
        ranks = [torch.empty_like(mine) for _ in range(self._world)] if self._world > 1 else [mine]
        if self._world > 1:
            distributed.all_gather(ranks, mine)
        loss, finite, patches, waited, seconds, memory, *asked = torch.stack(ranks, dim=1).tolist()
        total, longest = sum(patches), max(seconds)
        metrics = {"workers": float(self._world), "patches_per_second": total / longest}
        metrics["data_wait_share"] = max(waited) / longest
        metrics[WORKER_MEMORY] = max(memory) / 1e6
        metrics |= arithmetic_rate(self._flops * total / longest, self._world, self._device, self._dtype)
        if sum(finite):
            metrics["loss"] = sum(loss) / sum(finite)  # sums over sums, never means of means
        if sum(finite) < total:
            metrics["patches_not_finite"] = total - sum(finite)
        return metrics, [bool(flags[0]) for flags in asked]


class Reporter:
    """Puts into the driver's queue; records only on rank 0, whose are those of all ranks.

    Records are kept until the checkpoint after the next one and travel in it: when the driver is killed, it gets those
    again that it may not have seen.
    """

    def __init__(self, reports: Queue, rank: int) -> None:
        self._put = reports.actor.put_nowait.remote  # returns at once
        self._rank = rank
        self._older: list[dict[str, Any]] = []
        self._newer: list[dict[str, Any]] = []

    def start(self, step: int, records: list[dict[str, Any]]) -> None:
        """Tell the step that training goes on from, after the records that its checkpoint carried."""
        self._older = records
        if self._rank == 0:
            self._put(("records", records))
            self._put(("started", step))

    def record(self, record: dict[str, Any]) -> None:
        """Send what happened since the record before."""
        self._newer.append(record)
        if self._rank == 0:
            self._put(("records", [record]))

    def fault(self, text: str, fatal: bool) -> None:
        """Send the line about a step that was not finite, from any rank that has one."""
        if text:
            self._put(("fatal" if fatal else "skipped", text))

    def carry(self) -> list[dict[str, Any]]:
        """Records for a checkpoint that is written now; the driver gets them again, too."""
        records = self._older + self._newer
        if self._rank == 0:
            self._put(("records", records))
        self._older, self._newer = self._newer, []
        return records
