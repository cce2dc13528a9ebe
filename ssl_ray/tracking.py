"""MLflow: one experiment a study, one run a pretraining, one parent run for the grid with a child run a trial.

Only the driver speaks to MLflow, in a thread of its own, so that a slow server does not slow a training step. A run is
found again by the tag `ssl_ray.key`, a digest of everything that its result depends on.
"""

import logging
import os
import queue
import tempfile
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")  # read when mlflow is imported

from mlflow.entities import Metric, Param, RunTag
from mlflow.entities import Run as MlflowRun
from mlflow.tracking import MlflowClient

from ssl_ray.config import Study
from ssl_ray.experiment import flatten

logging.getLogger("mlflow.store.db.utils").setLevel(logging.WARNING)  # tells of every table that it creates

KEY, KIND = "ssl_ray.key", "ssl_ray.kind"
PRETRAINING_RUN = "ssl_ray.pretraining_run"
"""Lineage: on a trial that started from pretrained weights, the id of the run that made them."""


class Tracker:
    """The study's MLflow experiment."""

    def __init__(self, study: Study, create: bool = True) -> None:
        """Args:
        study: names tracking URI and experiment.
        create: make the experiment where it does not exist yet.

        Raises:
            ValueError: when it does not exist and is not to be made.
        """
        self.uri = study.tracking_uri
        if self.uri.startswith("sqlite:///"):
            Path(self.uri.removeprefix("sqlite:///")).parent.mkdir(parents=True, exist_ok=True)
        self.client = MlflowClient(self.uri)
        experiment = self.client.get_experiment_by_name(study.experiment)
        if experiment is None and not create:
            raise ValueError(f"{self.uri}: no MLflow experiment named {study.experiment!r}; run the study first")
        if experiment is None:
            # A local store would put artifacts under the current directory; a server decides for itself.
            artifacts = (Path(study.output).absolute() / "artifacts" / study.experiment).as_uri()
            location = None if study.tracking.uri else artifacts
            self.experiment_id = self.client.create_experiment(study.experiment, artifact_location=location)
        else:
            self.experiment_id = experiment.experiment_id

    def runs(self, **tags: str) -> list[MlflowRun]:
        """Runs whose tags (`kind`, `key`) match, newest first."""
        names = {"kind": KIND, "key": KEY, "parent": "mlflow.parentRunId"}
        terms = [f"tags.`{names[name]}` = '{value}'" for name, value in tags.items()]
        found: list[MlflowRun] = []
        token = None
        while True:
            page = self.client.search_runs(
                [self.experiment_id], " and ".join(terms), order_by=["start_time DESC"], page_token=token
            )
            found += page
            token = page.token
            if not token:
                return found

    def finished(self, kind: str, key: str) -> MlflowRun | None:
        """The finished run of a key, or None."""
        return next((run for run in self.runs(kind=kind, key=key) if run.info.status == "FINISHED"), None)

    def history(self, run_id: str, metric: str) -> dict[int, float]:
        """Values of a metric by step, ascending."""
        points = self.client.get_metric_history(run_id, metric)
        return {point.step: point.value for point in sorted(points, key=lambda point: (point.step, point.timestamp))}

    def files(self, run_id: str, folder: str | None = None) -> list[str]:
        """Paths of a run's artifacts in one folder, sorted by name."""
        return sorted(item.path for item in self.client.list_artifacts(run_id, folder) if not item.is_dir)

    def read(self, run_id: str, path: str) -> bytes | None:
        """Content of an artifact, or None where the run has none of that path."""
        if path not in self.files(run_id, path.rpartition("/")[0] or None):
            return None
        with tempfile.TemporaryDirectory() as folder:
            return Path(self.client.download_artifacts(run_id, path, folder)).read_bytes()

    def attach(self, run_id: str, path: Path, folder: str | None = None) -> None:
        """Log a file with a run that may have ended long ago."""
        self.client.log_artifact(run_id, str(path), folder)

    def open(
        self,
        kind: str,
        key: str,
        name: str,
        params: Mapping[str, Any],
        parent: str | None = None,
        tags: Mapping[str, str] | None = None,
    ) -> "Run":
        """The run of a key, new or taken up again."""
        found = next(iter(self.runs(kind=kind, key=key)), None)
        if found is None:
            every = {KIND: kind, KEY: key, **(tags or {})} | ({"mlflow.parentRunId": parent} if parent else {})
            found = self.client.create_run(self.experiment_id, run_name=name, tags=every)
        else:
            self.client.update_run(found.info.run_id, status="RUNNING")
        run_id = found.info.run_id
        # MLflow refuses to change a parameter; what does not affect the result may differ when a run is taken up again.
        missing = [Param(key, str(value)[:6000]) for key, value in params.items() if key not in found.data.params]
        for start in range(0, len(missing), 100):
            self.client.log_batch(run_id, params=missing[start : start + 100])
        return Run(self.client, run_id)


