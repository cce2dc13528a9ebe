"""What every pretraining worker does."""

import math
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from ray import train
from ray.train.collective import broadcast_from_rank_zero
from ray.train.torch import get_device, prepare_model
from ray.util.queue import Queue
from torch import Tensor, nn

from ssl_ray.checkpoint import load_state, save_state
from ssl_ray.config import Study
from ssl_ray.networks import build_autoencoder, describe, export
from ssl_ray.optimize import build_optimizer, learning_rate, take_step
from ssl_ray.precision import autocast, resolve
from ssl_ray.pretrain.corrupt import contrastive_loss, corrupt, draw
from ssl_ray.pretrain.picture import draw_restoration
from ssl_ray.pretrain.plan import Sample
from ssl_ray.pretrain.stream import Feed, Stream, Window, open_window, windows


@dataclass(frozen=True)
class Job:
    """What a worker is given.

    Every rank sends its log records to `reports`, a Ray queue that the driver empties: unlike `ray.train.report`, which
    is a barrier that the controller serves every two seconds, that costs a step nothing.
    """

    study: Study
    training: Feed
    validation: Feed
    folder: Path
    key: str
    reports: Queue

    @property
    def weights(self) -> Path:
        """The autoencoder that did best on validation so far, written by rank 0."""
        return self.folder / "best.safetensors"


def train_loop(job: Job) -> None:
    """Train from the step in the checkpoint that Ray Train hands over, or from 0, to the end of the plan."""
    import ray

    context = train.get_context()
    rank, world = context.get_world_rank(), context.get_world_size()
    config, plan = job.study.pretrain, job.training.plan
    torch.set_num_threads(max(1, int(config.cpus_per_worker)))
    trainer = Trainer(job, get_device())
    start = trainer.restore()
    if rank == 0:
        job.reports.actor.put_nowait.remote((rank, {"started_at": start}))
    if start == plan.steps and not job.weights.is_file():  # done, but its result was deleted
        trainer.best = math.inf
        trainer.validate(rank, world, start, picture=False)

    def opener(window: Window) -> Sequence[Any]:
        # A reference, not the iterators: what is broadcast must stay small however many ranks there are.
        shared = ray.put(open_window(feed, plan, window)) if rank == 0 else None
        iterators: Sequence[Any] = ray.get(broadcast_from_rank_zero([shared]))[0]
        return iterators

    feed = ray.put(job.training) if rank == 0 else None
    itemsize = np.dtype(job.training.dtype).itemsize
    stream = Stream(plan, rank, windows(plan, start, world, config.block_megabytes * 2**20, itemsize), opener)
    validations = plan.boundaries(config.validate_every)
    totals = Totals()
    for batch in stream:
        lr = learning_rate(config.optimizer, batch.step, plan.steps)
        loss, norm = trainer.step(batch.images, batch.indices, lr)
        done = batch.step + 1
        totals.add(loss, len(batch.indices), batch.waited)
        validate = done in validations
        save = validate or done % config.checkpoint_every == 0
        if not (save or done % config.log_every == 0):
            continue
        record: dict[str, float | str] = {"step": done, "world": world, "epoch": plan.epoch(done), "lr": lr}
        record |= totals.take() | {"grad_norm": float(norm)}
        if not math.isfinite(float(record["loss_sum"])):
            raise FloatingPointError(f"the loss is not finite at step {done} or shortly before (learning rate {lr:g})")
        if validate:
            number = validations.index(done)
            last = done == plan.steps
            record |= trainer.validate(rank, world, done, number % config.picture_every == 0 or last)
        job.reports.actor.put_nowait.remote((rank, record))
        if not save:
            continue
        with tempfile.TemporaryDirectory() as folder:
            if rank == 0:
                save_state(Path(folder), trainer.state(done))
            train.report({"step": done}, checkpoint=train.Checkpoint.from_directory(folder) if rank == 0 else None)


class Totals:
    """Sums over the steps since the last report; the driver adds them up over the ranks."""

    def __init__(self) -> None:
        self._loss: Tensor | float = 0.0
        self._patches, self._waited, self._start = 0, 0.0, time.perf_counter()

    def add(self, loss: Tensor, patches: int, waited: float) -> None:
        """Count one step. `loss` stays on the device: reading it would wait for the step."""
        self._loss = self._loss + loss.detach() * patches
        self._patches += patches
        self._waited += waited

    def take(self) -> dict[str, float]:
        """The sums so far; counting starts anew."""
        sums = {"loss_sum": float(self._loss), "patches": self._patches, "waited": self._waited}
        sums["seconds"] = time.perf_counter() - self._start
        self._loss, self._patches, self._waited, self._start = 0.0, 0, 0.0, time.perf_counter()
        return sums


