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

Init = Literal["random", "pretrained"]


@dataclass(frozen=True)
class Cell:
    """One run of one combination of settings.

    size: number of labelled volumes, or of subjects where they are drawn from a pool.
    lr: peak learning rate.
    run: which seed, draw of the labelled volumes and pretraining; cells that differ in `init` alone share them.
    """

    size: int
    init: Init
    lr: float
    run: int = 0

    @property
    def name(self) -> str:
        """For run names and folders, e.g. `n06-pretrained-lr0.0001-run0`."""
        return f"n{self.size:02d}-{self.init}-lr{self.lr!r}-run{self.run}"

    def apply(self, config: Finetune) -> Finetune:
        """The settings that this cell is trained with."""
        return config.model_copy(update={"optimizer": config.optimizer.model_copy(update={"lr": self.lr})})


def cells(config: Finetune) -> list[Cell]:
    """Every cell of the grid, those with few volumes first."""
    product = itertools.product(config.sizes, config.grid.init, config.rates, range(config.runs))
    return [Cell(*values) for values in product]
