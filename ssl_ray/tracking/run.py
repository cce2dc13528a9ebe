"""One MLflow run that is being written."""

import time
from collections.abc import Mapping
from pathlib import Path

from ssl_ray.tracking.delivery import REFERENCE, Delivery
from ssl_ray.tracking.journal import Journal


class Run:
    """One MLflow run that is being written. Nothing but `logged` ever waits for MLflow, and nothing raises for it."""

    def __init__(self, delivery: Delivery, journal: Journal) -> None:
        self._delivery, self._journal = delivery, journal
        self._steps = journal.steps()

    @property
    def id(self) -> str:
        """MLflow's id once MLflow has made the run; until then a name that serves as `parent` and in tags."""
        return self._journal.run_id or REFERENCE + self._journal.name

    def logged(self, metric: str) -> set[int]:
        """A new set: steps of a metric so far, in the journal and, where it answers within seconds, in MLflow."""
        self._delivery.catch_up(10, self._journal)
        return self._steps[metric] | (self._journal.had or {}).get(metric, set())

    def metrics(self, values: Mapping[str, float], step: int) -> None:
        """Log metrics of a step; what the run has of that step already stays, so that replayed steps count once."""
        new = {key: float(value) for key, value in values.items() if step not in self._steps[key]}
        if new:
            for key in new:
                self._steps[key].add(step)
            self._journal.append({"do": "metrics", "at": now(), "step": step, "values": new})

    def tags(self, values: Mapping[str, str]) -> None:
        """Set tags; a value that is another run's `id` becomes MLflow's id of that run."""
        self._journal.append({"do": "tags", "values": dict(values)})

    def artifact(self, path: Path, folder: str | None = None) -> None:
        """Log a file as it is now."""
        self._journal.append({"do": "file", "folder": folder}, file=path)

    def text(self, text: str, name: str) -> None:
        """Log a text file."""
        path = self._journal.keep_text(text, name)
        self._journal.append({"do": "file", "path": path, "folder": name.rpartition("/")[0] or None})

    def close(self, status: str = "FINISHED") -> None:
        """End the run. `Tracker.settle` tells what MLflow has not got or not taken."""
        self._journal.append({"do": "end", "at": now(), "status": status})


def now() -> int:
    """MLflow's time stamp, milliseconds since 1970."""
    return int(time.time() * 1000)
