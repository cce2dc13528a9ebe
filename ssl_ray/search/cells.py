"""The cells of the fine-tuning grid, and under which names the grid's MLflow run keeps what the report reads."""

import itertools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from ssl_ray.config.loading import changed
from ssl_ray.config.schema import Finetune

CELLS = "cells.json"
"""Artifact of the grid's run: the key of every cell, by which the report finds its run."""

BAD_VOLUMES = "bad_volumes.json"
"""In the study's folder, and an artifact of the grid's run: the volumes that were left out, and why."""

FAILURE = "ssl_ray.failure"
"""Tag of a failed trial: the cause in one line. The whole error is its artifact `failure.txt`."""

NONFINITE = "ssl_ray.nonfinite"
"""Tag of a trial that failed because its loss or gradient was not finite: "true"."""

Init = Literal["random", "pretrained", "permuted"]


@dataclass(frozen=True)
class Cell:
    """One run of one combination of settings.

    overrides: `size` and `init`, and other values of dotted keys of the section `finetune`, `optimizer.lr` at least;
        sorted by key.
    run: which seed, draw of the labelled volumes and pretraining; cells that differ in `init` alone share them.
    fold: which one of the run, where it has some.
    """

    overrides: tuple[tuple[str, Any], ...]
    run: int
    fold: int | None = None

    @classmethod
    def of(cls, size: int, init: Init, lr: float, run: int = 0, fold: int | None = None, **more: Any) -> "Cell":
        """The cell of these overrides; further keys by `**{"augmentation.shift": 0.2}`."""
        overrides: dict[str, Any] = {"size": size, "init": init, "optimizer.lr": lr, **more}
        return cls(tuple(sorted(overrides.items())), run, fold)

    @property
    def size(self) -> int:
        """Number of labelled volumes, or of subjects where they are drawn from a pool."""
        return int(dict(self.overrides)["size"])

    @property
    def init(self) -> Init:
        """What the encoder starts from."""
        init: Init = dict(self.overrides)["init"]
        return init

    @property
    def lr(self) -> float:
        """Peak learning rate."""
        return float(dict(self.overrides)["optimizer.lr"])

    @property
    def settings(self) -> Mapping[str, Any]:
        """The overrides that are keys of the section `finetune`."""
        return {key: value for key, value in self.overrides if key not in ("size", "init")}

    @property
    def name(self) -> str:
        """For run names and folders, e.g. `n06-pretrained-lr0.0001-run0`."""
        more = [f"{key}{value}-" for key, value in self.settings.items() if key != "optimizer.lr"]
        fold = "" if self.fold is None else f"-fold{self.fold}"
        return f"n{self.size:02d}-{self.init}-lr{self.lr!r}-{''.join(more)}run{self.run}{fold}"

    def apply(self, config: Finetune) -> Finetune:
        """The settings that this cell is trained with."""
        return changed(config, self.settings)


def cells(config: Finetune) -> list[Cell]:
    """Every cell of the grid, those with few volumes first."""
    folds = range(config.cohort.folds) if config.cohort.folds else [None]
    product = itertools.product(config.sizes, config.grid.init, config.rates, range(config.runs), folds)
    return [Cell.of(*values) for values in product]
