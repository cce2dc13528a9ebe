"""The journal on disk: nothing that was acknowledged is lost, nothing torn counts, nothing delivered stays for ever."""

import errno
import json
import os

import pytest

from ssl_ray.tracking.journal import Journal

OPEN, END = {"do": "open"}, {"do": "end", "status": "FINISHED"}


def point(step, **values):
    return {"do": "metrics", "step": step, "at": 1, "values": values or {"loss": float(step)}}


def records(journal, limit=1000):
    return [entry.record for entry in journal.pending(limit)]


@pytest.fixture
def journal(tmp_path):
    journal = Journal(tmp_path / "trial-key")
    for record in (OPEN, point(1), point(2)):
        journal.append(record)
    return journal


def test_what_was_appended_is_there_for_the_next_process(journal):
    """In order, non-finite numbers too."""
    journal.append(point(3, loss=float("inf"), dice=float("-inf")))
    again = Journal(journal.folder)
    assert records(again) == [OPEN, point(1), point(2), point(3, loss=float("inf"), dice=float("-inf"))]
    assert again.left == 4
    assert again.status == "RUNNING"
    assert again.steps() == {"loss": {1, 2, 3}, "dice": {3}}


@pytest.mark.parametrize("cut", range(1, len(json.dumps(point(2))) + 2))
def test_a_torn_last_line_does_not_count(journal, cut):
    """Wherever it is cut off, and the next record stands on a line of its own."""
    path = journal.folder / "records.jsonl"
    os.truncate(path, path.stat().st_size - cut)
    again = Journal(journal.folder)
    assert records(again) == [OPEN, point(1)]
    assert again.left == 2
    again.append(point(3))
    assert records(again) == records(Journal(journal.folder)) == [OPEN, point(1), point(3)]


def test_a_line_that_cannot_be_read_hides_no_other(journal):
    """It has its place among the records, without content."""
    with (journal.folder / "records.jsonl").open("ab") as file:
        file.write(b"\0\0\0\n[1]\n")
    again = Journal(journal.folder)
    again.append(point(3))
    assert records(again) == [OPEN, point(1), point(2), None, None, point(3)]


def test_delivered_records_are_not_delivered_again(journal):
    """The next process goes on behind them, and does from the start where the note of it got lost."""
    journal.run_id = "id"
    journal.delivered(journal.pending(2), {})
    again = Journal(journal.folder)
    assert (again.run_id, again.left, records(again)) == ("id", 1, [point(2)])
    (journal.folder / "delivered.json").write_text("")
    lost = Journal(journal.folder)
    assert (lost.run_id, lost.left, lost.status) == (None, 3, "RUNNING")


@pytest.mark.parametrize("status", ["FINISHED", "FAILED", "KILLED"])
def test_only_a_finished_run_is_dropped(journal, tmp_path, status):
    """With its files; what is needed to answer for it stays, and it may be taken up again."""
    (tmp_path / "file").write_text("content")
    kept = journal.folder / journal.keep_file(tmp_path / "file")
    journal.keep_text("words", "words.txt")
    journal.append(END | {"status": status})
    journal.delivered(journal.pending(10), {})
    again = Journal(journal.folder)
    assert (again.status, again.left) == (status, 0)
    assert again.text("words.txt") == b"words"
    finished = status == "FINISHED"
    assert kept.exists() == (not finished)
    assert ((journal.folder / "records.jsonl").stat().st_size == 0) == finished
    for one in (journal, again):
        one.append(OPEN)
        assert records(one)[0] == OPEN
        assert one.status == "RUNNING"


def test_a_run_with_something_refused_is_kept_until_it_is_taken(journal):
    """And then dropped."""
    journal.append(END)
    entries = journal.pending(10)
    journal.delivered(entries, {entries[1].start: "no"})
    again = Journal(journal.folder)
    assert again.refused == {entries[1].start: "no"}
    entry = again.at(entries[1].start)
    assert entry.record == point(1)
    again.settle(entry.start)
    assert (journal.folder / "records.jsonl").stat().st_size == 0
    assert Journal(journal.folder).refused == {}


@pytest.mark.parametrize("written", [0, 7])
def test_a_full_disk_delays_but_loses_nothing(journal, monkeypatch, capsys, written):
    """Records of that time are kept in memory, said once, and are in order on disk as soon as there is room."""
    whole, full = os.write, True

    def write(file, data):
        nonlocal written
        if not full:
            return whole(file, data)
        if written:
            count, written = whole(file, data[:written]), 0
            return count
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "write", write)
    for step in (3, 4, 5):
        journal.append(point(step))
    assert records(Journal(journal.folder)) == [OPEN, point(1), point(2)]
    assert journal.left == 6
    assert capsys.readouterr().out.count("No space left on device") == 1
    full = False
    journal.append(END)
    assert records(Journal(journal.folder)) == [OPEN, *map(point, (1, 2, 3, 4, 5)), END]


def test_a_file_is_copied_or_named(journal, tmp_path):
    """Two files of one name do not meet; one that does not exist keeps its own path."""
    paths = []
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "file").write_text(folder)
        path = journal.keep_file(tmp_path / folder / "file")
        journal.append({"do": "file", "path": path})
        paths.append(path)
    assert [(journal.folder / path).read_text() for path in paths] == ["a", "b"]
    assert journal.keep_file(tmp_path / "none") == str(tmp_path / "none")
