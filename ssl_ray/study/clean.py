"""`ssl-ray clean`: what a study has on disk, and what neither a result nor an unfinished training needs any more."""

import math
from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Literal, NamedTuple

from rich.filesize import decimal

from ssl_ray.config.schema import Study
from ssl_ray.evaluate.scores import DICE_FOREGROUND
from ssl_ray.search.cells import STOPPED
from ssl_ray.storage.folders import Folders
from ssl_ray.storage.object_store import Place
from ssl_ray.tracking.logged import read_logged
from ssl_ray.tracking.run import Logged

Keep = Literal["best", "all"]


class Item(NamedTuple):
    """A file or folder of a study, its bytes, why it can go or what it is shared for, and whether it is needed."""

    path: Path
    bytes: int
    what: str
    needed: bool = True


def inventory(study: Study, folders: Folders, keep: Keep = "all") -> list[Item]:
    """What lies in a study's folder, and beside it what is shared with other studies or was set aside by `--fresh`.

    All that an unfinished training has is needed, and so is all of whose training no journal on this machine tells.
    With `keep` best, of the finished cells of each size and initialisation only one has its weights kept: the one that
    did best on validation, by the search's metric if it is one.
    """
    output, runs = folders.output, read_logged(folders)
    metric, mode = (study.search.metric, study.search.mode) if study.search else (DICE_FOREGROUND, "max")
    surpassed = _surpassed(runs, f"selected/validation/{metric}", lower=mode == "min") if keep == "best" else set()
    files = output.kept(folders.study).list()
    sizes: dict[Item, int] = {}
    for name, size in files.items():
        place, why = _unneeded(name, files, runs, surpassed)
        item = Item(folders.study / (place or name.partition("/")[0]), 0, why, not why)
        sizes[item] = sizes.get(item, 0) + size
    beside = {"cache": (Place.parse(folders.cache), "prepared volumes, which other studies may share")}
    beside |= {name: (output.kept(output.folder / name), "of MLflow, shared") for name in ("artifacts", "mlflow.db")}
    for name in sorted(output.names(output.folder)):
        if name.startswith(f"{study.name}-until-"):
            beside[name] = output.kept(output.folder / name), "an old study that --fresh has set aside"
    items = [item._replace(bytes=size) for item, size in sizes.items()]
    shared = [Item(Path(str(place)), sum(place.list().values()), what) for place, what in beside.values()]
    return sorted(items, key=lambda item: (item.needed, item.path)) + [item for item in shared if item.bytes]


def remove(folders: Folders, items: Sequence[Item]) -> int:
    """Remove what is not needed, here and where it is kept -> bytes. Only the one process on the study may do it."""
    gone = [item for item in items if not item.needed]
    for item in gone:
        folders.output.drop(item.path)
    return sum(item.bytes for item in gone)


def render(items: Sequence[Item]) -> str:
    """A line each, and what can go in all."""
    lines = [
        f"{'stays' if item.needed else 'can go':<7} {decimal(item.bytes):>9}  {item.path}  {item.what}".rstrip()
        for item in items
    ]
    return "\n".join([*lines, f"can go: {decimal(sum(item.bytes for item in items if not item.needed))}"])


def _unneeded(
    name: str, files: Mapping[str, int], runs: Sequence[Logged], surpassed: Collection[str]
) -> tuple[str, str]:
    """The folder, or file, in the study's folder that may be removed with the file `name`, and why; empty if none."""
    by_key = {(run.kind, run.key): run for run in runs}
    match name.split("/"):
        case [folder, "checkpoints", *_] if folder.startswith("pretrain-"):
            # Without its weights a pretraining goes back to its states, to find them again.
            whole = _over(by_key.get(("pretraining", folder.removeprefix("pretrain-"))))
            if whole and f"{folder}/best.safetensors" in files:
                return f"{folder}/checkpoints", "training states of a finished pretraining"
        case ["finetune-trials", cell, part, *_]:
            run = next((run for run in runs if run.kind == "trial" and run.key[:8] == cell[-8:]), None)
            if _over(run) and part in ("checkpoints", "faults"):
                return f"finetune-trials/{cell}/{part}", "training states of finished cells"
            if run and run.key in surpassed and part.endswith(".safetensors"):
                return f"finetune-trials/{cell}/{part}", "weights of cells that are not the best on validation"
        case ["ray", folder, *_]:
            stage, _, key = folder.partition("-")
            kinds = ["pretraining"] if stage == "pretrain" else ["grid", "search"]
            trained = [run for run in runs if run.kind in ("trial", "pretraining")]
            if all(map(_over, trained)) and any(_over(by_key.get((kind, key))) for kind in kinds):
                return f"ray/{folder}", "Ray's own files of a finished training, logs included"
    return "", ""


def _over(run: Logged | None) -> bool:
    """Whether nothing goes on from what a training has left."""
    return run is not None and (run.status == "FINISHED" or (run.status == "KILLED" and bool(run.tags.get(STOPPED))))


def _surpassed(runs: Sequence[Logged], metric: str, lower: bool) -> set[str]:
    """Keys of the finished cells, of which MLflow has everything, that did worse than another one of their arm."""
    arms: dict[tuple[str | None, str | None], list[Logged]] = defaultdict(list)
    for run in runs:
        if run.kind == "trial" and run.status == "FINISHED":
            arms[run.params.get("size"), run.params.get("init")].append(run)

    def score(run: Logged) -> float:
        return run.metrics[metric] * (-1 if lower else 1) if metric in run.metrics else -math.inf

    best = {max(rivals, key=score).key for rivals in arms.values()}
    return {run.key for rivals in arms.values() for run in rivals if run.delivered and run.key not in best}
