"""What one trial keeps on disk.

checkpoints/<step>/            training states, the newest two, each with the weights that did best until then
faults/step_<n>.safetensors    what reproduces a step that was not finite, and .json beside it
unetr.safetensors              the result: the weights that did best on validation
evaluation.json                and their scores, volume by volume
"""

import json
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import save
from torch import Tensor

from ssl_ray.storage.files import write_file
from ssl_ray.storage.mirror import Mirror
from ssl_ray.training import nonfinite


@dataclass(frozen=True)
class TrialFolder:
    """The folder of one trial, whose key is a digest of everything that the trial's result depends on."""

    path: Path
    key: str
    mirror: Mirror

    @property
    def checkpoints(self) -> Path:
        """Folder of the training states, by step."""
        return self.path / "checkpoints"

    def keep_fault(self, step: int, tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> Path | None:
        """Write what reproduces a step: `faults/step_<n>.safetensors` and `.json`; None for all but the first three."""
        path = self.path / "faults" / f"step_{step:07d}.safetensors"
        return path if nonfinite.keep(path, "step_*.json", tensors, facts) else None

    def keep_result(self, weights: Mapping[str, Tensor], evaluation: Mapping[str, Any]) -> None:
        """Write `unetr.safetensors`, then `evaluation.json`; each appears complete or not at all."""
        contiguous = {name: value.contiguous() for name, value in weights.items()}
        for name, content in (
            ("unetr.safetensors", save(contiguous)),
            ("evaluation.json", json.dumps(evaluation, indent=1).encode()),
        ):
            write_file(self.path / name, content)
            self.mirror.push(self.path / name)

    def pull_evaluation(self) -> Path:
        """The scores that the trial wrote, made on whatever machine, as a file on this one."""
        self.mirror.pull(self.path / "evaluation.json")
        return self.path / "evaluation.json"

    def clear(self) -> None:
        """Delete what a finished trial no longer needs."""
        with suppress(OSError):
            self.mirror.drop(self.checkpoints)
