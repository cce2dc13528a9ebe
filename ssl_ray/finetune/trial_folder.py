"""What one trial keeps on disk: checkpoints, its best weights so far, steps that were not finite, its result.

checkpoint/<step>/             training states, the newest two
best/<step>/                   weights that did best on validation so far; a checkpoint names their step
faults/step_<n>.safetensors    what reproduces a step that was not finite, for the first three
unetr.safetensors              the result: the weights that did best on validation
evaluation.json                and their scores, volume by volume
"""

import json
import logging
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from safetensors.torch import save
from torch import Tensor

from ssl_ray.storage.files import write_file
from ssl_ray.storage.mirror import Mirror
from ssl_ray.training.checkpoint import load_latest, load_state, save_latest


class TrialFolder:
    """The folder of one trial, whose key is a digest of everything that the trial's result depends on."""

    def __init__(self, path: Path, key: str, mirror: Mirror | None = None) -> None:
        self.path, self.key, self.mirror = path, key, mirror or Mirror(path)
        self.checkpoints, self.best = path / "checkpoint", path / "best"
        self._best_saved: int | None = None

    def save(self, state: Mapping[str, Any], best: Mapping[str, Tensor]) -> None:
        """Write a checkpoint, and the best weights if they changed since the last one.

        Args:
            state: with `step` and `best_step`.
            best: weights of `best_step`.
        """
        if self._best_saved != state["best_step"]:
            # Three, one more than there are checkpoints: a fault after this line must not leave the older checkpoint
            # without its weights.
            save_latest(self.best, {"step": state["best_step"], "key": self.key, "weights": dict(best)}, 3, self.mirror)
            self._best_saved = state["best_step"]
        save_latest(self.checkpoints, {**state, "key": self.key}, mirror=self.mirror)

    def load(self) -> tuple[dict[str, Any], dict[str, Tensor]] | None:
        """The newest checkpoint of this key that is whole together with its best weights; None if there is none."""
        log, known = logging.getLogger(__name__), self.mirror.names(self.checkpoints)
        while (state := load_latest(self.checkpoints, self.key, self.mirror)) is not None:
            try:
                self.mirror.pull(self.best / f"{state['best_step']:08d}")
                best = load_state(self.best / f"{state['best_step']:08d}")
                if best.get("key") != self.key:
                    raise ValueError(f"{self.best}: weights of another configuration")
            except ValueError as error:
                log.warning("%s; trying the checkpoint before", error)
                self.mirror.drop(self.checkpoints / f"{state['step']:08d}")
                continue
            self._best_saved = state["best_step"]
            return state, best["weights"]
        if known:
            log.warning("%s: no checkpoint can be used; the trial starts from step 0", self.checkpoints)
        return None

    def keep_result(self, weights: Mapping[str, Tensor], evaluation: Mapping[str, Any]) -> None:
        """Write `unetr.safetensors`, then `evaluation.json`; each appears complete or not at all."""
        contiguous = {name: value.contiguous() for name, value in weights.items()}
        write_file(self.path / "unetr.safetensors", save(contiguous))
        write_file(self.path / "evaluation.json", json.dumps(evaluation, indent=1).encode())
        for name in ("unetr.safetensors", "evaluation.json"):
            self.mirror.push(self.path / name)

    def pull_evaluation(self) -> Path:
        """The scores that the trial wrote, made on whatever machine, as a file on this one."""
        self.mirror.pull(self.path / "evaluation.json")
        return self.path / "evaluation.json"

    def clear(self) -> None:
        """Delete what a finished trial no longer needs."""
        for folder in (self.checkpoints, self.best):
            with suppress(OSError):
                self.mirror.drop(folder)
