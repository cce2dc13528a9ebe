"""One UNETR training, from initial weights to the evaluation of its selected checkpoint. Pure torch."""

import logging
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from monai.losses import DiceCELoss
from torch import Tensor

from ssl_ray.cohort.store import Store, Volume, open_array
from ssl_ray.cohort.volume import read_label
from ssl_ray.config import Study
from ssl_ray.finetune.folder import TrialFolder
from ssl_ray.finetune.metrics import DICE_FOREGROUND, CaseScores, aggregate, evaluate, evaluate_canonical, predict
from ssl_ray.finetune.patches import PatchSampler
from ssl_ray.networks import build_unetr, load_metadata, load_weights, transfer
from ssl_ray.nonfinite import Fault, FiniteSum, Watch
from ssl_ray.optimize import build_optimizer, learning_rate, take_step
from ssl_ray.precision import autocast, resolve


@dataclass(frozen=True)
class Cell:
    """One cell of the grid."""

    split: int
    init: Literal["random", "pretrained"]
    lr: float
    seed: int

    @property
    def name(self) -> str:
        """For run names and folders, e.g. `n06-pretrained-lr0.0001-seed0`."""
        return f"n{self.split:02d}-{self.init}-lr{self.lr:g}-seed{self.seed}"


@dataclass(frozen=True)
class TrialData:
    """Prepared volumes of a trial, shared read-only by all of them."""

    store: Store | Path
    training: tuple[Volume, ...]
    validation: tuple[Volume, ...]
    test: tuple[Volume, ...]
    organs: tuple[str, ...]


Record = tuple[int, dict[str, float]]
"""A step and metrics of it."""


def run_trial(
    study: Study,
    cell: Cell,
    data: TrialData,
    weights: Path | None,
    folder: Path,
    device: torch.device,
    key: str,
) -> Iterator[Record]:
    """Train one cell and yield `(step, metrics)`; a trial that was cut off goes on from its own checkpoint.

    First comes `started_at`, the step that it goes on from, with the records that whoever was cut off with it may not
    have seen; they were yielded before. While training: `loss`, `lr`, `seconds_per_step`, `validation/<metric>`, and
    `skipped_steps` where the loss or gradient of some was not finite. At the end, for the checkpoint with the best
    foreground Dice on validation, `selected/validation/<metric>` and, where the cohort has a test split,
    `selected/test/<metric>`; the folder then holds `unetr.safetensors` and `evaluation.json`.

    Args:
        study: the experiment.
        cell: which part of the grid.
        data: prepared volumes.
        weights: pretrained weights to start from; None for random ones.
        folder: everything that the trial writes.
        device: to train on.
        key: digest of everything that the result depends on; a checkpoint of another key is not used.

    Raises:
        ValueError: when the pretrained weights do not match the network.
        FloatingPointError: when more steps in a row are not finite than `on_nonfinite` and `max_skipped` allow.
    """
    trial = _Trial(study, cell, data, weights, TrialFolder(folder, key, study.mirror), device)
    yield from trial.train()
    yield trial.config.steps, trial.evaluate()


