"""What a run writes to MLflow, kept on local disk until MLflow has it.

A run's folder holds `records.jsonl` (append-only; a record is there before the call that made it returns),
`delivered.json` (how far MLflow has it; replaced as a whole), `files/` (copies of artifacts) and `texts/`. What a
finished run has delivered is dropped, but for `delivered.json` and the texts; of other runs it is kept, since they may
be taken up again. A record that was cut off in mid-write was never acknowledged and does not count.
"""

import contextlib
import json
import os
import shutil
import threading
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ssl_ray.console import say
from ssl_ray.storage.files import appearing


@dataclass(frozen=True)
class Entry:
    """One record and where it lies in the file: bytes `start` to `end`. `record` is None where it cannot be read."""

    start: int
    end: int
    record: dict[str, Any] | None


class Journal:
    """The journal of one run; one thread may append while another delivers.

    Attributes:
        run_id: MLflow's id of the run, None until MLflow has made it.
        status: what was written last: RUNNING, FINISHED, FAILED or KILLED; None before anything was.
        refused: what MLflow did not take, by the place of its record, with the reason.
        left: records that MLflow has not got yet.
    """

    def __init__(self, folder: Path) -> None:
        self.folder, self.name = folder, folder.name
        self._path = folder / "records.jsonl"
        self._lock = threading.Lock()
        self._file: int | None = None
        self._unwritten: list[bytes] = []
        try:
            state = json.loads((folder / "delivered.json").read_text())
        except (FileNotFoundError, ValueError):  # empty after a power cut: delivered again, and found there
            state = {}
        self.run_id: str | None = state.get("run_id")
        self.status: str | None = state.get("status")
        self._sent_status = self.status
        self.refused: dict[int, str] = {int(start): reason for start, reason in state.get("refused", {}).items()}
        size = self._path.stat().st_size if self._path.exists() else 0
        offset = state.get("offset", 0)
        self._offset = offset if offset <= size else 0  # cut off between emptying the file and saying so
        self.left = 0
        for entry in self._entries(self._offset):
            self.left += 1
            self.status = _status(entry.record) or self.status

    def append(self, record: dict[str, Any]) -> None:
        """Keep a record; on a full disk in memory, until there is room again."""
        with self._lock:
            self._unwritten.append(json.dumps(record).encode() + b"\n")
            self.left += 1
            self.status = _status(record) or self.status
            self._write()
            if record["do"] == "end" and self._file is not None and not self._unwritten:
                os.close(self._file)
                self._file = None

    def _write(self) -> None:
        told = len(self._unwritten) > 1
        size = None
        try:
            if self._file is None:
                self.folder.mkdir(parents=True, exist_ok=True)
                self._file = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_APPEND)
                self._drop_torn_line(self._file)
            size = os.fstat(self._file).st_size
            data = b"".join(self._unwritten)
            while data:
                data = data[os.write(self._file, data) :]
            self._unwritten.clear()
        except BaseException as error:  # Ctrl-C in the middle, too, must leave whole lines
            if self._file is not None and size is not None:
                os.ftruncate(self._file, size)
            if not isinstance(error, OSError):
                raise
            if not told:
                say(f"{self._path}: cannot be written ({error.strerror}); what MLflow has to get is kept in memory")

    @staticmethod
    def _drop_torn_line(file: int) -> None:
        size = end = os.fstat(file).st_size
        while end and os.pread(file, 1, end - 1) != b"\n":
            end -= 1
        if end < size:
            os.ftruncate(file, end)

    def keep_file(self, path: Path) -> str:
        """Copy an artifact, which may change or vanish -> path of the copy in the run's folder.

        Where there is no room (or no such file), its own path: it is delivered if it is still there by then.
        """
        with self._lock:
            home = self.folder / "files" / f"{self._size()}-{len(self._unwritten)}"
        try:
            home.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, home / path.name)
        except OSError:
            return str(path.absolute())
        return str((home / path.name).relative_to(self.folder))

    def _size(self) -> int:
        return self._path.stat().st_size if self._path.exists() else 0

    def keep_text(self, text: str, name: str) -> str:
        """Keep a text, also when MLflow has it -> its path in the run's folder."""
        path = self.folder / "texts" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        with appearing(path) as part:
            part.write_text(text)
        return str(path.relative_to(self.folder))

    def text(self, name: str) -> bytes | None:
        """A text that was kept, or None."""
        path = self.folder / "texts" / name
        return path.read_bytes() if path.is_file() else None

    def steps(self) -> dict[str, set[int]]:
        """Steps of every metric, as far as the journal still has them."""
        found: dict[str, set[int]] = defaultdict(set)
        for entry in self._entries(0):
            if entry.record and entry.record["do"] == "metrics":
                for name in entry.record["values"]:
                    found[name].add(entry.record["step"])
        return found

    def pending(self, limit: int) -> list[Entry]:
        """The oldest records that MLflow has not got yet."""
        if self._unwritten:
            with self._lock:
                self._write()
        return [entry for entry, _ in zip(self._entries(self._offset), range(limit), strict=False)]

    def at(self, start: int) -> Entry | None:
        """The record at a place, None where the file has no such place any more."""
        return next(self._entries(start), None)

    def delivered(self, entries: Sequence[Entry], refused: Mapping[int, str]) -> None:
        """MLflow has these records, the oldest of those that were pending, but for what it refused."""
        with self._lock:
            self._offset = entries[-1].end
            self.left -= len(entries)
            self.refused |= refused
            for entry in entries:
                self._sent_status = _status(entry.record) or self._sent_status
            self._drop_if_done()
        self.save()

    def settle(self, start: int) -> None:
        """MLflow has what it refused before."""
        with self._lock:
            self.refused.pop(start, None)
            self._drop_if_done()
        self.save()

    def _drop_if_done(self) -> None:
        if self.status == "FINISHED" and not self.left and not self.refused:
            with contextlib.suppress(FileNotFoundError):
                os.truncate(self._path, 0)
            shutil.rmtree(self.folder / "files", ignore_errors=True)
            self._offset = 0

    def forget(self) -> None:
        """The run is not in MLflow any more: everything is to be delivered again."""
        with self._lock:
            self.run_id, self._sent_status, self._offset, self.refused = None, None, 0, {}
            self.left = sum(1 for _ in self._entries(0)) + len(self._unwritten)
        self.save()

    def save(self) -> None:
        """Write down how far MLflow has it; only for the thread that delivers."""
        with self._lock:
            state = {"run_id": self.run_id, "offset": self._offset, "status": self._sent_status}
            text = json.dumps(state | {"refused": self.refused})
        # On a full disk: delivered again after a restart, and found there.
        with contextlib.suppress(OSError), appearing(self.folder / "delivered.json") as part:
            part.write_text(text)

    def _entries(self, start: int) -> Iterator[Entry]:
        if not self._path.exists():
            return
        with self._path.open("rb") as file:
            file.seek(start)
            for line in file:
                if not line.endswith(b"\n"):
                    return
                try:
                    record = json.loads(line)
                except ValueError:
                    record = None
                yield Entry(start, start + len(line), record if isinstance(record, dict) and "do" in record else None)
                start += len(line)


def _status(record: Mapping[str, Any] | None) -> str | None:
    """The run's status after a record; None where the record leaves it as it was."""
    if record is None or record["do"] not in ("open", "end"):
        return None
    return str(record.get("status", "RUNNING"))
