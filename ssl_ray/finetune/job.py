"""What a trial is started with, the records that it sends back, and the folder that it writes to.

checkpoints/<step>/            training states, the newest two, each with the weights that did best until then
faults/step_<n>.safetensors    what reproduces a step that was not finite, for the first three
model.safetensors              the result: the weights that did best on validation, with all that prediction needs
planes.npz                     three planes of every test volume, or validation volume where there is no test part
evaluation.json                the scores, volume by volume

The driver imports this, too: MONAI takes seconds to load and is not here.
"""

import json
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from ssl_ray.config.schema import Finetune, Network
from ssl_ray.data.store import Store, Volume
from ssl_ray.evaluate.planes import FILE, Planes, to_npz
from ssl_ray.networks.model_file import MODEL_FILE, Metadata, model_content
from ssl_ray.storage.files import write_file
from ssl_ray.storage.mirror import Mirror

Record = tuple[int, dict[str, float]]
"""A step, and the metrics of it by name."""


@dataclass(frozen=True)
class TrialData:
    """Prepared volumes that a trial reads; cells of one draw share them. The classes 1, 2, ... are the organs."""

    store: Store
    training: tuple[Volume, ...]
    validation: tuple[Volume, ...]
    test: tuple[Volume, ...]
    organs: tuple[str, ...]


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

    def keep_result(
        self,
        weights: Mapping[str, Tensor],
        planes: Mapping[str, Planes],
        evaluation: Mapping[str, Any],
        metadata: Metadata,
    ) -> None:
        """Write `model.safetensors`, `planes.npz`, `evaluation.json`, in this order; each is whole or not there."""
        for name, content in (
            (MODEL_FILE, model_content(weights, metadata)),
            (FILE, to_npz(planes)),
            ("evaluation.json", json.dumps(evaluation, indent=1).encode()),
        ):
            write_file(self.path / name, content)
            self.mirror.push(self.path / name)

    def pull_evaluation(self) -> list[Path]:
        """The scores and the planes that the trial wrote, made on whatever machine, as files on this one."""
        paths = [self.path / name for name in ("evaluation.json", FILE)]
        for path in paths:
            self.mirror.pull(path)
        return paths

    def clear(self) -> None:
        """Delete what a finished trial no longer needs."""
        with suppress(OSError):
            self.mirror.drop(self.checkpoints)


@dataclass(frozen=True, repr=False)  # Tune writes it with every record
class TrialJob:
    """One cell of the grid, with all that its result depends on and the folder that it writes to.

    config: with the cell's own values.
    seed: of the initial weights and of the order of the patches.
    weights: pretrained weights to start from; None for random ones.
    made_by: id of the MLflow run that made them, where it is known.
    permuted: whether to shuffle them within each tensor, as a control.
    lineage: which study and cell it is, for the metadata of the model.
    arms: folders of the cells that this one may be compared with; its own may be among them.
    """

    config: Finetune
    network: Network
    seed: int
    data: TrialData
    weights: Path | None
    folder: TrialFolder
    made_by: str | None = None
    permuted: bool = False
    arms: tuple[Path, ...] = ()
    lineage: Mapping[str, str | int | float | None] = field(default_factory=dict)
