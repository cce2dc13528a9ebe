"""One run's records to MLflow, so that each counts once whatever becomes of the request.

A request whose answer got lost may have been carried out. MLflow's SQL store takes a repeated point (same value, step
and time stamp) for the same one; parameters, tags, files and the end of a run may be repeated; a run is looked up by
its key before it is made. After anything uncertain, the steps that MLflow has are read back and only the others sent.
"""

import os
import re
import time
from collections import Counter
from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any, TypeVar

os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")  # read when mlflow is imported
# By itself MLflow repeats a request whose answer got lost, "create a run" included; here it is looked up first.
os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "60")
os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")

from mlflow.entities import Metric, Param, RunTag
from mlflow.entities import Run as MlflowRun
from mlflow.exceptions import MlflowException
from mlflow.tracking import MlflowClient
from requests.exceptions import HTTPError

from ssl_ray.tracking.journal import Entry, Journal

T = TypeVar("T")
KEY, KIND, PARENT = "ssl_ray.key", "ssl_ray.kind", "mlflow.parentRunId"
REFERENCE = "ssl-ray:"
"""Begins the name that a run goes by until MLflow has given it an id; resolved in `parent` and in values of tags."""

BATCH = 1000
"""MLflow's limit of metrics a request."""

_PROBE = "ssl_ray.probe"
_TRIES = 5
"""So often is a record tried whose failure is not MLflow's word on it, while MLflow takes other things."""


class Gone(Exception):  # noqa: N818
    """The run is not in MLflow any more."""


class Stuck(Exception):  # noqa: N818
    """MLflow does not make the run; says why."""


