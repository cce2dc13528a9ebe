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


def cells(settings: Finetune) -> list[Cell]:
    """Every cell of the grid, those with few volumes first."""
    grid = settings.grid
    product = itertools.product(settings.split_sizes, grid.init, grid.lr, grid.seeds)
    return [Cell(split, init, lr, seed) for split, init, lr, seed in product]
