"""What the trials of a grid share: which cells there are, what each starts from, and where each keeps its files."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from ssl_ray.config.schema import Finetune, Network
from ssl_ray.data.datalist import Case, Splits
from ssl_ray.data.store import Store, Volume
from ssl_ray.errors import UserError
from ssl_ray.finetune.job import TrialData, TrialJob
from ssl_ray.finetune.trial_folder import TrialFolder
from ssl_ray.pretrain.driver import Pretrained
from ssl_ray.search.cells import Cell, cells
from ssl_ray.storage.folders import Folders
from ssl_ray.training.checkpoint import digest

_DIGESTED_APART = frozenset({"grid", "cohort", "weights"})
"""Fields that the grid's digest leaves out, because each cell's own digest covers them."""


@dataclass(frozen=True)
class GridJob:
    """One grid; `grid_job` makes it."""

    config: Finetune
    network: Network
    data: Mapping[int, TrialData]
    """Prepared volumes of every split."""
    pretrained: Pretrained | None
    """What cells with `init: pretrained` start from; None where the grid has no such cell."""
    folders: Folders
    key: str
    """Digest of what all cells depend on."""
    keys: Mapping[Cell, str]
    """Digest of everything that a cell's result depends on, in the order in which the cells are trained."""

    @property
    def folder(self) -> Path:
        """Holds a folder for each cell."""
        return self.folders.study / f"finetune-{self.key}"

    def start(self, cell: Cell) -> Pretrained | None:
        """The pretraining that a cell starts from; None for a random start."""
        return self.pretrained if cell.init == "pretrained" else None

    def trial_folder(self, cell: Cell) -> TrialFolder:
        """What a cell keeps on disk."""
        key = self.keys[cell]
        return TrialFolder(self.folder / f"{cell.name}-{key[:8]}", key, self.folders.output)

    def trial(self, cell: Cell) -> TrialJob:
        """What a cell's trial is started with. Weights that another machine wrote are fetched first."""
        start = self.start(cell)
        if start and start.weights.is_relative_to(self.folders.output.folder):
            self.folders.output.pull(start.weights)
        data, weights = self.data[cell.split], start.weights if start else None
        return TrialJob(self.config, self.network, cell.lr, cell.seed, data, weights, self.trial_folder(cell))


def grid_job(
    config: Finetune,
    network: Network,
    splits: Splits,
    volumes: Mapping[str, Volume],
    pretrained: Pretrained | None,
    folders: Folders,
) -> GridJob:
    """Find the volumes of every split and the key of every cell.

    Args:
        config: the fine-tuning and its grid.
        network: the widths of the UNETR.
        splits: cases of every split, of validation and of test.
        volumes: prepared volumes by image path; a case that is not in it was skipped as bad.
        pretrained: weights for the cells with `init: pretrained`; None where the grid has none.
        folders: of the study.

    Raises:
        UserError: when a split has no usable volume left.
    """
    store = Store(folders.cache, folders.scratch)
    data = {size: _trial_data(store, splits, size, volumes) for size in config.split_sizes}
    held_out = data[config.split_sizes[0]]  # the same in every split
    base = [
        config.model_dump(mode="json", exclude=Finetune.HOW | _DIGESTED_APART),
        config.cohort.classes,
        config.gpus_per_trial > 0 if config.precision == "auto" else None,  # `auto` depends on the kind of device
        network.model_dump(mode="json"),
        [volume.key for volume in held_out.validation + held_out.test],
    ]
    keys = {
        cell: digest(
            base,
            [cell.split, cell.init, cell.lr, cell.seed],
            [volume.key for volume in data[cell.split].training],
            pretrained.key if pretrained and cell.init == "pretrained" else None,
        )
        for cell in cells(config)
    }
    key = digest(base, pretrained.key if pretrained else None)
    return GridJob(config, network, data, pretrained, folders, key, keys)


def _trial_data(store: Store, splits: Splits, size: int, volumes: Mapping[str, Volume]) -> TrialData:
    def prepared(cases: Sequence[Case]) -> tuple[Volume, ...]:
        return tuple(volumes[str(case.image)] for case in cases if str(case.image) in volumes)

    training, validation = prepared(splits.training[size]), prepared(splits.validation)
    if not training or not validation:
        raise UserError(f"finetune.cohort.splits.{size}: no usable volume is left for training or validation")
    return TrialData(store, training, validation, prepared(splits.test), splits.organs)
