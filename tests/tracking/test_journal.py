"""The journal on disk: nothing that was acknowledged is lost, nothing torn counts, nothing delivered stays for ever."""

import json
import os
import resource
import shutil
import threading
from pathlib import Path
from typing import Any

import pytest

from ssl_ray.tracking.journal import Journal, Record

OPEN: Record = {"do": "open"}
END: Record = {"do": "end", "status": "FINISHED"}


def point(step: int, **values: float) -> Record:
    return {"do": "metrics", "step": step, "at": 1, "values": values or {"loss": float(step)}}


def deliver(journal: Journal, refuse: Record | None = None) -> list[Record | None]:
    """Take every record out of the journal, as a delivery does, but for one."""
    found = []
    while entries := journal.pending(1000):
        found += [entry.record for entry in entries]
        journal.delivered(entries, [(refuse, "no")] if refuse and refuse in found[-len(entries) :] else [])
    assert journal.left == 0
    return found


@pytest.fixture
def journal(tmp_path: Path) -> Journal:
    journal = Journal(tmp_path / "trial-key")
    for record in (OPEN, point(1), point(2)):
        journal.append(record)
    return journal


def test_what_was_appended_is_there_for_the_next_process(journal: Journal) -> None:
    """In order, non-finite numbers too."""
    last = point(3, loss=float("inf"), dice=float("-inf"))
    journal.append(last)
    again = Journal(journal.folder)
    assert (again.left, again.status) == (4, "RUNNING")
    assert again.steps() == {"loss": {1, 2, 3}, "dice": {3}}
    assert deliver(again) == [OPEN, point(1), point(2), last]


@pytest.mark.parametrize("cut", range(1, len(json.dumps(point(2))) + 2))
def test_a_torn_last_line_does_not_count(journal: Journal, cut: int) -> None:
    """Wherever it is cut off, and the next record is on a line of its own."""
    path = journal.folder / "records.jsonl"
    os.truncate(path, path.stat().st_size - cut)
    again = Journal(journal.folder)
    assert again.left == 2
    again.append(point(3))
    assert deliver(Journal(journal.folder)) == [OPEN, point(1), point(3)]


def test_a_line_that_cannot_be_read_hides_no_other(journal: Journal) -> None:
    with (journal.folder / "records.jsonl").open("ab") as file:
        file.write(b"\0\0\0\n[1]\n")
    again = Journal(journal.folder)
    again.append(point(3))
    assert deliver(again) == [OPEN, point(1), point(2), None, None, point(3)]


def test_delivered_records_are_not_delivered_again(journal: Journal) -> None:
    """The next process goes on behind them, and from the start where the note of it got lost in a power cut."""
    journal.made("id")
    journal.delivered(journal.pending(1))
    again = Journal(journal.folder)
    assert (again.run_id, again.left) == ("id", 2)
    assert deliver(again) == [point(1), point(2)]
    (journal.folder / "state.json").write_text("")
    lost = Journal(journal.folder)
    assert (lost.run_id, lost.left, lost.status) == (None, 3, "RUNNING")


@pytest.mark.parametrize("status", ["FINISHED", "FAILED", "KILLED"])
def test_only_a_finished_run_is_dropped(journal: Journal, tmp_path: Path, status: str) -> None:
    """With its files; what is needed to answer for it stays, and it may be taken up again."""
    (tmp_path / "file").write_text("content")
    journal.append({"do": "file"}, file=tmp_path / "file")
    journal.keep_text("words", "words.txt")
    journal.append(END | {"status": status})
    copy = journal.folder / (deliver(journal)[3] or {})["path"]
    again = Journal(journal.folder)
    assert (again.status, again.left) == (status, 0)
    assert again.text("words.txt") == b"words"
    finished = status == "FINISHED"
    assert copy.exists() == (not finished)
    assert again.steps() == ({} if finished else {"loss": {1, 2}})
    again.append(OPEN)
    assert again.status == "RUNNING"
    assert deliver(Journal(journal.folder)) == [OPEN]


def test_a_run_with_something_refused_is_kept_until_it_is_taken(journal: Journal) -> None:
    """What was refused blocks nothing, and is appended once more by the next process."""
    journal.append(END)
    assert deliver(journal, refuse=point(1)) == [OPEN, point(1), point(2), END]
    again = Journal(journal.folder)
    assert (again.left, again.status) == (0, "FINISHED")
    assert again.steps() == {"loss": {1, 2}}
    again.retry_refused()
    assert deliver(again) == [point(1)]
    assert Journal(journal.folder).steps() == {}


@pytest.mark.parametrize("room", [0, 7])
def test_a_full_disk_delays_but_loses_nothing(journal: Journal, room: int, capsys: pytest.CaptureFixture[str]) -> None:
    """Records of that time are kept in memory, said once, and are in order on disk as soon as there is room."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    size = (journal.folder / "records.jsonl").stat().st_size
    resource.setrlimit(resource.RLIMIT_FSIZE, (size + room, limits[1]))
    try:
        for step in (3, 4, 5):
            journal.append(point(step))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert Journal(journal.folder).left == 3
    assert journal.left == 6
    assert capsys.readouterr().out.count("File too large") == 1
    journal.append(END)
    assert deliver(Journal(journal.folder)) == [OPEN, *map(point, (1, 2, 3, 4, 5)), END]


def test_a_file_is_copied_or_named(journal: Journal, tmp_path: Path) -> None:
    """Two files of one name do not meet; one that does not exist keeps its own path."""
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "file").write_text(folder)
        journal.append({"do": "file"}, file=tmp_path / folder / "file")
    journal.append({"do": "file"}, file=tmp_path / "none")
    paths = [journal.folder / record["path"] for record in deliver(journal)[3:] if record]
    assert [path.read_text() for path in paths[:2]] == ["a", "b"]
    assert paths[2] == tmp_path / "none"


def test_an_artifact_that_is_logged_while_the_last_record_is_delivered(
    journal: Journal, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A finished run is dropped once everything is delivered, but never with a copy whose record is about to come."""
    journal.append(END)
    for _ in range(2):
        journal.delivered(journal.pending(1000))
    (tmp_path / "report.html").write_text("report")
    copyfile = shutil.copyfile
    delivery = threading.Thread(target=journal.delivered, args=(journal.pending(1000),))

    def copy(*paths: Any) -> None:
        copyfile(*paths)
        delivery.start()
        delivery.join(0.5)

    monkeypatch.setattr(shutil, "copyfile", copy)
    journal.append({"do": "file"}, file=tmp_path / "report.html")
    delivery.join()
    (entry,) = journal.pending(1000)
    assert entry.record
    assert (journal.folder / entry.record["path"]).read_text() == "report"
