"""What a trial is started with, the records that it sends back, and the folder that it writes to.

checkpoints/<step>/            training states, the newest two, each with the weights that did best until then
faults/step_<n>.safetensors    what reproduces a step that was not finite, for the first three
model.safetensors              the result: the weights that did best on validation, with all that prediction needs
planes.npz                     three planes of every test volume, or validation volume where there is no test part
evaluation.json                the scores, volume by volume

The driver imports this, too: MONAI takes seconds to load and is not here.
"""

from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from ssl_ray.config.schema import Finetune, Network
from ssl_ray.data.store import Store, Volume
from ssl_ray.storage.mirror import Mirror
from ssl_ray.storage.object_store import Place

EVALUATION = "evaluation.json"
Record = tuple[int, dict[str, float]]
"""A step, and the metrics of it by name."""


@dataclass(frozen=True)
class TrialData:
    """Prepared volumes that a trial reads. The classes 1, 2, ... are the organs.

    As Tune gets it, and writes it into files, the place of `store` has no password; the trial is given the whole one.
    """

    store: Store
    training: tuple[Volume, ...]
    validation: tuple[Volume, ...]
    test: tuple[Volume, ...]
    organs: tuple[str, ...]


@dataclass(frozen=True, repr=False)  # Tune writes it with every record
class TrialJob:
    """One cell of the grid, with all that its result depends on and the folder that it writes to.

    Whatever the folder holds is kept in the mirror. `key` is a digest of everything that the result depends on.

    config: with the cell's own values.
    seed: of the initial weights and of the order of the patches.
    weights: pretrained weights to start from; None for random ones.
    made_by: id of the MLflow run that made them, where it is known.
    permuted: whether to shuffle them within each tensor, as a control.
    lineage: which study and cell it is, for the metadata of the model.
    settled: folder of the precision that all cells compute in with which this one may be compared; None: its own.
    """

    config: Finetune
    network: Network
    seed: int
    data: TrialData
    weights: Path | None
    folder: Path
    mirror: Mirror
    key: str
    made_by: str | None = None
    permuted: bool = False
    settled: Path | None = None
    lineage: Mapping[str, str | int | float | None] = field(default_factory=dict)

    @property
    def checkpoints(self) -> Path:
        """Folder of the training states, by step."""
        return self.folder / "checkpoints"

    def clear_copies(self) -> None:
        """Delete this machine's copies of the training states that are kept elsewhere: nobody else reaches its disk."""
        if self.mirror.origin:
            with suppress(OSError):
                Place(str(self.checkpoints)).remove()

    def clear(self) -> None:
        """Delete what a finished trial no longer needs."""
        with suppress(OSError):
            self.mirror.drop(self.checkpoints)