class Run:
    """One MLflow run that is being written, through a queue that its own thread empties."""

    def __init__(self, client: MlflowClient, run_id: str) -> None:
        self.id = run_id
        self._client = client
        self._queue: queue.Queue[Any] = queue.Queue()
        self._error: Exception | None = None
        self._thread = threading.Thread(target=self._deliver, daemon=True)
        self._thread.start()

    def last_step(self, metric: str) -> int:
        """Highest step of a metric so far, -1 for none: after a restart, replayed steps are not logged twice."""
        return max((point.step for point in self._client.get_metric_history(self.id, metric)), default=-1)

    def metrics(self, values: Mapping[str, float], step: int) -> None:
        """Log metrics of a step."""
        stamp = int(time.time() * 1000)
        self._queue.put(("metrics", [Metric(key, float(value), stamp, step) for key, value in values.items()]))

    def tags(self, values: Mapping[str, str]) -> None:
        """Set tags."""
        self._queue.put(("tags", [RunTag(key, value) for key, value in values.items()]))

    def artifact(self, path: Path, folder: str | None = None) -> None:
        """Log a file."""
        self._queue.put(("artifact", (str(path), folder)))

    def text(self, text: str, name: str) -> None:
        """Log a text file."""
        self._queue.put(("text", (text, name)))

    def close(self, status: str = "FINISHED") -> None:
        """Deliver everything, then end the run.

        Raises:
            RuntimeError: when MLflow refused something.
        """
        self._queue.put(None)
        self._thread.join()
        self._client.set_terminated(self.id, status)
        if self._error:
            raise RuntimeError(f"MLflow did not take everything of run {self.id}: {self._error}") from self._error

    def _deliver(self) -> None:
        while (items := self._waiting())[0] is not None:
            # Points that wait together go together: a store takes hundreds about as fast as one.
            metrics = [point for item in items if item and item[0] == "metrics" for point in item[1]]
            rest = [item for item in items if item is None or item[0] != "metrics"]
            for item in ([("metrics", metrics)] if metrics else []) + rest:
                if item is None:
                    return
                try:
                    self._send(*item)
                except Exception as error:  # kept for `close`, which the driver calls
                    self._error = self._error or error

    def _waiting(self) -> list[Any]:
        """At least one item, and those behind it as far as one request to MLflow may hold them."""
        items = [self._queue.get()]
        while items[-1] is not None and len(items) < 50 and not self._queue.empty():
            items.append(self._queue.get())
        return items

    def _send(self, kind: str, value: Any) -> None:
        if kind == "metrics":
            for start in range(0, len(value), 1000):
                self._client.log_batch(self.id, metrics=value[start : start + 1000])
        elif kind == "tags":
            self._client.log_batch(self.id, tags=value)
        elif kind == "artifact":
            self._client.log_artifact(self.id, *value)
        else:
            self._client.log_text(self.id, *value)


def study_params(study: Study, *sections: str) -> dict[str, str]:
    """Flat parameters of the named sections, so that all runs of a kind have the same names."""
    flat = flatten(study)
    return {key: value for key, value in flat.items() if key.partition(".")[0] in ("seed", "network", *sections)}
