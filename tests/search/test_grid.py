"""The grid without Ray: what its MLflow run keeps."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from ssl_ray.search import grid
from ssl_ray.search.cells import CELLS, Cell
from ssl_ray.storage.folders import Folders


class Away:
    """A tracker, and its run, of an MLflow that does not answer: what is logged is in `texts`."""

    def __init__(self) -> None:
        self.texts: dict[str, str] = {}
        self.id = "run"

    def open(self, *_: Any) -> "Away":
        return self

    def read(self, *_: Any) -> None:
        return None

    def text(self, text: str, name: str) -> None:
        self.texts[name] = text


def test_cells_of_a_wider_grid_stay_known_while_mlflow_is_away(tmp_path: Path) -> None:
    """A grid that is taken up with fewer cells keeps the keys of the others, also where MLflow cannot be asked."""
    folders, tracker = Folders.of("study", str(tmp_path)), Away()
    jobs = {Cell.of(2, "random", 1e-3, run): SimpleNamespace(key=f"key{run}") for run in (0, 1)}
    for some in (jobs, dict(list(jobs.items())[:1])):
        grid._open("grid", some, folders, tracker, {}, "")  # type: ignore[arg-type]
        assert set(json.loads(tracker.texts[CELLS]).values()) == {"key0", "key1"}
