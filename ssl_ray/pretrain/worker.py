"""What every pretraining worker does, step by step, and what it reports: sums over steps and ranks, and faults."""

import json
import math
import time
from collections.abc import Sequence
from typing import Any

import torch
from ray import train
from ray.train.torch import get_device
from torch import Tensor, distributed

from ssl_ray.pretrain.begin import Beginning
from ssl_ray.pretrain.job import Job
from ssl_ray.pretrain.learner import PretrainingLearner
from ssl_ray.pretrain.probe import Probe
from ssl_ray.pretrain.tasks.registry import task_cost
from ssl_ray.training.checkpoint import Saver
from ssl_ray.training.meters import PREFIX, RATE, WAIT, WORKER_MEMORY, arithmetic_rate, device_name, peak_memory
from ssl_ray.training.nonfinite import Fault, FiniteSum, Watch, keep
from ssl_ray.training.optimizer import learning_rate
from ssl_ray.training.parallel import whole_weights

_PREEMPTION_SECONDS = 5.0


def train_loop(job: Job, beginning: Beginning) -> None:
    """Train from the step where the worker begins to the end of the sample table."""
    context = train.get_context()
    rank, world = context.get_world_rank(), context.get_world_size()
    config, table, channels = job.recipe.settings, job.training.table, job.recipe.settings.preparation.channels
    torch.set_num_threads(max(1, int(config.cpus_per_worker)))
    learner = PretrainingLearner(job, get_device())
    watch = Watch(config.on_nonfinite, config.max_skipped)
    flops = task_cost(config.task, job.recipe.network, config.patch_size, channels).training
    reporter, preemption = _Reporter(job, rank), _Preemption()
    saver = Saver(job.checkpoints, job.mirror, config.keep_checkpoints, first=job.records)
    saved = time.monotonic()

    start = beginning.step
    if start:
        learner.load(beginning.state)
        watch.row = beginning.state["row_not_finite"]
        beginning.state.clear()  # as large as the network and its optimizer
    reporter.start(start, device_name(learner.device))
    probe = Probe(learner, job.labelled) if job.labelled else None
    found = {f"{name}_untrained": value for name, value in (probe.measure().items() if probe and not start else ())}
    totals = _Totals(world, flops, learner.device, learner.dtype)

    validations = {step: number for number, step in enumerate(table.boundaries(config.validate_every))}
    for batch in beginning.stream:
        lr = learning_rate(config.optimizer, batch.step, table.steps)
        loss, norm = learner.step(batch.images, batch.indices, lr)
        done, last = batch.step + 1, batch.step + 1 == table.steps
        validate = done in validations
        save = last or (config.checkpoint_every is not None and done % config.checkpoint_every == 0)
        due = save or validate or done % config.log_every == 0

        # All ranks see the same faults, as the gradient norm is that of all of them. The driver raises for a fatal one:
        # an error here would have Ray start again, into the same fault. A checkpoint has counted its own step, too.
        for fault in (watch.look(batch.step, loss, norm), watch.last() if due else None):
            if fault:
                reporter.fault(_keep_fault(learner, fault, rank, world), fault.fatal)
                if fault.fatal:
                    return
        totals.add(loss, len(batch.indices), batch.waited)
        if not due:
            continue
        record: dict[str, Any] = {"step": done, "epoch": table.epoch(done), "lr": lr, "grad_norm": float(norm)}
        overdue = time.monotonic() - saved >= 60 * config.checkpoint_minutes
        sums, (save_due, ask_due, probe_due) = totals.gather([overdue, preemption.due, probe is not None and probe.due])
        if probe and validate and (probe_due or last):
            found |= probe.measure()
        record |= sums | found
        found = {}
        if validate:
            record |= learner.validate(done, validations[done] % config.picture_every == 0 or last)
        reporter.record(record)
        leaving = ask_due and preemption.announced()
        if save or save_due or leaving:
            state = learner.state() | {"step": done, "key": job.key}
            if rank == 0:
                saver.save(state | {"row_not_finite": watch.row})
            saved = time.monotonic()
        if leaving or last:
            saver.wait()


