"""From the journals on disk to MLflow, in order, however often MLflow goes away.

A request whose answer got lost may have been carried out, and is simply sent again. MLflow's SQL store takes a repeated
point (same value, step and time stamp) for the same one; parameters, tags, files and the end of a run may be repeated;
a run is looked up by its key before it is made.
"""

import atexit
import threading
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from functools import cached_property
from itertools import takewhile
from pathlib import Path
from typing import TypeVar

from ssl_ray.console import say
from ssl_ray.tracking.client import KEY, KIND, Refused, find_runs, is_gone, is_refusal, reason, without_password
from ssl_ray.tracking.journal import Entry, Journal, Record

# isort: split  (our client module comes first: it sets what MLflow reads when it is imported)
from mlflow.entities import Experiment, Metric, Param, RunTag
from mlflow.tracking import MlflowClient

T = TypeVar("T")
REFERENCE = "ssl-ray:"
"""Begins the name that a run goes by until MLflow has given it an id; resolved in values of tags."""

_MOST = {"metrics": 1000, "params": 100, "tags": 100}
"""MLflow's limits of one request."""

_TRIES = 5
"""So often is a file tried that cannot be stored although MLflow answers, e.g. for want of a right or of a library."""


class Away(Exception):  # noqa: N818
    """MLflow does not answer."""


@dataclass(frozen=True)
class Patience:
    """Seconds that MLflow gets.

    Attributes:
        contact: for the answer of a server that a study names for the first time.
        pause: after the first failure; each further one doubles it.
        longest: at most between two tries.
    """

    contact: float = 10.0
    pause: float = 0.5
    longest: float = 30.0


