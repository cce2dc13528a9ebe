"""What every pretraining worker does, step by step."""

import math
import time
from typing import Any

import numpy as np
import torch
from ray import train
from ray.train.collective import broadcast_from_rank_zero
from ray.train.torch import get_device
from torch import Tensor

from ssl_ray.networks.flops import autoencoder_flops
from ssl_ray.pretrain.fault import keep
from ssl_ray.pretrain.job import Job
from ssl_ray.pretrain.learner import PretrainingLearner
from ssl_ray.pretrain.stream import Batch, Segment, Stream, open_segment, segments
from ssl_ray.training.checkpoint import Saver, load_latest, load_state
from ssl_ray.training.meters import WORKER_MEMORY, arithmetic_rate, peak_memory
from ssl_ray.training.nonfinite import Fault, FiniteSum, Watch
from ssl_ray.training.optimizer import learning_rate
from ssl_ray.training.parallel import gathered

_PREEMPTION_SECONDS = 5.0
"""How often Ray is asked whether a node is about to be taken away: the question is a barrier of all ranks."""


def train_loop(job: Job) -> None:
    """Train from the newest whole checkpoint, or from step 0, to the end of the table."""
    import ray

    context = train.get_context()
    rank, world = context.get_world_rank(), context.get_world_size()
    config, table = job.recipe.settings, job.training.table
    torch.set_num_threads(max(1, int(config.cpus_per_worker)))
    learner = PretrainingLearner(job, get_device())
    book = _Book(job, rank, world, learner)
    start = book.restore()
    if start == table.steps and not job.mirror.has(job.weights):  # done, but its result was deleted
        learner.best = math.inf
        learner.validate(rank, world, start, picture=False)

    # One copy for all, and a reference, as what is broadcast must stay small.
    feed = broadcast_from_rank_zero([ray.put(job.training) if rank == 0 else None])[0]

    def opener(segment: Segment) -> Any:
        return open_segment(feed, segment, rank, world * config.cpus_per_worker)

    itemsize = np.dtype(job.training.dtype).itemsize
    stream = Stream(table, rank, segments(table, start, world, config.block_megabytes * 2**20, itemsize), opener)
    validations = {step: number for number, step in enumerate(table.boundaries(config.validate_every))}
    for batch in stream:
        lr = learning_rate(config.optimizer, batch.step, table.steps)
        loss, norm = learner.step(batch.images, batch.indices, world, lr)
        done, last = batch.step + 1, batch.step + 1 == table.steps
        for fault in (book.watch.look(batch, loss, norm), book.watch.last() if last else None):
            if fault and book.note(fault, fatal=book.watch.fatal(fault), lr=lr):
                return  # on every rank; the driver raises, and Ray does not start the same fault again
        book.totals.add(loss, len(batch.indices), batch.waited)
        validate = done in validations
        save = last or (config.checkpoint_every is not None and done % config.checkpoint_every == 0)
        if not (save or validate or done % config.log_every == 0):
            continue
        record: dict[str, float | str] = {"step": done, "epoch": table.epoch(done), "lr": lr, "grad_norm": float(norm)}
        sums, due = book.gather()
        record |= sums
        if validate:
            record |= learner.validate(rank, world, done, validations[done] % config.picture_every == 0 or last)
        book.log(record)
        leaving = due["preemption"] and book.preempted()
        if save or due["checkpoint"] or leaving:
            book.save(done)
        if leaving or last:
            book.wait()


class Totals:
    """Sums over a rank's steps since the last record."""

    def __init__(self) -> None:
        self._losses = FiniteSum()
        self._patches, self._waited, self._start = 0, 0.0, time.perf_counter()

    def add(self, loss: Tensor, patches: int, waited: float) -> None:
        """Count one step."""
        self._losses.add(loss, patches)
        self._patches += patches
        self._waited += waited

    def take(self) -> list[float]:
        """Sum of the losses that are finite, the patches that they are of, all patches, seconds waited, seconds."""
        sums = [*self._losses.take(), float(self._patches), self._waited]
        seconds = time.perf_counter() - self._start
        self._patches, self._waited, self._start = 0, 0.0, time.perf_counter()
        return [*sums, seconds]


