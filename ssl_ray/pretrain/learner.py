"""What a pretraining worker trains: a task's network, its optimizer, one step of them, and the fixed validation."""

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, distributed
from torch.distributed.fsdp import FSDPModule
from torch.nn.parallel import DistributedDataParallel

from ssl_ray.config.schema import Pretrain
from ssl_ray.data.normalise import metadata
from ssl_ray.networks.faster import mkl_is_narrow, use_fast_attention, use_onednn, use_patch_products
from ssl_ray.networks.weight_files import describe, export
from ssl_ray.pretrain.job import Job
from ssl_ray.pretrain.picture import draw_picture
from ssl_ray.pretrain.samples import Sample
from ssl_ray.pretrain.stream import Feed
from ssl_ray.pretrain.tasks.registry import build_task, start_from
from ssl_ray.training.gpu import StepGraph, Upload, record, to_device
from ssl_ray.training.optimizer import build_optimizer, first_gradient, take_step
from ssl_ray.training.parallel import load, parallel, whole_state, whole_weights
from ssl_ray.training.precision import autocast, named, resolve, settle


class PretrainingLearner:
    """A rank's task with its optimizer: takes steps and validates. Ranks are those of torch's process group, if any."""

    def __init__(self, job: Job, device: torch.device) -> None:
        several = distributed.is_initialized()
        self.rank, self.world = (distributed.get_rank(), distributed.get_world_size()) if several else (0, 1)
        self.job, self.config, self.device = job, self._settled(job, device), device
        torch.manual_seed(job.recipe.seed)
        sides, channels = self.config.patch_size, self.config.preparation.channels
        self.task = build_task(self.config.task, job.recipe.network, sides, channels)
        if job.recipe.weights:
            start_from(job.recipe.weights, self.task)
        self.network = self.task.to(device).network
        self.dtype = resolve(self.config.precision, device)
        if device.type == "cuda":
            use_fast_attention(self.network)
        use_onednn(self.network)
        if self.dtype != torch.float32 or (device.type == "cpu" and mkl_is_narrow()):
            use_patch_products(self.network)
        # Part by part: a ViT's blocks share one graph, and DDP can exchange the gradients of one block during the next.
        for part in self.task.parts if self.config.compile else ():
            part.compile(dynamic=False)
        self.model = parallel(self.task, self.task.blocks, device, self.config.shard)
        self.optimizer = build_optimizer(self.config.optimizer, self.network.parameters())
        self.best = math.inf
        # Under DDP and FSDP the hooks that exchange gradients would have to be recorded too, and batches may differ.
        alone = not isinstance(self.model, DistributedDataParallel | FSDPModule)
        self.graphs = device.type == "cuda" and alone
        self._graph: StepGraph | None = None
        self._go = torch.ones((), dtype=torch.bool, device=device)
        self._upload = Upload(device)

    def _settled(self, job: Job, device: torch.device) -> Pretrain:
        """The settings with the precision that the training was begun in, the same on all ranks."""
        settings, precision = job.recipe.settings, [""]
        if device.type == "cuda":
            torch.cuda.set_device(device)
        if self.rank == 0:
            here = named(resolve(settings.precision, device))
            precision = [settle(settings.precision, here, job.folder, job.mirror)]
        if self.world > 1:
            distributed.broadcast_object_list(precision)
        return settings.model_copy(update={"precision": precision[0]})

    def load(self, state: Mapping[str, Any]) -> None:
        """Go on from what `state` returned on rank 0. All ranks must call it; the others need no more than `best`."""
        load(self.network, self.optimizer, state)
        self._graph = None  # it writes to the tensors from before
        self.best = state["best"]

    def state(self) -> dict[str, Any]:
        """All that the rest of the run depends on beside the step; with `shard` all ranks must ask, rank 0 gets it."""
        return {"best": self.best, **whole_state(self.network, self.optimizer)}

    def step(self, images: npt.NDArray[Any], indices: npt.NDArray[np.int64], lr: float) -> tuple[Tensor, Tensor]:
        """One optimizer step on this rank's patches of the global batch, as stored.

        Returns the mean loss of the rank's patches and the global gradient norm, both on the device. Where either is
        not finite on any rank, the norm is not on all of them, and no rank has changed its weights.
        """
        tables = [self.task.draw(self.job.recipe.seed, indices, view) for view in range(self.task.views)]
        stored = self._upload(images)
        if self.graphs and self._graph is None:
            self._graph = record(self._step, self.optimizer, self._go, stored, tables)
            self.graphs = self._graph is not None
        if self._graph:
            return self._graph(stored, tables, lr)
        return self._step(stored, [to_device(table, self.device) for table in tables], lr)

    def _step(self, stored: Tensor, tables: Sequence[Tensor], lr: float | Tensor) -> tuple[Tensor, Tensor]:
        loss = torch.zeros((), device=self.device)
        largest, size = self._shares()
        starts = range(0, largest, size)
        for start in starts:
            # With `shard` a pass needs all ranks: one without patches left repeats its last one, with no weight.
            rows = slice(min(start, len(stored) - 1), start + size)
            part, counted = stored[rows], len(stored[start : start + size])
            # Ranks, whose shares of the batch may differ by one, are averaged.
            weight = counted * self.world / self.config.batch_size
            ddp = self.model if isinstance(self.model, DistributedDataParallel) else None
            with ddp.no_sync() if ddp and start != starts[-1] else nullcontext():
                clean = scale(part, self.job.training.levels)
                seen = self.task.see(clean, [table[rows] for table in tables])
                with autocast(self.device, self.dtype):
                    own, total = self.model(seen, clean)
                (total * weight).backward(first_gradient(total, self._go))
            loss += own.detach() * (counted / len(stored))
        return loss, take_step(self.optimizer, self.config.optimizer, lr)

    def _shares(self) -> tuple[int, int]:
        """Patches of the rank that has most of the global batch, and how many of them it computes at once."""
        largest = -(-self.config.batch_size // self.world)
        return largest, min(self.config.microbatch or largest, largest)

    @torch.no_grad()
    def validate(self, step: int, picture: bool) -> dict[str, float | str]:
        """The task's losses on the fixed validation patches, each with its fixed draw; every rank takes its share.

        Names are those of the task after `validation_`; `picture` is the path of one, if asked for.
        """
        feed = self.job.validation
        sums, losses = torch.zeros((), dtype=torch.float64, device=self.device), dict[str, Tensor]()
        shown = ""
        for indices, counted, clean in self.read(feed, list(feed.table.validation())):
            seen = self.task.see(clean, [to_device(self.task.draw(0, indices, 0), self.device)])
            # Other shapes than in training: compiling for them would cost more than it saves.
            with autocast(self.device, self.dtype), torch.compiler.set_stance("force_eager"):
                losses, rows = self.task.validate(seen, clean)
            sums = sums + torch.stack([*losses.values(), torch.ones_like(losses["loss"])]) * counted
            if picture and self.rank == 0 and not shown:
                shown = self._picture(step, rows)
        if self.world > 1:
            distributed.all_reduce(sums)
        means = (sums[:-1] / sums[-1]).tolist()
        report = {f"validation_{name}": mean for name, mean in zip(losses, means, strict=True)}
        if report["validation_loss"] < self.best:
            self.best = report["validation_loss"]
            self._export(step)
        return report | ({"picture": shown} if shown else {})

    def read(self, feed: Feed, samples: Sequence[Sample]) -> Iterator[tuple[npt.NDArray[np.int64], int, Tensor]]:
        """This rank's share of some samples, in parts: which they are, how many of them count, patches (B, C, X, Y, Z).

        Meanwhile the model is in evaluation mode. A rank without patches left takes sample 0, which does not count, as
        with `shard` the others wait for it.
        """
        mine, (_, size) = np.arange(self.rank, len(samples), self.world), self._shares()
        self.model.eval()
        for start in range(0, -(-len(samples) // self.world), size):
            counted = len(mine[start : start + size])
            indices = mine[start : start + size] if counted else np.zeros(1, np.int64)
            yield indices, counted, scale(self._upload(feed.read([samples[index] for index in indices])), feed.levels)
        if isinstance(self.model, FSDPModule):
            self.model.reshard()  # FSDP leaves what is in no block whole, for a backward pass that does not come
        self.model.train()

    def _export(self, step: int) -> None:
        """Write the weights, as the best on validation so far, for fine-tuning; all ranks must call it."""
        weights = whole_weights(self.network)
        if self.rank == 0:
            facts = {"step": str(step), "validation_loss": f"{self.best:.6f}", "key": self.job.key}
            described = describe(self.job.recipe.network, self.config.patch_size) | metadata(self.config.preparation)
            export(self.job.weights, weights, described | {"task": self.config.task.kind} | facts)
            for file in (self.job.weights.with_suffix(".pt"), self.job.weights):
                self.job.mirror.push(file)

    def _picture(self, step: int, rows: Mapping[str, Tensor]) -> str:
        truth, seen, made, *_ = rows.values()
        # The patch of the first batch with the most structure says most.
        chosen = int(truth.flatten(1).std(dim=1).argmax())
        path = self.job.folder / "pictures" / f"patch_{step:07d}.png"
        differences, hidden = (made[chosen] - truth[chosen]).abs(), seen[chosen].isnan()
        # What a masked network makes of the tokens that it saw is arbitrary: no loss is taken there.
        error = float((differences[hidden] if hidden.any() else differences).mean())
        shown = {name: patches[chosen].float().cpu().numpy() for name, patches in rows.items()}
        draw_picture(path, shown, f"step {step}, L1 {error:.4f}", self.config.preparation.spacing)
        self.job.mirror.push(path)
        return str(path)


def scale(stored: Tensor, levels: int) -> Tensor:
    """Patches as stored, (B, X, Y, Z) or (B, C, X, Y, Z) -> (B, C, X, Y, Z) float32, as the network sees them."""
    return stored.view(len(stored), -1, *stored.shape[-3:]).float().div_(levels)
