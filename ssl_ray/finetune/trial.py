"""One UNETR training, from initial weights to the evaluation of its selected checkpoint. Pure torch."""

import json
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from monai.losses import DiceCELoss
from safetensors.torch import save_file
from torch import Tensor

from ssl_ray.checkpoint import load_latest, save_latest
from ssl_ray.cohort.cache import Volume, open_array
from ssl_ray.cohort.volume import read_label
from ssl_ray.config import Study
from ssl_ray.finetune.metrics import DICE_FOREGROUND, CaseScores, aggregate, evaluate, evaluate_canonical, predict
from ssl_ray.finetune.patches import PatchSampler
from ssl_ray.networks import build_unetr, load_metadata, load_weights, transfer
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

    store: Path
    training: tuple[Volume, ...]
    validation: tuple[Volume, ...]
    test: tuple[Volume, ...]
    organs: tuple[str, ...]


def run_trial(
    study: Study, cell: Cell, data: TrialData, weights: Path | None, folder: Path, device: torch.device
) -> Iterator[tuple[int, dict[str, float]]]:
    """Train one cell and yield `(step, metrics)`; a trial that was cut off goes on from its own checkpoint.

    While training: `loss`, `lr`, `seconds_per_step`, `validation/<metric>`. At the end, for the checkpoint with the
    best foreground Dice on validation, `selected/validation/<metric>` and, where the cohort has a test split,
    `selected/test/<metric>`; the folder then holds `unetr.safetensors` and `evaluation.json`.

    Raises:
        ValueError: when the pretrained weights do not match the network.
    """
    trial = _Trial(study, cell, data, weights, folder, device)
    yield from trial.train()
    yield trial.config.steps, trial.evaluate()


class _Trial:
    def __init__(
        self, study: Study, cell: Cell, data: TrialData, weights: Path | None, folder: Path, device: torch.device
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

    def train(self) -> Iterator[tuple[int, dict[str, float]]]:
        config, start = self.config, self._restore()
        log_every = max(1, config.validate_every // 10)
        losses, since, logged = torch.zeros((), device=self.device), time.perf_counter(), start
        for step in range(start, config.steps):
            lr = learning_rate(self.optimizer_config, step, config.steps)
            losses += self._step(step, lr)
            done = step + 1
            validate = done % config.validate_every == 0 or done == config.steps
            if not (validate or done % log_every == 0):
                continue
            count = done - logged
            metrics = {"loss": float(losses) / count, "lr": lr}
            metrics["seconds_per_step"] = (time.perf_counter() - since) / count
            if validate:
                metrics |= self._validate(done)
                save_latest(self.folder / "checkpoint", self._state(done))
            losses, since, logged = torch.zeros((), device=self.device), time.perf_counter(), done
            yield done, metrics

    def evaluate(self) -> dict[str, float]:
        """Score the selected weights on validation and test, on both grids, and keep what was found."""
        self.model.load_state_dict(self.best_weights)
        scores = {name: [self._score(volume) for volume in getattr(self.data, name)] for name in ("validation", "test")}
        metrics = {"selected/step": float(self.best_step)}
        for name, cases in scores.items():
            metrics |= {f"selected/{name}/{key}": value for key, value in aggregate(cases, self.data.organs).items()}
        self.folder.mkdir(parents=True, exist_ok=True)
        tree = {"step": self.best_step, "organs": list(self.data.organs)}
        tree |= {name: [case.to_json() for case in cases] for name, cases in scores.items()}
        save_file(
            {name: value.contiguous() for name, value in self.best_weights.items()}, self.folder / "unetr.safetensors"
        )
        (self.folder / "evaluation.json").write_text(json.dumps(tree, indent=1))
        return metrics

    def _step(self, step: int, lr: float) -> Tensor:
        images, labels = (batch.to(self.device, non_blocking=True) for batch in self.sampler.batch(step))
        with autocast(self.device, self.dtype):
            logits = self.model(images)
        loss: Tensor = self.loss(logits.float(), labels)
        loss.backward()
        take_step(self.optimizer, self.optimizer_config, lr)
        return loss.detach()

    def _validate(self, step: int) -> dict[str, float]:
        cases = [
            evaluate_canonical(volume.id, self._predict(volume), self._truth(volume), self.classes)
            for volume in self.data.validation
        ]
        found = aggregate(cases, self.data.organs)
        if found.get(DICE_FOREGROUND, 0.0) > self.best:
            self.best, self.best_step = found.get(DICE_FOREGROUND, 0.0), step
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

    def _state(self, step: int) -> dict[str, Any]:
        return {
            "step": step,
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "best": self.best,
            "best_step": self.best_step,
            "best_weights": self.best_weights,
        }

    def _restore(self) -> int:
        state = load_latest(self.folder / "checkpoint")
        if state is None:
            return 0
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.best, self.best_step, self.best_weights = state["best"], state["best_step"], state["best_weights"]
        return int(state["step"])
