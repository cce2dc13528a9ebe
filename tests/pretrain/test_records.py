"""Records of a pretraining on their way from rank 0 to the run's journal."""

import json
from collections.abc import Callable
from pathlib import Path
from threading import Condition
from types import SimpleNamespace
from typing import Any

import pytest
from ray.exceptions import ActorDiedError

from ssl_ray.console import Bar
from ssl_ray.pretrain.collector import Collector
from ssl_ray.storage.mirror import Mirror
from ssl_ray.tracking.run import Run

SPEED = {"system/patches_per_second": 5.0, "system/data_wait_percentage": 0.0}


class Reports:
    """Ray's queue: gives these items and, in place of a function, what that raises."""

    def __init__(self, *items: Any) -> None:
        self._items = [*items]

    def get(self) -> Any:
        item = self._items.pop(0)
        return item() if callable(item) else item

    def put(self, item: Any) -> None:
        self._items.append(item)

    def shutdown(self) -> None:
        pass


def record(step: int) -> dict[str, Any]:
    return {"step": step, "lr": 0.1, "loss": 1 / step, **SPEED}


def collect(folder: Path, *items: Any, lines: str = "") -> Run:
    """The run after a driver has collected these items, with these lines in the job's file."""
    (folder / "records.jsonl").write_text(lines)
    run = Run(folder / "journal", Condition())
    job = SimpleNamespace(reports=Reports(*items), records=folder / "records.jsonl", mirror=Mirror(folder))
    with Bar("pretraining", 9) as bar, Collector(job, run, bar):  # type: ignore[arg-type]
        pass
    return run


def raising(error: Exception) -> Callable[[], None]:
    def fail() -> None:
        raise error

    return fail


@pytest.mark.parametrize("left", [(), (("record", record(3)),)])
def test_what_the_queue_lost_comes_from_the_file(tmp_path: Path, left: tuple[Any, ...]) -> None:
    """The queue dies with its node, or its items with an earlier driver; half a line is of a worker that was killed."""
    lines = "\n".join(["", json.dumps(record(1)), json.dumps(record(2))[:9], "", json.dumps(record(2)), ""])
    lines += json.dumps(record(3)) + "\n" + json.dumps(record(2) | {"loss": 9.0}) + "\n"
    run = collect(tmp_path, ("started", (0, "CPU")), *left, raising(ActorDiedError()), lines=lines)
    assert run.logged("loss") == {1, 2, 3}
    assert [entry["values"]["loss"] for entry in run.waiting if "loss" in entry.get("values", {})] == [1, 1 / 2, 1 / 3]


def test_a_record_that_cannot_be_logged_ends_nothing(tmp_path: Path) -> None:
    run = collect(tmp_path, ("record", {"lr": 0.1}), ("record", record(2)), ("record", record(3)))
    assert run.logged("loss") == {2, 3}


def test_the_bar_does_not_go_back_to_what_the_file_repeats(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """But to the checkpoint of a worker that was killed, and on with what only the file has."""
    shown: list[int] = []
    monkeypatch.setattr(Bar, "update", lambda _, step, *__, **___: shown.append(step))
    live = [("started", (0, "CPU")), *(("record", record(step)) for step in (1, 2))]
    live += [("started", (1, "CPU")), ("record", record(2)), ("record", record(3))]
    lines = "".join(json.dumps(record(step)) + "\n" for step in (1, 2, 2, 3, 4))
    collect(tmp_path, *live)
    assert shown == [0, 1, 2, 1, 2, 3]
    shown.clear()
    (tmp_path / "again").mkdir()
    run = collect(tmp_path / "again", *live, raising(ActorDiedError()), lines=lines)
    assert run.logged("loss") == {1, 2, 3, 4}
    assert shown == [1, 2, 3, 4, 0, 1, 2, 1, 2, 3]
