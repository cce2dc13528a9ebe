"""Journals as a study's driver writes them, without MLflow and without a training."""

import json
from pathlib import Path
from threading import Condition
from typing import Any

from ssl_ray.config.schema import Study
from ssl_ray.search.cells import CELLS, cells
from ssl_ray.storage.folders import Folders
from ssl_ray.tracking.run import Run, now


def begin(folders: Folders, kind: str, key: str, name: str = "", **params: Any) -> Run:
    """A run that is open."""
    run = Run(folders.study / "journal" / "0123456789ab" / f"{kind}-{key}", Condition())
    run.append({"do": "open", "at": now(), "kind": kind, "key": key, "name": name or kind})
    run.params(params)
    return run


def train(run: Run, step: int, rate: float) -> None:
    """Its record at a step, at so many patches a second."""
    run.metrics({"lr": 1e-3, "loss": 0.5, "system/patches_per_second": rate}, step)


def begin_cells(study: Study, folders: Folders) -> dict[str, str]:
    """An open grid that has named its cells -> their keys by name."""
    begin(folders, "grid", "g")
    names = {cell.name: f"{number:08d}cell" for number, cell in enumerate(cells(study.finetune))}
    (folders.study / CELLS).write_text(json.dumps({"g": names}))
    return names


def delivered(run: Run) -> None:
    """MLflow has all of it."""
    run.run_id = "1"
    while batch := run.pending():
        run.delivered(batch)


def write(path: Path, size: int) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(bytes(size))
    return path