def _keep_fault(learner: PretrainingLearner, fault: Fault, rank: int, world: int) -> str:
    """Keep a step that was not finite, on the ranks whose loss it was and on rank 0; the line about it, else "".

    A rank's patches, as stored, and their indices go to `faults/rank_<r>/step_<n>.safetensors`;
    rank 0's file has the weights before the step too (on a GPU possibly those after the next).
    """
    model, job = whole_weights(learner.network), learner.job
    if rank > 0 and math.isfinite(fault.loss):
        return ""
    feed, config = job.training, job.recipe.settings
    indices = feed.table.rank_samples(fault.step, rank, world)
    places = [feed.place(index) for index in indices]
    volumes = ", ".join(sorted({place["volume"] for place in places}))
    origin = f"samples {', '.join(str(place['sample']) for place in places)} of volumes {volumes}"
    images = feed.read([feed.table.sample(index) for index in indices])
    tensors = {"images": torch.from_numpy(images), "indices": torch.tensor(indices)}
    if rank == 0:
        tensors |= {f"model.{name}": value for name, value in model.items()}
    # On a GPU it may be the step before the one that was done last, with its own learning rate.
    lr = learning_rate(config.optimizer, fault.step, feed.table.steps)
    facts = {"lr": lr, "world": world, "rank": rank, "samples": places, "seed": job.recipe.seed}
    facts |= {"precision": str(learner.dtype)}
    kept = keep(fault, job.folder / "faults" / f"rank_{rank}", origin, tensors, facts)
    return f"step {fault.step + 1}, rank {rank}: {kept}"


class _Totals:
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
        metrics = {f"{PREFIX}workers": float(self._world), RATE: total / longest, WAIT: 100 * max(waited) / longest}
        metrics[WORKER_MEMORY] = max(memory) / 1e6
        metrics |= arithmetic_rate(self._flops * total / longest, self._world, self._device, self._dtype)
        if sum(finite):
            metrics["loss"] = sum(loss) / sum(finite)  # sums over sums, never means of means
        if sum(finite) < total:
            metrics["patches_not_finite"] = total - sum(finite)
        return metrics, [bool(flags[0]) for flags in asked]


class _Reporter:
    """Tells the driver; rank 0, whose records are those of all ranks, writes them to `job.records` first."""

    def __init__(self, job: Job, rank: int) -> None:
        self._put, self._rank, self._job = job.reports.actor.put_nowait.remote, rank, job  # the call returns at once

    def start(self, step: int, device: str) -> None:
        """Tell the step that training goes on from, and on what."""
        if self._rank == 0:
            self._job.folder.mkdir(parents=True, exist_ok=True)
            self._job.mirror.pull(self._job.records)  # rank 0 may have been on another machine
            with self._job.records.open("ab") as file:
                file.write(b"\n")  # ends a line that a killed worker may have left half written
            self._put(("started", (step, device)))

    def record(self, record: dict[str, Any]) -> None:
        """Keep and send what happened since the record before."""
        if self._rank == 0:
            with self._job.records.open("ab") as file:
                file.write(json.dumps(record).encode() + b"\n")
            self._put(("record", record))

    def fault(self, text: str, fatal: bool) -> None:
        """Send the line about a step that was not finite, from any rank that has one."""
        if text:
            self._put(("fatal" if fatal else "skipped", text))


class _Preemption:
    """Asks Ray, every `_PREEMPTION_SECONDS` at most, whether a node of this run is about to be taken away.

    The question is a barrier of all ranks.
    """

    def __init__(self) -> None:
        self._asked = time.monotonic()
        self._warned: set[str] = set()

    @property
    def due(self) -> bool:
        return time.monotonic() - self._asked >= _PREEMPTION_SECONDS

    def announced(self) -> bool:
        """Whether Ray names a node that it has not named before; all ranks must ask."""
        self._asked = time.monotonic()
        info = train.get_preemption_info()
        new = set(info.preempted_node_ids) - self._warned if info else set()
        self._warned |= new
        return bool(new)
