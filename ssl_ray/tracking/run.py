"""One MLflow run that is being written. What is logged goes into a journal on local disk, and from there to MLflow.

A run's folder holds
  records.jsonl   one record a line, append-only; a record is on disk before the call that made it returns
  state.json      MLflow's id of the run, and how many of the records MLflow has
  refused.jsonl   records that MLflow refused or could not store, each with the reason, for a person to look at
  files/          copies of files as they were when they were logged, until MLflow has them; N-refused: it never will

A line without its end was cut off in mid-write and never acknowledged: it is ignored.
"""

import json
import shutil
import time
from collections import defaultdict, deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from threading import Condition
from typing import Any

from ssl_ray.console import say
from ssl_ray.storage.files import appearing
from ssl_ray.text import without_password

Record = dict[str, Any]
REFERENCE = "ssl-ray:"
"""Begins the name that a run goes by until MLflow has given it an id; resolved in values of tags."""

_VALUES = 1000
"""How many metrics MLflow takes in one request."""

FILE_TRIES = 10
"""So often, in about two minutes, does a process try a file that cannot be stored although MLflow answers."""


@dataclass(frozen=True)
class NetworkFile:
    """A file of weights that a run has made, as the journal refers to it.

    name: of the model.
    digest: of the file, as `file_digest` gives it.
    step: at which the weights were selected.
    segments: whether `predict(array, params)` gives labels on the grid of the array; if not, it gives a vector.
    channels: of the array, (X, Y, Z) or (C, X, Y, Z), of intensities as scanned.
    spacing: mm, along RAS axes, of an array that comes without an affine.
    """

    name: str
    weights: str
    digest: str
    step: int
    segments: bool
    channels: int
    spacing: tuple[float, float, float]


@dataclass
class Logged:
    """What a run has logged so far, as its journal or MLflow has it.

    `status` is RUNNING, FINISHED, FAILED or KILLED, as logged last: a process that was killed leaves RUNNING. `opened`
    and `heard` are seconds since 1970, of the last start and of the last record. `step` is the last that has a learning
    rate, or the one that is being replayed; `metrics` has the last value of each. `delivered`: MLflow has all of it.
    """

    kind: str = ""
    key: str = ""
    name: str = ""
    status: str = ""
    opened: float = 0.0
    heard: float = 0.0
    step: int = 0
    metrics: dict[str, float] = field(default_factory=dict)
    params: dict[str, str] = field(default_factory=dict)
    tags: dict[str, str] = field(default_factory=dict)
    delivered: bool = True