class Sender:
    """What MLflow is asked and told.

    Attributes:
        experiment_id: MLflow's id of the experiment.
        retrying: whether the request before this one failed.
    """

    def __init__(self, uri: str, resolve: Callable[[str], str]) -> None:
        """Args:
        uri: MLflow's tracking URI.
        resolve: name of a run -> MLflow's id of it, empty where MLflow does not have it.
        """
        self._uri, self._resolve_name = uri, resolve
        self.experiment_id: str | None = None
        self.retrying = False
        self._tries: Counter[str] = Counter()
        self._blank: set[str] = set()  # runs made just now, of which MLflow has what it has acknowledged and no more
        self._seen: dict[str, dict[str, set[int]]] = {}  # of other runs: steps that MLflow had, by metric

    @cached_property
    def client(self) -> MlflowClient:
        """MLflow's client; making it may already need MLflow's database."""
        return MlflowClient(self._uri)

    def is_new(self, journal: Journal) -> bool:
        """Whether MLflow has nothing of a run but what is in its journal."""
        return journal.name in self._blank

    def find(self, **tags: str) -> list[MlflowRun]:
        """Runs whose tags (`kind`, `key`, `parent`) match, newest first."""
        names = {"kind": KIND, "key": KEY, "parent": PARENT}
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

    def send(self, journal: Journal, group: Sequence[Entry]) -> dict[int, str]:
        """Send an entry, or several of metrics -> reasons of those that were refused, by their place.

        Raises:
            Gone: the run was deleted in MLflow.
            Stuck: MLflow refuses to make the run.
            Exception: whatever it is, MLflow does not answer, or not with its own word.
        """
        refused = self._send(journal, group)
        self._tries[journal.name] = 0
        return refused

    def _send(self, journal: Journal, group: Sequence[Entry]) -> dict[int, str]:
        first, record = group[0].start, group[0].record
        if record is None:
            return {first: "the record cannot be read"}
        if record["do"] == "open":
            return self._open(journal, first, record)
        run_id, client = journal.run_id, self.client
        if run_id is None:
            raise Stuck("its first record cannot be read")
        match record["do"]:
            case "metrics":
                points = [
                    (entry.start, Metric(key, value, entry.record["at"], entry.record["step"]))
                    for entry in group
                    if entry.record
                    for key, value in entry.record["values"].items()
                ]
                return self._put(journal, points, lambda some: client.log_batch(run_id, self._unsent(journal, some)))
            case "tags":
                return self._put_tags(journal, first, record["values"])
            case "file":
                path = journal.folder / record["path"]
                if not path.is_file():
                    return {first: f"{path} is not there any more"}
                return self._put(
                    journal, [(first, path)], lambda _: client.log_artifact(run_id, str(path), record["folder"])
                )
            case _:
                end = [(first, record["status"])]
                return self._put(journal, end, lambda some: client.set_terminated(run_id, some[0], record["at"]))

    def _open(self, journal: Journal, start: int, record: dict[str, Any]) -> dict[int, str]:
        refused: dict[int, str] = {}
        try:
            if journal.run_id:
                self._check(journal)
                found = self.client.get_run(journal.run_id)
            else:
                found = next(iter(self.find(kind=record["kind"], key=record["key"])), None)
            if found is None:
                tags = {KIND: record["kind"], KEY: record["key"]}
                if parent := record["parent"] and self._resolve(record["parent"]):
                    tags[PARENT] = parent
                elif record["parent"]:
                    refused[start] = f"its parent {record['parent']} is not in MLflow"
                self._blank.discard(journal.name)
                found = self.client.create_run(self.experiment_id, record["at"], tags, record["name"])
                self._blank.add(journal.name)
            else:
                self._blank.discard(journal.name)  # its journal may have been dropped since
                if found.info.status != "RUNNING":
                    self.client.update_run(found.info.run_id, status="RUNNING")
        except MlflowException as error:
            if not is_refusal(error):
                raise
            self.client.get_experiment(self.experiment_id)  # it answers, so that this is its word
            raise Stuck(reason(error)) from error
        journal.run_id = found.info.run_id
        journal.save()
        # MLflow refuses to change a parameter; what does not affect the result may differ when a run is taken up again.
        given = record["params"].items()
        params = [(start, Param(key, value)) for key, value in given if key not in found.data.params]
        for at in range(0, len(params), 100):
            refused |= self._put(
                journal, params[at : at + 100], lambda some: self.client.log_batch(journal.run_id, params=some)
            )
        return refused | self._put_tags(journal, start, record["tags"])

    def _put_tags(self, journal: Journal, start: int, values: dict[str, str]) -> dict[int, str]:
        tags = [(start, RunTag(key, self._resolve(value))) for key, value in values.items()]
        return self._put(journal, tags, lambda some: self.client.log_batch(journal.run_id, tags=some))

    def _put(
        self, journal: Journal, items: Sequence[tuple[int, T]], send: Callable[[list[T]], object]
    ) -> dict[int, str]:
        """Send everything but what is refused, which is found by halving."""
        if not items:
            return {}
        try:
            send([item for _, item in items])
            return {}
        except Exception as error:
            why = self._judge(journal, error)
        if len(items) == 1:
            return {items[0][0]: why}
        half = len(items) // 2
        return self._put(journal, items[:half], send) | self._put(journal, items[half:], send)

    def _judge(self, journal: Journal, error: Exception) -> str:
        """The reason why MLflow does not take something, or the error itself where MLflow takes nothing at all."""
        self._blank.discard(journal.name)
        self._seen.pop(journal.name, None)
        refusal = is_refusal(error)
        if refusal or not isinstance(error, MlflowException):
            self._check(journal)
        if refusal:
            return reason(error)
        if not self.retrying:  # most often it works the second time
            raise error
        try:
            self.client.set_tag(journal.run_id, _PROBE, str(int(time.time())))
        except Exception:
            raise error from None
        self._tries[journal.name] += 1
        if self._tries[journal.name] < _TRIES:
            raise error
        return reason(error)

    def _check(self, journal: Journal) -> None:
        """Raises Gone for a run that is deleted, and what there is where MLflow does not answer."""
        try:
            stage = self.client.get_run(journal.run_id).info.lifecycle_stage
        except MlflowException as error:
            if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                raise
            stage = "deleted"
        if stage == "deleted":
            self._blank.discard(journal.name)
            self._seen.pop(journal.name, None)
            raise Gone

    def _unsent(self, journal: Journal, points: Sequence[Metric]) -> list[Metric]:
        """The points whose steps MLflow does not have yet."""
        if journal.name in self._blank:
            return list(points)
        seen = self._seen.setdefault(journal.name, {})
        for key in {point.key for point in points} - seen.keys():
            seen[key] = {point.step for point in self.client.get_metric_history(journal.run_id, key)}
        return [point for point in points if point.step not in seen[point.key]]

    def _resolve(self, value: str) -> str:
        return self._resolve_name(value.removeprefix(REFERENCE)) if value.startswith(REFERENCE) else value


def together(entries: Sequence[Entry]) -> list[Entry]:
    """The first entry, and where it is metrics, those behind it that fit into the same request."""
    group, points = list(entries[:1]), 0
    for entry in entries:
        if entry.record is None or entry.record["do"] != "metrics":
            break
        points += len(entry.record["values"])
        if points > BATCH:
            break
        if entry is not entries[0]:
            group.append(entry)
    return group


def is_refusal(error: Exception) -> bool:
    """Whether MLflow itself says no, rather than being away, overloaded or not letting anybody in."""
    if isinstance(error, HTTPError) and error.response is not None:
        status = error.response.status_code
    elif isinstance(error, MlflowException):
        # A proxy in front of MLflow has its own 404 while MLflow starts.
        status = 503 if error.error_code == "ENDPOINT_NOT_FOUND" else error.get_http_status_code()
    else:
        return False
    return 400 <= status < 500 and status not in (401, 403, 408, 429)


def reason(error: Exception) -> str:
    """What is wrong, on one short line and without passwords."""
    text = " ".join(str(error).split()) or type(error).__name__
    inner = re.search(r"\[Errno -?\d+\] ([^'\")]+)", text) or re.search(r"(too many \d+ error responses)", text)
    return re.sub(r"://[^/@\s]+@", "://", inner[1] if inner else text)[:200]