class _Book:
    """What a rank writes down: sums since the last record, records on their way to the driver, checkpoints.

    Records are kept until the checkpoint after the next one and travel in it, so that the driver gets those again which
    it may not have seen when it was killed.
    """

    def __init__(self, job: Job, rank: int, world: int, learner: PretrainingLearner) -> None:
        self._job, self._rank, self._world, self._learner = job, rank, world, learner
        self._saver = Saver(job.checkpoints, job.recipe.settings.keep_checkpoints, job.mirror)
        self._older: list[dict[str, Any]] = []
        self._newer: list[dict[str, Any]] = []
        self._warned: set[str] = set()
        self._saved = self._asked = time.monotonic()
        self.totals = Totals()
        views = 2 if job.recipe.settings.contrastive.enabled else 1
        self._flops = views * autoencoder_flops(job.recipe.network, job.recipe.settings.patch_size).training
        self.watch: Watch[Batch] = Watch(job.recipe.settings.on_nonfinite, job.recipe.settings.max_skipped)

    def restore(self) -> int:
        """Load the newest checkpoint that is whole, the same on every rank; returns the step to go on from."""
        mirror = self._job.mirror
        state = load_latest(self._job.checkpoints, self._job.key, mirror) if self._rank == 0 else None
        step = int(broadcast_from_rank_zero(state["step"] if state else 0))
        if step and state is None:
            mirror.pull(self._job.checkpoints / f"{step:08d}")
            state = load_state(self._job.checkpoints / f"{step:08d}")
        if state:
            self._learner.load(state)
            self._older, self.watch.row = state["records"], state["row_not_finite"]
            self._send("records", self._older)
        self._send("started", step)
        return step

    def gather(self) -> tuple[dict[str, float], dict[str, bool]]:
        """The sums since the last call over all ranks, and what rank 0's clock says is due."""
        now, config = time.monotonic(), self._job.recipe.settings
        due = [now - self._saved >= 60 * config.checkpoint_minutes, now - self._asked >= _PREEMPTION_SECONDS]
        device = self._learner.device
        sums = [*self.totals.take(), peak_memory(device), *due]
        mine = torch.tensor(sums, dtype=torch.float64, device=device)
        ranks = [torch.empty_like(mine) for _ in range(self._world)] if self._world > 1 else [mine]
        if self._world > 1:
            torch.distributed.all_gather(ranks, mine)
        loss, finite, patches, waited, seconds, memory, *_ = torch.stack(ranks, dim=1).tolist()
        total, longest = sum(patches), max(seconds)
        metrics = {"workers": float(self._world), "patches_per_second": total / longest}
        metrics["data_wait_share"] = max(waited) / longest
        metrics[WORKER_MEMORY] = max(memory) / 1e6
        metrics |= arithmetic_rate(self._flops * total / longest, self._world, device, self._learner.dtype)
        if sum(finite):
            metrics["loss"] = sum(loss) / sum(finite)  # sums over sums, never means of means
        if sum(finite) < total:
            metrics["patches_not_finite"] = total - sum(finite)
        return metrics, {"checkpoint": bool(ranks[0][-2]), "preemption": bool(ranks[0][-1])}

    def log(self, record: dict[str, Any]) -> None:
        """Hand a record to the driver; rank 0's is that of all ranks."""
        self._newer.append(record)
        self._send("record", record)

    def note(self, fault: Fault[Batch], fatal: bool, lr: float) -> bool:
        """Tell the driver of a step that was not finite: the ranks whose loss it was, and rank 0 of any other."""
        mine = self._rank == 0 or not math.isfinite(fault.loss)
        model = gathered(self._learner.network.state_dict(), here=mine)
        if mine:
            facts: dict[str, Any] = {"lr": lr, "seed": self._job.recipe.seed, "world": self._world}
            facts |= {"precision": str(self._learner.dtype)}
            text = keep(fault, self._job.training, self._rank, self._job.folder / "faults", model, facts)
            self._job.reports.actor.put_nowait.remote(("fatal" if fatal else "skipped", text))
        return fatal

    def preempted(self) -> bool:
        """Whether Ray says, for the first time, that a node of this run is about to be taken away."""
        self._asked = time.monotonic()
        info = train.get_preemption_info()
        new = set(info.preempted_node_ids) - self._warned if info else set()
        self._warned |= new
        return bool(new)

    def save(self, step: int) -> None:
        """Begin to write a checkpoint, on rank 0."""
        state = self._learner.state()
        if self._rank == 0:
            records = self._older + self._newer
            own = {"step": step, "key": self._job.key, "records": records, "row_not_finite": self.watch.row}
            self._saver.save(state | own)
            self._send("records", records)
        self._older, self._newer, self._saved = self._newer, [], time.monotonic()

    def wait(self) -> None:
        """Until the last checkpoint is written."""
        self._saver.wait()

    def _send(self, kind: str, content: Any) -> None:
        if self._rank == 0:
            self._job.reports.actor.put_nowait.remote((kind, content))
