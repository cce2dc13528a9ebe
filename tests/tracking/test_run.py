"""The journal on disk: nothing that was acknowledged is lost, nothing torn counts, no copy of a file stays for ever."""

import json
import os
import resource
import shutil
from pathlib import Path
from threading import Condition, Thread
from typing import Any

import pytest

from ssl_ray.tracking.run import FILE_TRIES, Record, Run

OPEN: Record = {"do": "open"}
END: Record = {"do": "end", "status": "FINISHED"}


def point(step: int, **values: float) -> Record:
    return {"do": "metrics", "step": step, "at": 1, "values": values or {"loss": float(step)}}


def deliver(run: Run) -> list[Record]:
    """Take every record out of the journal, as a delivery does."""
    found = []
    while batch := run.pending():
        found += batch
        run.delivered(batch)
    return found


@pytest.fixture
def run(tmp_path: Path) -> Run:
    run = Run(tmp_path / "trial-key", Condition())
    for record in (OPEN, point(1), point(2)):
        run.append(record)
    return run


def test_what_was_appended_is_there_for_the_next_process(run: Run) -> None:
    """In order, non-finite numbers too."""
    last = point(3, loss=float("inf"), dice=float("-inf"))
    run.append(last)
    again = Run(run.folder, Condition())
    assert (len(again.waiting), again.summary.status) == (4, "RUNNING")
    assert (again.logged("loss"), again.logged("dice")) == ({1, 2, 3}, {3})
    assert deliver(again) == [OPEN, point(1), point(2), last]


@pytest.mark.parametrize("cut", range(1, len(json.dumps(point(2))) + 2))
def test_a_torn_last_line_does_not_count(run: Run, cut: int) -> None:
    """Wherever it is cut off, and the next record is on a line of its own."""
    path = run.folder / "records.jsonl"
    os.truncate(path, path.stat().st_size - cut)
    again = Run(run.folder, Condition())
    assert len(again.waiting) == 2
    again.append(point(3))
    assert deliver(Run(run.folder, Condition())) == [OPEN, point(1), point(3)]


def test_a_line_that_cannot_be_read_hides_no_other(run: Run) -> None:
    with (run.folder / "records.jsonl").open("ab") as file:
        file.write(b"\0\0\0\n[1]\n")
    again = Run(run.folder, Condition())
    again.append(point(3))
    unreadable = {"do": "unreadable"}
    assert deliver(again) == [OPEN, point(1), point(2), unreadable, unreadable, point(3)]


def test_delivered_records_are_not_delivered_again(run: Run) -> None:
    """The next process goes on behind them, and from the start where the note of it got lost in a power cut."""
    run.run_id = "id"
    run.delivered(run.pending())
    again = Run(run.folder, Condition())
    assert (again.run_id, len(again.waiting), again.logged("loss")) == ("id", 2, {1, 2})
    assert deliver(again) == [point(1), point(2)]
    (run.folder / "state.json").write_text("")
    lost = Run(run.folder, Condition())
    assert (lost.run_id, len(lost.waiting), lost.summary.status) == (None, 3, "RUNNING")


@pytest.mark.parametrize("status", ["FINISHED", "FAILED", "KILLED"])
def test_an_ended_run_may_be_taken_up_again(run: Run, status: str) -> None:
    run.close(status)
    deliver(run)
    again = Run(run.folder, Condition())
    assert (again.summary.status, len(again.waiting), again.logged("loss")) == (status, 0, {1, 2})
    again.append(OPEN)
    assert again.summary.status == "RUNNING"
    assert deliver(Run(run.folder, Condition())) == [OPEN]


@pytest.mark.parametrize("room", [0, 7])
def test_a_full_disk_is_told_once_and_stops_nothing(run: Run, room: int, capsys: pytest.CaptureFixture[str]) -> None:
    """What is logged meanwhile is delivered from memory, and is on disk as soon as there is room; no file is."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    size = (run.folder / "records.jsonl").stat().st_size
    resource.setrlimit(resource.RLIMIT_FSIZE, (size + room, limits[1]))
    try:
        for step in (3, 4, 5):
            run.append(point(step))
        run.text("x" * (size + 8), "words.txt")
        run.append(END)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert capsys.readouterr().out.count("File too large") == 1
    assert run.summary.status == "FINISHED"
    assert deliver(Run(run.folder, Condition())) == [OPEN, point(1), point(2)]
    assert deliver(run) == [OPEN, *map(point, range(1, 6)), END]
    run.append(OPEN)
    again = Run(run.folder, Condition())
    assert (again.summary.status, again.logged("loss")) == ("RUNNING", {1, 2, 3, 4, 5})
    assert deliver(again)[-1] == OPEN, "nothing counts as delivered before it is on disk"


def test_a_file_is_copied_until_mlflow_has_it(run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Two files of one name do not meet; one that MLflow refuses is kept; one that does not exist is told."""
    deliver(run)
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "file").write_text(folder)
        run.artifact(tmp_path / folder / "file")
    run.artifact(tmp_path / "none")
    assert capsys.readouterr().out.count("none: No such file") == 1
    copies = [run.folder / record["path"] for record in run.waiting]
    assert [path.read_text() for path in copies] == ["a", "b"]
    run.delivered(batch := run.pending(), [(batch[0], "no")])
    run.delivered(run.pending())
    assert not any(path.exists() for path in copies)
    assert [path.read_text() for path in run.folder.glob("files/*-refused/*")] == ["a"]
    assert not Run(run.folder, Condition()).waiting, "a refused file is not tried again"


def test_a_file_that_could_not_be_stored_is_tried_again_by_the_next_process(run: Run) -> None:
    """First of all, and no more once it is delivered."""
    run.text("words", "words.txt")
    while len(run.waiting) > 1:
        run.delivered(run.pending())
    (file,) = run.waiting
    run.tries = FILE_TRIES
    run.delivered([file], [(file, "no right")])
    run.append(END)
    again = Run(run.folder, Condition())
    assert (again.folder / file["path"]).read_text() == "words"
    assert deliver(again) == [file, END]
    assert not Run(run.folder, Condition()).waiting


def test_an_artifact_that_is_logged_while_the_last_record_is_delivered(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Copies that were delivered are dropped, but never one whose record is about to come."""
    run.append(END)
    while len(run.waiting) > 1:
        run.delivered(run.pending())
    (tmp_path / "report.html").write_text("report")
    copyfile = shutil.copyfile
    delivery = Thread(target=run.delivered, args=(run.pending(),))

    def copy(*paths: Any) -> None:
        copyfile(*paths)
        delivery.start()
        delivery.join(0.5)

    monkeypatch.setattr(shutil, "copyfile", copy)
    run.artifact(tmp_path / "report.html")
    delivery.join()
    (record,) = run.pending()
    assert (run.folder / record["path"]).read_text() == "report"
