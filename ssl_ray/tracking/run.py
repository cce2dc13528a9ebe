"""One MLflow run that is being written."""

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ssl_ray.tracking.delivery import Away, Delivery
from ssl_ray.tracking.journal import Journal
from ssl_ray.tracking.sender import REFERENCE


class Run:
    """One MLflow run that is being written. Nothing but `logged` ever waits for MLflow, and nothing raises for it."""

    def __init__(self, delivery: Delivery, journal: Journal) -> None:
        self._delivery, self._journal = delivery, journal
        self._steps = journal.steps()
        self._asked: set[str] = set()

    @property
    def id(self) -> str:
        """MLflow's id once MLflow has made the run; until then a name that serves as `parent` and in tags."""
        return self._journal.run_id or REFERENCE + self._journal.name

    def logged(self, metric: str) -> set[int]:
        """Steps of a metric so far, in the journal and, where it answers within seconds, in MLflow."""
        delivery, journal = self._delivery, self._journal
        if metric not in self._asked:
            delivery.catch_up(10, journal)
            if journal.run_id and not delivery.sender.is_new(journal):
                try:
                    points = delivery.ask(lambda: delivery.sender.client.get_metric_history(journal.run_id, metric), 20)
                    self._steps[metric] |= {point.step for point in points}
                except Away:
                    return self._steps[metric]
            self._asked.add(metric)
        return self._steps[metric]

    def metrics(self, values: Mapping[str, float], step: int) -> None:
        """Log metrics of a step; what the run has of that step already stays, so that replayed steps count once."""
        new = {key: float(value) for key, value in values.items() if step not in self._steps[key]}
        if new:
            for key in new:
                self._steps[key].add(step)
            self._append(do="metrics", at=now(), step=step, values=new)

    def tags(self, values: Mapping[str, str]) -> None:
        """Set tags."""
        self._append(do="tags", values=dict(values))

    def artifact(self, path: Path, folder: str | None = None) -> None:
        """Log a file as it is now."""
        self._append(do="file", path=self._journal.keep_file(path), folder=folder)

    def text(self, text: str, name: str) -> None:
        """Log a text file."""
        path = self._journal.keep_text(text, name)
        self._append(do="file", path=path, folder=name.rpartition("/")[0] or None)

    def close(self, status: str = "FINISHED") -> None:
        """End the run. `Tracker.settle` tells what MLflow has not got or not taken."""
        self._append(do="end", at=now(), status=status)

    def _append(self, **record: Any) -> None:
        self._delivery.append(self._journal, record)


def now() -> int:
    """MLflow's time stamp, milliseconds since 1970."""
    return int(time.time() * 1000)