class _Trial:
    def __init__(
        self,
        study: Study,
        cell: Cell,
        data: TrialData,
        weights: Path | None,
        folder: TrialFolder,
        device: torch.device,
    ) -> None:
        self.config, self.data, self.folder, self.device = study.finetune, data, folder, device
        self.optimizer_config = self.config.optimizer.model_copy(update={"lr": cell.lr})
        self.classes = self.config.cohort.classes
        torch.manual_seed(cell.seed)  # the decoder's initial weights are the same for both kinds of initialisation
        self.model = build_unetr(study.network, self.config.patch_size, self.classes)
        if weights:
            transfer(load_weights(weights), self.model, str(weights), load_metadata(weights))
        # Most of a step is the convolutional decoder, which is 1.1 to 1.25 times as fast in this layout.
        self.model.to(device, memory_format=torch.channels_last_3d)
        self.dtype = resolve(self.config.precision, device)
        self.optimizer = build_optimizer(self.optimizer_config, self.model.parameters())
        loss = self.config.loss
        self.loss = DiceCELoss(
            to_onehot_y=True, softmax=True, include_background=loss.include_background, batch=loss.batch
        )
        self.sampler = PatchSampler(data.training, data.store, self.config, cell.seed)
        self.best, self.best_step = -1.0, 0
        self.best_weights: dict[str, Tensor] = {}
        self.watch = Watch[int](self.config.on_nonfinite, self.config.max_skipped)
        self.records: tuple[list[Record], list[Record]] = [], []  # before and since the newest checkpoint
        self.saved = time.monotonic()

    def train(self) -> Iterator[Record]:
        config, start = self.config, self._restore()
        yield start, {"started_at": float(start)}
        yield from self.records[0]
        log_every = max(1, config.validate_every // 10)
        totals, logged = _Totals(), start
        for step in range(start, config.steps):
            lr = learning_rate(self.optimizer_config, step, config.steps)
            loss, norm = self._step(step, lr)
            totals.add(loss)
            self._note(self.watch.look(step, loss, norm), totals)
            done = step + 1
            validate = done % config.validate_every == 0 or done == config.steps
            if not (validate or done % log_every == 0):
                continue
            self._note(self.watch.last(), totals)
            record = done, totals.take(done - logged) | {"lr": lr}
            if validate:
                record[1].update(self._validate(done))
            self.records[1].append(record)
            # The last one so that a fault in the evaluation does not cost minutes.
            if validate and (done == config.steps or time.monotonic() - self.saved >= 60 * config.checkpoint_minutes):
                self._save(done)
            totals.start()
            logged = done
            yield record

    def evaluate(self) -> dict[str, float]:
        """Score the selected weights on validation and test, on both grids, and keep what was found."""
        self.model.load_state_dict(self.best_weights)
        scores = {name: [self._score(volume) for volume in getattr(self.data, name)] for name in ("validation", "test")}
        metrics = {"selected/step": float(self.best_step)}
        for name, cases in scores.items():
            metrics |= {f"selected/{name}/{key}": value for key, value in aggregate(cases, self.data.organs).items()}
        tree = {"step": self.best_step, "organs": list(self.data.organs)}
        tree |= {name: [case.to_json() for case in cases] for name, cases in scores.items()}
        self.folder.keep_result(self.best_weights, tree)
        return metrics

    def _step(self, step: int, lr: float) -> tuple[Tensor, Tensor]:
        images, labels = (batch.to(self.device, non_blocking=True) for batch in self.sampler.batch(step))
        with autocast(self.device, self.dtype):
            logits = self.model(images)
        loss: Tensor = self.loss(logits.float(), labels)
        # A loss that is not finite need not have such gradients; this way it has, and the step is skipped.
        loss.backward(torch.where(torch.isfinite(loss), 1.0, torch.nan))
        return loss.detach(), take_step(self.optimizer, self.optimizer_config, lr)

    def _note(self, fault: Fault[int] | None, totals: "_Totals") -> None:
        """Keep what reproduces a step that was not finite; the optimizer has not changed the weights in it."""
        if fault is None:
            return
        totals.skipped += 1
        step, sampler = fault.what, self.sampler
        patches = [{"patch": index, "volume": volume.id, "key": volume.key} for index, volume in sampler.patches(step)]
        volumes = ", ".join(dict.fromkeys(str(patch["volume"]) for patch in patches))
        text = (
            f"step {step + 1}: loss {fault.loss:g}, gradient norm {fault.norm:g}; patches {patches[0]['patch']} to "
            f"{patches[-1]['patch']} of seed {sampler.seed}, volumes {volumes}"
        )
        facts = {"step": step + 1, "loss": str(fault.loss), "gradient_norm": str(fault.norm), "seed": sampler.seed}
        facts |= {"lr": learning_rate(self.optimizer_config, step, self.config.steps), "precision": str(self.dtype)}
        # On a GPU the next step has begun: if that was finite, these are the weights after it.
        images, labels = sampler.batch(step)
        tensors = {f"model.{name}": value for name, value in self.model.state_dict().items()}
        tensors |= {"images": images, "labels": labels}
        kept = self.folder.keep_fault(step + 1, tensors, facts | {"patches": patches})
        text += f"; kept in {kept}" if kept else ""
        if self.watch.fatal(fault):
            raise FloatingPointError(f"{fault.row} step(s) in a row were not finite, the last one was {text}")
        logging.getLogger(__name__).warning("skipped %s", text)

    def _validate(self, step: int) -> dict[str, float]:
        cases = [
            evaluate_canonical(volume.id, self._predict(volume), self._truth(volume), self.classes)
            for volume in self.data.validation
        ]
        found = aggregate(cases, self.data.organs)
        if (score := found.get(DICE_FOREGROUND, 0.0)) > self.best:
            self.best, self.best_step = score, step
            self.best_weights = {name: value.detach().cpu().clone() for name, value in self.model.state_dict().items()}
        return {f"validation/{name}": value for name, value in found.items()}

    def _predict(self, volume: Volume) -> Tensor:
        stored = np.asarray(open_array(self.data.store, volume.key, "image"), dtype=np.float32)
        image = torch.from_numpy(stored).div_(volume.levels).to(self.device)
        return predict(
            self.model,
            image,
            self.config.patch_size,
            self.classes,
            window_batch=self.config.window_batch,
            overlap=self.config.window_overlap,
            autocast=None if self.dtype == torch.float32 else self.dtype,
        )

    def _truth(self, volume: Volume) -> Tensor:
        return torch.from_numpy(np.array(open_array(self.data.store, volume.key, "label"))).to(self.device)

    def _score(self, volume: Volume) -> CaseScores:
        assert volume.label_source is not None
        original = read_label(Path(volume.label_source))
        return evaluate(
            volume.id,
            self._predict(volume),
            self._truth(volume),
            np.array(volume.affine),
            original.voxels.astype(np.uint8),
            original.affine,
            classes=self.classes,
            tolerance=self.config.surface_tolerance,
        )

    def _save(self, step: int) -> None:
        older, newer = self.records
        state = {
            "step": step,
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "best": self.best,
            "best_step": self.best_step,
            "row": self.watch.row,
            "records": older + newer,
        }
        self.folder.save(state, self.best_weights)
        self.records, self.saved = (newer, []), time.monotonic()

    def _restore(self) -> int:
        found = self.folder.load()
        if found is None:
            return 0
        state, self.best_weights = found
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.best, self.best_step, self.watch.row = state["best"], state["best_step"], state["row"]
        self.records = [(step, metrics) for step, metrics in state["records"]], []
        return int(state["step"])


class _Totals:
    """Sums over the steps since the last record."""

    def __init__(self) -> None:
        self._losses = FiniteSum()
        self.start()

    def start(self) -> None:
        self.skipped, self._since = 0, time.perf_counter()

    def add(self, loss: Tensor) -> None:
        """Count one step."""
        self._losses.add(loss)

    def take(self, steps: int) -> dict[str, float]:
        """Mean of the losses that are finite, and the time a step."""
        loss, finite = self._losses.take()
        metrics = {"loss": loss / finite} if finite else {}
        metrics["seconds_per_step"] = (time.perf_counter() - self._since) / steps
        return metrics | ({"skipped_steps": float(self.skipped)} if self.skipped else {})
