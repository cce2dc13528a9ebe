"""What a trial is given.

The driver and the report need no more of a trial: MONAI takes seconds to import and is not here.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from ssl_ray.cohort.store import Store, Volume


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
