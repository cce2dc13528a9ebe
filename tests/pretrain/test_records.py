"""What rank 0 of a pretraining tells: records on their way to the run's journal, and faults before its checkpoints."""

import json
from collections.abc import Callable
from pathlib import Path
from threading import Condition
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from ray.exceptions import ActorDiedError
from tiny_learner import BATCH, CPU, images_of, make
from torch import Tensor

from ssl_ray.console import Bar
from ssl_ray.pretrain import worker
from ssl_ray.pretrain.begin import Beginning
from ssl_ray.pretrain.collector import Collector
from ssl_ray.pretrain.learner import PretrainingLearner
from ssl_ray.pretrain.stream import Batch
from ssl_ray.storage.mirror import Mirror
from ssl_ray.tracking.run import Run
from ssl_ray.training.nonfinite import Fault, Watch

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


class LateWatch(Watch):
    """As on a GPU: a step is looked at while the next one runs."""

    def look(self, step: int, loss: Tensor, norm: Tensor) -> Fault | None:
        before = self.last()
        self._pending = step, torch.stack([loss, norm]), SimpleNamespace(synchronize=lambda: None)
        return before


@pytest.mark.parametrize("watch", [Watch, LateWatch])
def test_a_checkpoint_has_counted_its_own_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, watch: type[Watch]
) -> None:
    """The fault of a step is told before the checkpoint that a restart would go on from, and counts in its row."""
    made, told, nan = make(tmp_path, checkpoint_every=1, log_every=1), list[Any](), torch.tensor(float("nan"))
    context = SimpleNamespace(get_world_rank=lambda: 0, get_world_size=lambda: 1)
    saver = SimpleNamespace(save=lambda state: told.append(state["row_not_finite"]), wait=lambda: None)
    reporter = SimpleNamespace(start=lambda *_: None, record=lambda _: None, fault=lambda text, _: told.append(text))
    monkeypatch.setattr(worker.train, "get_context", lambda: context)
    fakes = {
        "get_device": lambda: CPU,
        "Watch": watch,
        "Saver": lambda *_, **__: saver,
        "_Reporter": lambda *_: reporter,
        "_keep_fault": lambda _, fault, *__: f"step {fault.step}",
    }
    for name, fake in fakes.items():
        monkeypatch.setattr(worker, name, fake)
    monkeypatch.setattr(PretrainingLearner, "step", lambda *_: (nan, nan))
    monkeypatch.setattr(PretrainingLearner, "validate", lambda *_: {})
    stream = (Batch(step, images_of(made, step), np.arange(BATCH), 0.0) for step in range(2))
    worker.train_loop(made.job, Beginning(0, {}, stream))
    assert told == ["step 0", 1, "step 1", 2]
