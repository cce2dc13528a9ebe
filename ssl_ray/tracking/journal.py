"""What a run writes to MLflow, kept on local disk until MLflow has it.

A run's folder holds
  records.jsonl   one record a line, append-only; a record is on disk before the call that made it returns
  state.json      MLflow's id of the run, how many bytes of the records MLflow has, and the status that they end with
  refused.jsonl   records that MLflow refused, each with the reason
  files/          copies of artifacts as they were when they were logged
  texts/          texts, which are also read from here while MLflow is away

When MLflow has everything of a finished run, its records and files are dropped. A run of any other status keeps them,
since it may be taken up again. A line without its end was cut off in mid-write and never acknowledged: it is ignored.
"""

import contextlib
import json
import os
import shutil
import threading
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from itertools import islice, takewhile
from pathlib import Path
from typing import Any, NamedTuple

from ssl_ray.console import say
from ssl_ray.storage.files import appearing

Record = dict[str, Any]


class Entry(NamedTuple):
    """A record, None where its line cannot be read, and the byte behind its line."""

    end: int
    record: Record | None


class Journal:
    """The journal of one run: one thread may append while another delivers.

    Attributes:
        run_id: MLflow's id of the run, None until MLflow has made it.
        status: what was written last: RUNNING, FINISHED, FAILED or KILLED; None before anything was.
        left: number of records that MLflow has not got yet.
        had: steps of every metric that MLflow had when this process met the run, which another machine may have
            written; None until then.
    """

    def __init__(self, folder: Path, appended: Callable[[], None] = lambda: None) -> None:
        """Args:
        folder: of the run; its name is the run's name.
        appended: called after every append.
        """
        self.folder, self.name, self._appended = folder, folder.name, appended
        self._records, self._state = folder / "records.jsonl", folder / "state.json"
        self._refused = folder / "refused.jsonl"
        self._lock = threading.Lock()
        self._unwritten: list[bytes] = []
        self._full = False
        try:
            state = json.loads(self._state.read_text())
        except (FileNotFoundError, ValueError):  # a power cut may leave it empty; sending everything again is harmless
            state = {}
        self.run_id: str | None = state.get("run_id")
        self.status: str | None = state.get("status")
        self._sent_status = self.status
        size = self._records.stat().st_size if self._records.exists() else 0
        self._offset = self._end = min(int(state.get("offset", 0)), size)  # a power cut may lose records' last bytes
        self.had: dict[str, set[int]] | None = None
        self.left = 0
        for entry in self._entries(self._offset):
            self._end = entry.end
            self.left += 1
            self.status = _status(entry.record) or self.status

    def append(self, record: Record, file: Path | None = None) -> None:
        """Keep a record, with a copy of the file that it is about, which may change or vanish.

        On a full disk the record stays in memory until there is room again, and the file where it is.
        """
        with self._lock:  # held from copy to record, so that nobody finds everything delivered and drops the copy
            if file:
                record = record | {"path": self._copy(file)}
            self._unwritten.append(json.dumps(record).encode() + b"\n")
            self.left += 1
            self.status = _status(record) or self.status
            self._write()
        self._appended()

    def _copy(self, file: Path) -> str:
        home = self.folder / "files" / f"{self._end}-{len(self._unwritten)}"
        try:
            home.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(file, home / file.name)
        except OSError:
            return str(file.absolute())
        return str((home / file.name).relative_to(self.folder))

    def _write(self) -> None:
        data = b"".join(self._unwritten)
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with self._records.open("ab", buffering=0) as file:
                file.truncate(self._end)  # half a line may be there, of a process that was killed or of a full disk
                written = 0
                while written < len(data):
                    written += file.write(data[written:])
        except OSError as error:
            if not self._full:
                say(f"{self._records}: cannot be written ({error.strerror}); what MLflow has to get is kept in memory")
            self._full = True
            return
        self._end += len(data)
        self._unwritten.clear()
        self._full = False

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
        """The oldest records that MLflow has not got yet: up to `limit` of metrics, or one of anything else."""
        with self._lock:
            if self._unwritten:
                self._write()
            entries = list(islice(self._entries(self._offset), limit))
        metrics = takewhile(lambda entry: entry.record is not None and entry.record["do"] == "metrics", entries)
        return list(metrics) or entries[:1]

    def delivered(self, entries: list[Entry], refused: Iterable[tuple[Record, str]] = ()) -> None:
        """MLflow has these records, the oldest of those that were pending, but for what it refused and why."""
        with self._lock:
            self._offset = entries[-1].end
            self.left -= len(entries)
            for entry in entries:
                self._sent_status = _status(entry.record) or self._sent_status
            with contextlib.suppress(OSError):  # a full disk: what is not noted is sent again by the next process
                for record, why in refused:
                    with self._refused.open("a") as file:
                        file.write(json.dumps({"why": why, "record": record}) + "\n")
                self._save(self._offset)
                if self.status == "FINISHED" and not self.left and not self._refused.exists():
                    self._save(0)  # first, for an offset must never point into records that are written later
                    os.truncate(self._records, 0)
                    self._offset = self._end = 0
                    shutil.rmtree(self.folder / "files", ignore_errors=True)

    def retry_refused(self) -> None:
        """Append again what MLflow refused, for its reason may be mended by now."""
        if self._refused.exists():
            for line in self._refused.read_text().splitlines():
                with contextlib.suppress(ValueError):  # cut off in mid-write: the record itself is still pending
                    self.append(json.loads(line)["record"])
            self._refused.unlink()

    def made(self, run_id: str) -> None:
        """MLflow has made the run."""
        with self._lock:
            self.run_id = run_id
            with contextlib.suppress(OSError):  # a full disk: the next process finds the run by its key
                self._save(self._offset)

    def forget(self) -> None:
        """The run is not in MLflow any more: everything is to be delivered again, to another run."""
        with self._lock:
            self.run_id, self.had, self._sent_status, self._offset = None, None, None, 0
            self.left = sum(1 for _ in self._entries(0)) + len(self._unwritten)
            with contextlib.suppress(OSError):
                self._refused.unlink(missing_ok=True)  # the records have it, too
                self._save(0)

    def _save(self, offset: int) -> None:
        with appearing(self._state) as part:
            part.write_text(json.dumps({"run_id": self.run_id, "offset": offset, "status": self._sent_status}))

    def _entries(self, start: int) -> Iterator[Entry]:
        if not self._records.exists():
            return
        with self._records.open("rb") as file:
            file.seek(start)
            for line in file:
                if not line.endswith(b"\n"):
                    return
                start += len(line)
                try:
                    record = json.loads(line)
                except ValueError:
                    record = None
                yield Entry(start, record if isinstance(record, dict) and "do" in record else None)


def _status(record: Record | None) -> str | None:
    """The run's status after a record; None where the record leaves it as it was."""
    if record is None or record["do"] not in ("open", "end"):
        return None
    return str(record.get("status", "RUNNING"))