class Trainer:
    """Model, optimizer and one step of them."""

    def __init__(self, job: Job, device: torch.device) -> None:
        self.job, self.config, self.device = job, job.study.pretrain, device
        torch.manual_seed(job.study.seed)
        self.network = build_autoencoder(job.study.network, self.config.patch_size)
        self.dtype = resolve(self.config.precision, device)
        self.model: nn.Module = prepare_model(
            self.network, move_to_device=device, parallel_strategy_kwargs={"gradient_as_bucket_view": True}
        )
        self.optimizer = build_optimizer(self.config.optimizer, self.network.parameters())
        self.best = math.inf

    def restore(self) -> int:
        """Load the checkpoint that Ray Train hands over.

        Returns:
            The step to go on from.
        """
        checkpoint = train.get_checkpoint()
        if checkpoint is None:
            return 0
        with checkpoint.as_directory() as folder:
            state = load_state(Path(folder))
        self.network.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.best = state["best"]
        return int(state["step"])

    def state(self, step: int) -> dict[str, Any]:
        """All that the rest of the run depends on; samples, corruption and learning rate follow from the step."""
        model = {name: value.detach().cpu() for name, value in self.network.state_dict().items()}
        return {
            "step": step,
            "key": self.job.key,
            "best": self.best,
            "model": model,
            "optimizer": self.optimizer.state_dict(),
        }

    def step(self, images: npt.NDArray[Any], indices: npt.NDArray[np.int64], lr: float) -> tuple[Tensor, Tensor]:
        """One optimizer step on (B, X, Y, Z) patches.

        Returns:
            The loss and the gradient norm, both on the device.
        """
        clean = self._scale(images, self.job.training.levels)
        seed, views = self.job.study.seed, 2 if self.config.contrastive.enabled else 1
        draws = [draw(self.config.corruption, self.config.patch_size, seed, indices, view) for view in range(views)]
        corrupted = torch.cat([corrupt(clean, drawn) for drawn in draws])  # (views * B, 1, X, Y, Z)
        with autocast(self.device, self.dtype):
            restored = self.model(corrupted)[0]
        restored = restored.float()
        loss = (restored[: len(clean)] - clean).abs().mean()
        total = loss
        if views == 2:
            first, second = restored.flatten(1).chunk(2)
            total = loss + contrastive_loss(first, second, self.config.contrastive.temperature) * loss
        total.backward()
        norm = take_step(self.optimizer, self.config.optimizer, lr)
        return loss, norm

    @torch.no_grad()
    def validate(self, rank: int, world: int, step: int, picture: bool) -> dict[str, float | str]:
        """L1 on the fixed validation patches, each corrupted in its fixed way; every rank takes its share of them.

        Returns:
            `validation_loss`, and `validation_identity_loss` of predicting the corrupted input itself.
        """
        self.model.eval()
        feed = self.job.validation
        samples: list[Sample] = list(feed.plan.validation())
        mine = np.arange(rank, len(samples), world)
        sums = torch.zeros(3, dtype=torch.float64, device=self.device)
        shown = ""
        size = self.config.batch_size // world  # as much as a training step of this rank
        for start in range(0, len(mine), size):
            indices = mine[start : start + size]
            clean = self._scale(feed.read([samples[index] for index in indices]), feed.levels)
            corrupted = corrupt(clean, draw(self.config.corruption, self.config.patch_size, 0, indices))
            with autocast(self.device, self.dtype):
                restored = self.network(corrupted)[0].float()
            sums[0] += (restored - clean).abs().mean(dtype=torch.float64) * len(indices)
            sums[1] += (corrupted - clean).abs().mean(dtype=torch.float64) * len(indices)
            sums[2] += len(indices)
            if picture and rank == 0 and start == 0:
                shown = self._picture(step, clean, corrupted, restored)
        if world > 1:
            torch.distributed.all_reduce(sums)
        self.model.train()
        loss, identity = float(sums[0] / sums[2]), float(sums[1] / sums[2])
        if loss < self.best:
            self.best = loss
            if rank == 0:
                facts = {"step": str(step), "validation_loss": f"{loss:.6f}", "key": self.job.key}
                described = describe(self.job.study.network, self.config.patch_size)
                export(self.job.weights, self.network.state_dict(), described | facts)
        report: dict[str, float | str] = {"validation_loss": loss, "validation_identity_loss": identity}
        return report | ({"picture": shown} if shown else {})

    def _picture(self, step: int, clean: Tensor, corrupted: Tensor, restored: Tensor) -> str:
        # The patch with the most structure of the first batch says most about restoration.
        chosen = int(clean.flatten(1).std(dim=1).argmax())
        truth, broken, mended = (stack[chosen, 0].float().cpu().numpy() for stack in (clean, corrupted, restored))
        path = self.job.folder / "pictures" / f"restored_{step:07d}.png"
        error = float((restored[chosen] - clean[chosen]).abs().mean())
        draw_restoration(path, truth, broken, mended, f"step {step}, L1 {error:.4f}")
        return str(path)

    def _scale(self, images: npt.NDArray[Any], levels: int) -> Tensor:
        """(B, X, Y, Z) as stored -> (B, 1, X, Y, Z) float32 in 0..1 on the device."""
        # torch has few operations on uint16; the values fit into int32.
        host = torch.from_numpy(images if images.dtype == np.uint8 else images.astype(np.int32))
        return host.to(self.device, non_blocking=True).unsqueeze(1).float().div_(levels)