class Run:
    """One MLflow run that is being written: nothing here waits for MLflow, and nothing raises for it.

    Attributes:
        run_id: MLflow's id of the run, None until MLflow has made it.
        summary: what is in its journal; `delivered` is not kept up.
        waiting: records that MLflow has not got yet.
        tries: how often the oldest of them, a file, could not be stored although MLflow answers.
        due: when it is tried again, by the monotonic clock.
    """

    def __init__(self, folder: Path, wake: Condition) -> None:
        """The run whose journal is in `folder`, of which it has its name; `wake`'s waiters hear of each record."""
        self.folder, self.name, self._wake = folder, folder.name, wake
        self._records, self._state = folder / "records.jsonl", folder / "state.json"
        self._told_unwritable = False
        try:
            state = json.loads(self._state.read_text())
        except (FileNotFoundError, ValueError):
            # A power cut may leave it empty: everything is sent again but the files, whose copies are gone.
            state = {}
        self.run_id: str | None = state.get("run_id")
        self.summary = Logged()
        self.tries, self.due = 0, 0.0
        self.waiting: deque[Record] = deque()
        self._steps: dict[str, set[int]] = defaultdict(set)
        content = self._records.read_bytes() if self._records.exists() else b""
        *lines, torn = content.split(b"\n")
        self._end = len(content) - len(torn)
        self._unwritten = b""  # lines that found no room on the disk yet
        for line in lines:
            try:
                self._note(dict(json.loads(line)))
            except (ValueError, TypeError, KeyError):
                self._note({"do": "unreadable"})
        self._sent = min(int(state.get("sent", 0)), len(lines))  # a power cut may lose the last records
        sent = [self.waiting.popleft() for _ in range(self._sent)]
        # A file that an earlier process put aside has its copy still, and is tried again.
        aside = [record for record in sent if "path" in record and (folder / record["path"]).exists()]
        self.waiting.extendleft(reversed(aside))
        self._sent -= len(aside)

    def _note(self, record: Record) -> None:
        summary, at = self.summary, record.get("at", 0) / 1000
        summary.heard = max(summary.heard, at)
        match record["do"]:
            case "metrics":
                for metric in record["values"]:
                    self._steps[metric].add(record["step"])
                summary.metrics |= record["values"]
                summary.step = max(summary.step, record["step"] if "lr" in record["values"] else 0)
            case "params":
                summary.params = record["values"] | summary.params
            case "tags":
                summary.tags |= record["values"]
            case "open":
                summary.status, summary.opened = "RUNNING", at
                summary.kind, summary.key, summary.name = (record.get(part, "") for part in ("kind", "key", "name"))
                for metric, steps in record.get("known", {}).items():
                    self._steps[metric].update(steps)
            case "replayed":
                summary.step = record["step"]
            case "end":
                summary.status = record["status"]
        self.waiting.append(record)

    @property
    def id(self) -> str:
        """MLflow's id once MLflow has made the run; until then a name that serves as `parent` and in tags."""
        return self.run_id or REFERENCE + self.name

    def logged(self, metric: str) -> set[int]:
        """A new set: steps of a metric so far."""
        return set(self._steps[metric])

    def metrics(self, values: Mapping[str, float], step: int, of: Mapping[str, Sequence[str]] | None = None) -> None:
        """Log metrics of a step; what the run has of that step already stays, so that replayed steps count once.

        A training step that is replayed is noted for `ssl-ray status` alone.
        `of`: they are of the run's model, and those whose names begin with a key of it are of that dataset, which has
        this name and digest.
        """
        new = {key: float(value) for key, value in values.items() if step not in self._steps[key]}
        if new:
            tied = {} if of is None else {"of": {key: list(value) for key, value in of.items()}}
            self.append({"do": "metrics", "at": now(), "step": step, "values": new, **tied})
        elif "lr" in values:
            self.append({"do": "replayed", "at": now(), "step": step})

    def started(self, step: int) -> None:
        """Log the step that a training goes on from: 0, and after every fault that of a checkpoint."""
        replayed = max(0, max(self._steps["lr"], default=0) - step)
        values = {"system/started_at": step, "system/replayed_steps": replayed}
        self.metrics(values, len(self._steps["system/started_at"]))

    def params(self, values: Mapping[str, Any]) -> None:
        """Set parameters; those that the run has already stay as they are."""
        self.append({"do": "params", "values": {key: str(value)[:6000] for key, value in values.items()}})  # its limit

    def tags(self, values: Mapping[str, str]) -> None:
        """Set tags, without passwords; where another run's `id` is in a value, it becomes MLflow's id of that run."""
        self.append({"do": "tags", "values": {key: without_password(value) for key, value in values.items()}})

    def artifact(self, path: Path, folder: str | None = None) -> None:
        """Log a file as it is now."""
        self.append({"do": "file", "folder": folder, "name": path.name}, path)

    def text(self, text: str, name: str) -> None:
        """Log a text file, without passwords."""
        self.append({"do": "file", "folder": None, "name": name}, without_password(text))

    def datasets(self, values: Sequence[Mapping[str, Any]]) -> None:
        """Log what the run has read, each as `ssl_ray.tracking.models.told` tells it."""
        self.append({"do": "datasets", "values": {one["context"]: one for one in values}})

    def model(self, made: NetworkFile) -> None:
        """Log a network that the run has made; its file has to stay where it is until MLflow has it."""
        self.append({"do": "model", "name": "model.json"}, json.dumps(asdict(made)))

    def close(self, status: str = "FINISHED") -> None:
        """End the run. `Tracker.settle` tells what MLflow has not got."""
        self.append({"do": "end", "at": now(), "status": status})

    def append(self, record: Record, content: Path | str | None = None) -> None:
        """Keep a record, with a copy of its file or text; without room on the disk in memory only, and no file."""
        with self._wake:
            line = b""
            try:
                if content is not None:
                    copy = self.folder / "files" / str(self._end + len(self._unwritten)) / record["name"]
                    copy.parent.mkdir(parents=True, exist_ok=True)
                    copy.write_text(content) if isinstance(content, str) else shutil.copyfile(content, copy)
                    record = record | {"path": str(copy.relative_to(self.folder))}
                line = json.dumps(record).encode() + b"\n"
                self._unwritten += line
                self.folder.mkdir(parents=True, exist_ok=True)
                with self._records.open("ab") as file:
                    file.truncate(self._end)  # half a line may be there, of a killed process or of a full disk
                    file.write(self._unwritten)
                self._end += len(self._unwritten)
                self._unwritten = b""
            except OSError as error:
                if not self._told_unwritable:
                    place = error.filename or self._records
                    say(f"run {self.name}: MLflow may not get everything ({place}: {error.strerror})")
                self._told_unwritable = True
            if line:
                self._note(record)
                self._wake.notify_all()

    def pending(self) -> list[Record]:
        """The oldest records that MLflow has not got yet: metrics for one request, or one record of anything else."""
        batch: list[Record] = []
        values = 0
        with self._wake:
            for record in self.waiting:
                values += len(record["values"]) if record["do"] == "metrics" else _VALUES
                if batch and values > _VALUES:
                    break
                batch.append(record)
        return batch

    def delivered(self, batch: Sequence[Record], refused: Sequence[tuple[Record, str]] = ()) -> None:
        """MLflow has these records, the oldest of those that were pending, but for what it refused and why."""
        with self._wake:
            self._sent += len(batch)
            if refused:
                path = self.folder / "refused.jsonl"
                if not path.exists():
                    say(f"MLflow refused something of run {self.name}: {refused[0][1]}; it is kept in {path}")
                with suppress(OSError), path.open("a") as file:
                    file.writelines(json.dumps({"why": why, "record": record}) + "\n" for record, why in refused)
            for _ in batch:
                self.waiting.popleft()
            self.save()
            for record in batch:
                if "path" in record:
                    copy = (self.folder / record["path"]).parent
                    if not refused:
                        shutil.rmtree(copy, ignore_errors=True)
                    elif self.tries < FILE_TRIES:  # MLflow's own word: no process is to try it again
                        with suppress(OSError):
                            copy.rename(f"{copy}-refused")
            self.tries = 0

    def save(self) -> None:
        """Note what MLflow has; on a full disk the next process finds the run by its key and sends all of it again."""
        on_disk = self._sent + len(self.waiting) - self._unwritten.count(b"\n")
        with suppress(OSError), appearing(self._state) as part:
            part.write_text(json.dumps({"run_id": self.run_id, "sent": min(self._sent, on_disk)}))


def now() -> int:
    """MLflow's time stamp, milliseconds since 1970."""
    return int(time.time() * 1000)


@contextmanager
def ending(run: Run) -> Iterator[None]:
    """End a run with what is done within, as killed after Ctrl-C, as failed after any other error."""
    try:
        yield
    except BaseException as error:
        run.close("KILLED" if isinstance(error, KeyboardInterrupt) else "FAILED")
        raise
    run.close()
