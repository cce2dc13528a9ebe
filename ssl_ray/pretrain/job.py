"""What a pretraining worker is started with.

Ray's controller reads it, too, before it starts any worker: torch and MONAI take seconds to import and are not here.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ssl_ray.config.schema import Network, Pretrain
from ssl_ray.data.store import Volume
from ssl_ray.pretrain.stream import Feed
from ssl_ray.storage.mirror import Mirror

if TYPE_CHECKING:
    from ray.util.queue import Queue


@dataclass(frozen=True)
class Labelled:
    """Labelled volumes that the probe is fitted on and tested on, prepared as the pretraining's own."""

    fitted: tuple[Volume, ...]
    tested: tuple[Volume, ...]
    classes: int


@dataclass(frozen=True)
class Recipe:
    """What the pretrained weights depend on, except the volumes; `weights` are those that they start from."""

    settings: Pretrain
    network: Network
    seed: int
    weights: Path | None = None


@dataclass(frozen=True)
class Job:
    """What a worker is given.

    What it has to tell goes into the file `records`, and at once through `reports`, which the driver empties. That
    costs a step next to nothing, while `ray.train.report` is a barrier that the controller serves every two seconds.
    """

    recipe: Recipe
    training: Feed
    validation: Feed
    folder: Path
    mirror: Mirror
    key: str
    reports: "Queue"
    labelled: Labelled | None = None

    @property
    def checkpoints(self) -> Path:
        """Folder of the training states, by step."""
        return self.folder / "checkpoints"

    @property
    def records(self) -> Path:
        """What rank 0 has measured, a JSON object a line; a step that was trained again has several."""
        return self.folder / "records.jsonl"

    @property
    def weights(self) -> Path:
        """The autoencoder that did best on validation so far, written by rank 0."""
        return self.folder / "best.safetensors"