class Delivery:
    """The journals of one MLflow experiment, and the thread that delivers them.

    Attributes:
        place: MLflow's tracking URI without user name and password.
        experiment_id: MLflow's id of the experiment, None until it is known.
        away: why MLflow does not answer; None while it does.
        refused: runs of which MLflow did not take something, each with the first reason.
    """

    def __init__(
        self, uri: str, folder: Path, find_experiment: Callable[[MlflowClient], Experiment | None], patience: Patience
    ) -> None:
        """Args:
        uri: MLflow's tracking URI.
        folder: of the journals.
        find_experiment: asks MLflow for the experiment, or makes it.
        patience: how long MLflow gets.
        """
        self._uri, self.folder, self._find_experiment, self._patience = uri, folder, find_experiment, patience
        self.place = without_password(uri)
        self.experiment_id: str | None = None
        self.away: str | None = None
        self.refused: dict[str, str] = {}
        self._had: dict[str, dict[str, set[int]]] = {}
        self._said = self._stopped = False
        self._tries: Counter[str] = Counter()
        self._wake = threading.Condition()
        self._journals = {path.name: self._read(path.name) for path in sorted(folder.glob("*/"))}
        self._thread = threading.Thread(target=self._work, daemon=True, name="ssl-ray-mlflow")

    @cached_property
    def client(self) -> MlflowClient:
        """MLflow's client; making it may already need MLflow's database."""
        return MlflowClient(self._uri)

    @property
    def running(self) -> bool:
        """Whether what is appended is delivered, too."""
        return self._thread.is_alive()

    def start(self) -> None:
        """Begin to deliver, until the process ends."""
        if not self.running:
            for journal in self._journals.values():
                journal.retry_refused()
            self._thread.start()
            atexit.register(self.catch_up, 10)

    def stop(self) -> None:
        """Deliver no more; what is left stays on disk."""
        atexit.unregister(self.catch_up)
        with self._wake:
            self._stopped = True
            self._wake.notify_all()
        if self.running:
            self._thread.join(10)

    def journal(self, name: str, create: bool = False) -> Journal | None:
        """The journal of a run by its name or by MLflow's id."""
        with self._wake:
            if create and name not in self._journals:
                self._journals[name] = self._read(name)
            return self._journals.get(name) or next((j for j in self._journals.values() if j.run_id == name), None)

    def _read(self, name: str) -> Journal:
        return Journal(self.folder / name, self._notify)

    def _notify(self) -> None:
        with self._wake:
            self._wake.notify_all()

    def _due(self, journal: Journal | None = None) -> list[Journal]:
        return [one for one in self._journals.values() if one.left and journal in (None, one)]

    @property
    def left(self) -> int:
        """Number of records that MLflow has not got yet."""
        with self._wake:
            return sum(journal.left for journal in self._due())

    def catch_up(self, seconds: float, journal: Journal | None = None, even_away: bool = False) -> None:
        """Wait until everything (of a run) is delivered, as long as there is hope."""

        def settled() -> bool:
            return not self.running or bool(self.away and not even_away) or not self._due(journal)

        with self._wake:
            self._wake.wait_for(settled, seconds)

    def ask(self, question: Callable[[], T], seconds: float) -> T:
        """An answer from MLflow in time.

        Raises:
            Away: there is none, or was none just now.
            MlflowException: MLflow's own word.
        """
        if self.away:
            raise Away(self.away)
        answer: Future[T] = Future()

        def put() -> None:
            for last in (False, True):  # the server may close a connection just then that was idle
                try:
                    return answer.set_result(question())
                except Exception as error:
                    if last or is_refusal(error):
                        return answer.set_exception(error)

        threading.Thread(target=put, daemon=True).start()
        try:
            return answer.result(seconds)
        except Exception as error:
            if is_refusal(error):
                raise
            why = reason(error) if answer.done() else f"no answer within {seconds:.0f} s"
        if self.running:  # the thread finds out when it is back
            self.lost(why)
        raise Away(why)

    def lost(self, why: str, news: bool = False) -> None:
        """MLflow does not answer; the user is told once until it is back."""
        with self._wake:
            self.away = why
            if news and not self._said:
                self._said = True
                say(
                    f"MLflow at {self.place} does not answer ({why}); metrics are kept in {self.folder} and delivered "
                    "when it is back"
                )
            self._wake.notify_all()

    def had(self, journal: Journal, metric: str) -> set[int]:
        """Steps of a metric that MLflow had when this process met the run, as far as that is known by now."""
        return self._had.get(journal.name, {}).get(metric, set())

    def _work(self) -> None:
        failures = 0
        while not self._stopped:
            with self._wake:
                self._wake.wait_for(lambda: self._stopped or self.away or self._due())
                due = self._due()
            try:
                if self.away:
                    self._find_experiment(self.client)
                # A request each, so that no run waits for another's backlog.
                moved = [self._deliver(journal) for journal in due if not self._stopped]
            except Exception as error:
                failures += 1
                self.lost(reason(error), news=failures > 1)  # a single failure is no news
                with self._wake:
                    pause = min(self._patience.pause * 2 ** min(failures - 1, 20), self._patience.longest)
                    self._wake.wait_for(lambda: self._stopped, pause)
                continue
            failures = 0
            with self._wake:
                self.away = None
                if self._said:
                    self._said = False
                    say(f"MLflow at {self.place} is back")
                self._wake.notify_all()
                if due and not any(moved):  # what is left waits for room on the disk
                    self._wake.wait(1)

    def _deliver(self, journal: Journal) -> bool:
        """Send a run's oldest records -> whether there were any on disk.

        What MLflow refuses as a whole is halved until the one entry that it does not take is alone, which is put aside.

        Raises:
            Exception: whatever it is, MLflow does not answer, or not with its own word.
        """
        entries = _alike(journal.pending(_MOST["metrics"]))
        if not entries:
            return False
        parts = _parts([entry.record or {"do": "unreadable"} for entry in entries])
        refused: list[tuple[Record, str]] = []
        while parts:
            part, run_id = parts.pop(0), journal.run_id
            try:
                if run_id is None and part[0]["do"] != "open":
                    raise Refused("MLflow did not make the run")
                if part[0]["do"] == "metrics":
                    had = self._had[journal.name] if journal.name in self._had else self._meet(journal)
                    points = [
                        Metric(key, value, record["at"], record["step"])
                        for record in part
                        for key, value in record["values"].items()
                        if record["step"] not in had.get(key, ())
                    ]
                    self.client.log_batch(run_id, points)
                else:
                    parts = self._send(journal, part) + parts
            except Exception as error:
                if not is_refusal(error):
                    raise
                if run_id and is_gone(self.client, run_id):
                    say(f"run {journal.name} is not in MLflow any more; it is made again")
                    self._had.pop(journal.name, None)
                    journal.forget()
                    return True
                if len(part) > 1:
                    parts = [part[: len(part) // 2], part[len(part) // 2 :], *parts]
                else:
                    refused.append((part[0], reason(error)))
        if refused and journal.name not in self.refused:
            self.refused[journal.name] = refused[0][1]
            say(f"MLflow refused something of run {journal.name}: {refused[0][1]}; the rest goes on")
        journal.delivered(entries, refused)
        self._notify()
        return True

    def _send(self, journal: Journal, part: Sequence[Record]) -> list[list[Record]]:
        """Send records of one kind that are not metrics -> what is to be sent next, before all others."""
        first, run_id = part[0], journal.run_id
        values = [item for record in part for item in record.get("values", {}).items()]
        match first["do"]:
            case "open":
                return self._open(journal, first)
            case "params":
                self.client.log_batch(run_id, params=[Param(key, value) for key, value in values])
            case "tags":
                self.client.log_batch(run_id, tags=[RunTag(key, self._resolve(value)) for key, value in values])
            case "file":
                self._store(run_id, journal.folder / first["path"], first["folder"])
            case "end":
                self.client.set_terminated(run_id, first["status"], first["at"])
            case _:
                raise Refused("the record cannot be read")
        return []

    def _open(self, journal: Journal, record: Record) -> list[list[Record]]:
        """Find the run or make it -> its parameters and tags, which are to be sent next."""
        run_id, params = journal.run_id, record["params"]
        if run_id is None:
            found = find_runs(self.client, self.experiment_id, kind=record["kind"], key=record["key"])
            run_id = found[0].info.run_id if found else None
        if run_id is None:
            tags = {KIND: record["kind"], KEY: record["key"]}
            made = self.client.create_run(self.experiment_id, record["at"], tags, record["name"])
            journal.made(made.info.run_id)
            self._had[journal.name] = {}
        else:
            self.client.update_run(run_id, status="RUNNING")
            # MLflow refuses to change a parameter; what does not affect the result may differ when a run is taken up.
            params = {key: value for key, value in params.items() if key not in self.client.get_run(run_id).data.params}
            journal.made(run_id)
            self._meet(journal)
        return _parts([{"do": "params", "values": params}]) + _parts([{"do": "tags", "values": record["tags"]}])

    def _meet(self, journal: Journal) -> dict[str, set[int]]:
        """Ask for the steps that MLflow has of a run: the journal does not know those that another machine wrote."""
        metrics = self.client.get_run(journal.run_id).data.metrics
        history = {metric: self.client.get_metric_history(journal.run_id, metric) for metric in metrics}
        self._had[journal.name] = {metric: {point.step for point in points} for metric, points in history.items()}
        return self._had[journal.name]

    def _store(self, run_id: str | None, path: Path, folder: str | None) -> None:
        if not path.is_file():
            raise Refused(f"{path} is not there any more")
        try:
            self.client.log_artifact(run_id, str(path), folder)
        except Exception as error:
            self._tries[str(path)] += 1
            if is_refusal(error) or self._tries[str(path)] < _TRIES:
                raise
            raise Refused(reason(error)) from error

    def _resolve(self, value: str) -> str:
        """A tag's value; where it is the reference of a run, MLflow's id of it, which is made first if need be."""
        if not value.startswith(REFERENCE):
            return value
        journal = self.journal(value.removeprefix(REFERENCE))
        if journal and journal.run_id is None:
            self._deliver(journal)
        if journal is None or journal.run_id is None:
            raise Refused(f"{value} is not in MLflow")
        return journal.run_id


def _alike(entries: Sequence[Entry]) -> list[Entry]:
    """The first entry, and where it is metrics, those behind it that are metrics, too."""
    metrics = list(takewhile(lambda entry: entry.record and entry.record["do"] == "metrics", entries))
    return metrics or list(entries[:1])


def _parts(records: Sequence[Record]) -> list[list[Record]]:
    """Records of one kind, with one value each, in lists that fit into a request."""
    most = _MOST.get(records[0]["do"])
    if most is None:
        return [list(records)]
    items = [record | {"values": {key: value}} for record in records for key, value in record["values"].items()]
    return [items[at : at + most] for at in range(0, len(items), most)]
