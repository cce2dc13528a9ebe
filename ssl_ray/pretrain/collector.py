"""What the workers of a pretraining tell, on its way to MLflow and to the progress bar."""

import json
import math
import re
import threading
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import ray
import ray.exceptions

from ssl_ray.cluster.connect import first_error
from ssl_ray.console import Bar, say
from ssl_ray.pretrain.job import Job
from ssl_ray.text import reason
from ssl_ray.tracking.client import DEVICE
from ssl_ray.tracking.run import Run
from ssl_ray.tracking.tracker import NOTE
from ssl_ray.tracking.view import picture
from ssl_ray.training.meters import RATE, WAIT


class Collector:
    """Takes what workers tell to MLflow, which gets no step twice, and to the progress bar, in a thread of its own.

    What Ray's queue lost, or the driver before, is in the job's file, which is read at the beginning and at the end.
    """

    def __init__(self, job: Job, run: Run, bar: Bar) -> None:
        self._job, self._run, self._bar = job, run, bar
        self._known = run.logged("lr")
        self.fatal: list[str] = []  # what workers said about the steps that ended the training
        self.unlearned = math.nan  # the validation loss of what needs no learning, as it was told last
        sent = iter(job.reports.get, None)
        self._thread = threading.Thread(target=self._collect, args=[sent], daemon=True)

    def __enter__(self) -> "Collector":
        self._collect(self._kept())
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        with suppress(ray.exceptions.RayError):  # the queue is an actor, and may be gone
            self._job.reports.put(None)
        self._thread.join()
        self._collect(self._kept())
        self._job.reports.shutdown()

    def _kept(self) -> Iterator[tuple[str, Any]]:
        with suppress(OSError):  # the object store may be away; every later start reads the file again
            if self._job.mirror.pull(self._job.records):
                for line in self._job.records.read_bytes().split(b"\n"):
                    with suppress(ValueError):  # a killed worker's last line, or one that is being written
                        yield "kept", json.loads(line)

    def _collect(self, items: Iterator[tuple[str, Any]]) -> None:
        told = False
        end: tuple[str, Any] = "end", None
        while True:
            try:
                kind, content = next(items, end)
                match kind:
                    case "end":
                        return
                    case "started":
                        step, device = content
                        self._run.started(step)
                        self._run.tags({DEVICE: device})
                        self._bar.update(step, again=True)
                    case "record" | "kept":
                        step, path = int(content["step"]), content.pop("picture", None)
                        self.unlearned = unlearned(content, self.unlearned)
                        numbers = {name: value for name, value in content.items() if name != "step"}
                        new = step not in self._known
                        if new or kind == "record":  # steps that are done again are shown; the file tells old ones, too
                            self._run.metrics(numbers, step)
                            self._bar.update(step, progress(content))
                        if new:
                            self._known.add(step)
                            self._log_picture(path, numbers)
                    case "skipped":
                        say(f"WARNING: not finite, skipped: {content}")
                    case "fatal":
                        self.fatal.append(content)
            except ray.exceptions.RayError as error:
                say(f"WARNING: {first_error(str(error)) or error}; metrics follow at the end from {self._job.records}")
                return
            except Exception as error:  # one record that cannot be logged must not end the logging of the others
                if not told:
                    say(f"WARNING: a metric is not logged: {reason(error)}")
                told = True

    def _log_picture(self, path: str | None, numbers: Mapping[str, float]) -> None:
        # Without its picture a run goes on; a fault of the object store is raised where it matters.
        with suppress(OSError):
            if path and (Path(path).is_file() or self._job.mirror.pull(Path(path))):
                self._run.artifact(Path(path), "pictures")
                self._run.tags({NOTE: describe(self._job, self._run.id, f"pictures/{Path(path).name}", numbers)})


def unlearned(numbers: Mapping[str, float], otherwise: float = math.nan) -> float:
    """The validation loss of what the task can predict without learning, where it is among the numbers."""
    return next((value for name, value in numbers.items() if re.fullmatch("validation_.*_loss", name)), otherwise)


def progress(record: Mapping[str, float]) -> str:
    """What the progress bar says of a record."""
    facts = f"loss {record.get('loss', math.nan):.4f}, {record[RATE]:.0f} patches/s"
    if record[WAIT] >= 5:
        facts += f", waits for data {record[WAIT]:.0f}%"
    if "validation_loss" in record:
        facts += f", validation {record['validation_loss']:.4f}"
    return facts


def describe(job: Job, run_id: str, path: str, numbers: Mapping[str, float]) -> str:
    """A pretraining in Markdown, with the picture of this path that it has made last, at a step with these numbers."""
    settings, steps = job.recipe.settings, job.training.table.steps
    shown = "A patch that it has not trained on, what the network saw of it, and what it made of that"
    return (
        f"{settings.task.kind.capitalize()} on {len(job.training.keys)} unlabelled volumes for {steps:,} steps. "
        f"**Validation loss {numbers.get('validation_loss', math.nan):.4f}** where this picture was made, and the "
        f"weights with the lowest are kept; what needs no learning leaves {unlearned(numbers):.4f}.\n\n"
        f"{picture(run_id, path, shown)}"
    )
