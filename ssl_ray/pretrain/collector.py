"""The driver's end of what a run reports: records from Ray's queue to MLflow and to the progress bar."""

import math
import threading
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

from ray.util.queue import Queue

from ssl_ray.console import Bar, say
from ssl_ray.storage.mirror import Mirror
from ssl_ray.tracking.tracker import Run
from ssl_ray.training.meters import ObjectStore, as_system


class Collector:
    """A thread that empties the queue; a step that MLflow has already is not logged again."""

    def __init__(self, reports: Queue, run: Run, bar: Bar, mirror: Mirror) -> None:
        self._reports, self._run, self._bar, self._mirror = reports, run, bar, mirror
        self._known, self._starts = run.logged("lr"), len(run.logged("started_at"))
        self._store = ObjectStore()
        self.fatal: list[str] = []  # what workers said about the steps that ended the training
        self._thread = threading.Thread(target=self._collect, daemon=True)

    def __enter__(self) -> "Collector":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._reports.put(None)
        self._thread.join()
        self._reports.shutdown()

    def _collect(self) -> None:
        while (item := self._reports.get()) is not None:
            kind, content = item
            if kind == "started":
                self._started(content)
            elif kind == "skipped":
                say(f"WARNING: not finite, skipped: {content}")
            elif kind == "fatal":
                self.fatal.append(content)
            for record in content if kind == "records" else ():
                step, picture = int(record.pop("step")), record.pop("picture", None)
                if step not in self._known:
                    self._known.add(step)
                    self._run.metrics(record | as_system(record) | self._store.sample(), step)
                    if picture:
                        self._log_picture(Path(picture))
                self._bar.update(step, progress(record))

    def _started(self, step: int) -> None:
        """Log the step that training goes on from: 0, and after every fault that of a checkpoint."""
        replayed = max(0, max(self._known, default=0) - step)
        self._run.metrics({"started_at": step, "replayed_steps": replayed}, self._starts)
        self._starts += 1
        self._store.sample()  # what was spilled before is not this run's
        self._bar.update(step, again=True)

    def _log_picture(self, path: Path) -> None:
        # Without its picture a run goes on; a fault of the object store is raised where it matters.
        with suppress(OSError):
            if path.is_file() or self._mirror.pull(path):
                self._run.artifact(path, "pictures")


def progress(record: Mapping[str, float]) -> str:
    """What the progress bar says of a record."""
    facts = f"loss {record.get('loss', math.nan):.4f}, {record['patches_per_second']:.0f} patches/s"
    if record["data_wait_share"] >= 0.05:
        facts += f", waits for data {record['data_wait_share']:.0%}"
    if "validation_loss" in record:
        facts += f", validation {record['validation_loss']:.4f}"
    return facts
