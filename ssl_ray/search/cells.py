"""The cells of the fine-tuning grid, and under which names the grid's MLflow run keeps what the report reads."""

import itertools
from dataclasses import dataclass
from typing import Literal

from ssl_ray.config.schema import Finetune

CELLS = "cells.json"
"""Artifact of the grid's run: the key of every cell, by which the report finds its run."""

BAD_VOLUMES = "bad_volumes.json"
"""In the study's folder, and an artifact of the grid's run: the volumes that were left out, and why."""

FAILURE = "ssl_ray.failure"
"""Tag of a failed trial: the cause in one line. The whole error is its artifact `failure.txt`."""

NONFINITE = "ssl_ray.nonfinite"
"""Tag of a trial that failed because its loss or gradient was not finite: "true"."""


@dataclass(frozen=True)
class Cell:
    """One cell of the grid."""

    size: int
    init: Literal["random", "pretrained"]
    lr: float
    run: int = 0

    @classmethod
    def of(cls, size: int, init: Literal["random", "pretrained"], lr: float, run: int = 0) -> "Cell":
        """The cell of these values."""
        return cls(size, init, lr, run)

    @property
    def name(self) -> str:
        """For run names and folders, e.g. `n06-pretrained-lr0.0001-run0`."""
        return f"n{self.size:02d}-{self.init}-lr{self.lr:g}-run{self.run}"


def cells(settings: Finetune) -> list[Cell]:
    """Every cell of the grid, those with few volumes first."""
    product = itertools.product(settings.sizes, settings.grid.init, settings.rates, range(settings.runs))
    return [Cell.of(*values) for values in product]
