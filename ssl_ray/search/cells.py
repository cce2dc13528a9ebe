"""Cells, the grid of them, and under which names the parent run in MLflow keeps what the report reads."""

import itertools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from ssl_ray.config.overrides import changed
from ssl_ray.config.schema import Finetune

CELLS = "cells.json"
"""Artifact of the grid's run: the key of every cell, by which the report finds its run."""

BAD_VOLUMES = "bad_volumes.json"
"""In the study's folder, and an artifact of the grid's run: the volumes that were left out, and why."""

FAILURE = "ssl_ray.failure"
"""Tag of a failed trial: the cause in one line. The whole error is its artifact `failure.txt`."""

CELL = "ssl_ray.cell"
"""Tag of a trial: the name of its cell."""

NONFINITE = "ssl_ray.nonfinite"
"""Tag of a trial that failed because its loss or gradient was not finite: "true"."""

STOPPED = "ssl_ray.stopped"
"""Tag of a trial that a search has stopped: at which step."""

JOURNAL = "search.journal"
"""In the study's folder, and an artifact of a search's run: Optuna's record of the cells that were drawn."""

RATE = "finetune.optimizer.lr"
"""Key of the learning rate, which every cell overrides."""

Init = Literal["random", "pretrained", "permuted"]


@dataclass(frozen=True)
class Cell:
    """One run of one combination of settings.

    overrides: `size` and `init`, and other values of dotted keys of the experiment, `finetune.optimizer.lr` at least;
        sorted by key, values hashable.
    run: which seed, draw of the labelled volumes and pretraining; cells that differ in `init` alone share them.
    fold: which one of the run, where it has some.
    """

    overrides: tuple[tuple[str, Any], ...]
    run: int
    fold: int | None = None

    @classmethod
    def of(cls, size: int, init: Init, lr: float, run: int = 0, fold: int | None = None, **more: Any) -> "Cell":
        """The cell of these overrides; further keys by `**{"finetune.augmentation.shift": 0.2}`."""
        overrides: dict[str, Any] = {"size": size, "init": init, RATE: lr, **more}
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
        return float(self.settings[RATE])

    @property
    def settings(self) -> Mapping[str, Any]:
        """The overrides that are keys of the experiment."""
        return {key: value for key, value in self.overrides if key not in ("size", "init")}

    @property
    def name(self) -> str:
        """For people and MLflow, e.g. `n06-pretrained-lr0.0001-run0`."""
        others = (item for item in self.settings.items() if item[0] != RATE)
        more = "".join(f"{key.rpartition('.')[2]}{value}-" for key, value in others)
        fold = "" if self.fold is None else f"-fold{self.fold}"
        return f"n{self.size:02d}-{self.init}-lr{self.lr!r}-{more}run{self.run}{fold}"

    @property
    def file_name(self) -> str:
        """The name as one part of a path, cut where it is long: beside it stands the cell's key."""
        return self.name.replace("/", "_").encode()[:246].decode(errors="ignore")

    @property
    def lineage(self) -> dict[str, str | int | float | None]:
        """For the metadata of the model that it makes."""
        told: dict[str, str | int | float | None] = {"cell": self.name, "size": self.size, "init": self.init}
        return told | {"lr": self.lr, "run": self.run, "fold": self.fold}

    @property
    def label(self) -> str:
        """For people: `6 labelled, pretrained, lr 0.0001, run 0`."""
        others = [f"{key.rpartition('.')[2]} {value}" for key, value in self.settings.items() if key != RATE]
        fold = [] if self.fold is None else [f"fold {self.fold}"]
        return ", ".join([f"{self.size} labelled", self.init, f"lr {self.lr:g}", *others, f"run {self.run}", *fold])

    def apply(self, config: Finetune) -> Finetune:
        """The section `finetune` that this cell is trained with."""
        return changed(config, {key.removeprefix("finetune."): value for key, value in self.settings.items()})


def cells(config: Finetune) -> list[Cell]:
    """Every cell of the grid, those with few volumes first."""
    folds = range(config.cohort.folds) if config.cohort.folds else [None]
    product = itertools.product(config.sizes, config.grid.init, config.rates, range(config.runs), folds)
    return [Cell.of(*values) for values in product]
