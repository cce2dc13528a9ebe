"""What a trial is started with, and the records that it sends back.

The driver imports this, too: MONAI takes seconds to load and is not here.
"""

from dataclasses import dataclass
from pathlib import Path

from ssl_ray.config.schema import Finetune, Network
from ssl_ray.data.store import Store, Volume
from ssl_ray.finetune.trial_folder import TrialFolder


@dataclass(frozen=True)
class TrialData:
    """Prepared volumes that a trial reads; trials of one split share them."""

    store: Store
    training: tuple[Volume, ...]
    validation: tuple[Volume, ...]
    test: tuple[Volume, ...]
    organs: tuple[str, ...]
    """Names of the classes 1, 2, ..."""


@dataclass(frozen=True)
class TrialJob:
    """One cell of the grid, with all that its result depends on and the folder that it writes to."""

    config: Finetune
    network: Network
    """Widths of the UNETR."""
    lr: float
    """Instead of the one in `config.optimizer`."""
    seed: int
    """Of the initial weights and of the order of the patches."""
    data: TrialData
    weights: Path | None
    """Pretrained weights to start from; None for random ones."""
    folder: TrialFolder


Record = tuple[int, dict[str, float]]
"""A step, and the metrics of it by name."""
