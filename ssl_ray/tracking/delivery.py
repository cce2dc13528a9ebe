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
from functools import cached_property
from pathlib import Path
from typing import TypeVar

from ssl_ray.console import say
from ssl_ray.tracking.client import (
    BATCH,
    KEY,
    KIND,
    Away,
    Client,
    Metric,
    Param,
    Patience,
    Refused,
    RunTag,
    is_refusal,
    reason,
    requests,
    without_password,
)
from ssl_ray.tracking.journal import Journal, Record

T = TypeVar("T")
REFERENCE = "ssl-ray:"
"""Begins the name that a run goes by until MLflow has given it an id; resolved in values of tags."""

_TRIES = 5
"""So often is a file tried that cannot be stored although MLflow answers, e.g. for want of a right or of a library."""


class Delivery:
    """The journals of one MLflow experiment, and the thread that delivers them.

    Attributes:
        folder: of the journals.
        place: MLflow's tracking URI without user name and password.
        experiment_id: MLflow's id of the experiment, None until it is known.
        away: why MLflow does not answer; None while it does.
        refused: runs of which MLflow did not take something, each with the first reason.
    """

    def __init__(self, uri: str, folder: Path, find_experiment: Callable[[Client], str], patience: Patience) -> None:
        """Journals in a folder, for MLflow at a URI; `find_experiment` asks for the experiment's id, or makes it."""
        self._uri, self.folder, self._find_experiment, self._patience = uri, folder, find_experiment, patience
        self.place = without_password(uri)
        self.experiment_id: str | None = None
        self.away: str | None = None
        self.refused: dict[str, str] = {}
        self._told = self._stopped = False
        self._tries: Counter[Path] = Counter()
        self._wake = threading.Condition()
        self._journals = {path.name: Journal(path, self._notify) for path in sorted(folder.glob("*/"))}
        self._thread = threading.Thread(target=self._work, daemon=True, name="ssl-ray-mlflow")

    @cached_property
    def client(self) -> Client:
        """MLflow's client; making it may already need MLflow's database."""
        return Client(self._uri)

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
        self._stopped = True
        self._notify()
        if self.running:
            self._thread.join(10)

    def journal(self, run: str, create: bool = False) -> Journal | None:
        """The journal of a run by its name, a reference to it, or MLflow's id."""
        name = run.removeprefix(REFERENCE)
        with self._wake:
            if create and name not in self._journals:
                self._journals[name] = Journal(self.folder / name, self._notify)
            return self._journals.get(name) or next((j for j in self._journals.values() if j.run_id == name), None)

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

    def ask(self, question: Callable[[Client], T], seconds: float = 60) -> T:
        """An answer from MLflow in time.

        Raises:
            Away: there is none, or was none just now.
            MlflowException: MLflow's own word.
        """
        answer: Future[T] = Future()

        def put() -> None:
            for last in (False, True):  # a server may close an idle connection at the moment when we use it
                try:
                    return answer.set_result(question(self.client))
                except Exception as error:
                    if last or is_refusal(error):
                        return answer.set_exception(error)

        why = self.away
        if why is None:
            threading.Thread(target=put, daemon=True).start()
            try:
                return answer.result(seconds)
            except Exception as error:
                if is_refusal(error):
                    raise
                self.away = why = reason(error) if answer.done() else f"no answer within {seconds:.0f} s"
                self._notify()  # the thread finds out when it is back
        raise Away(f"tracking.uri: MLflow at {self.place} does not answer ({why})")

    def tell_away(self) -> None:
        """Tell the user that MLflow does not answer, once until it is back."""
        if not self._told:
            self._told = True
            say(
                f"MLflow at {self.place} does not answer ({self.away}); metrics are kept in {self.folder} and "
                "delivered when it is back"
            )

    def _work(self) -> None:
        failures = 0
        while not self._stopped:
            with self._wake:
                self._wake.wait_for(lambda: self._stopped or self.away or self._due())
                due = self._due()
            try:
                if self.away:
                    self.experiment_id = self._find_experiment(self.client)
                # A request each, so that no run waits for another's backlog.
                moved = [self._deliver(journal) for journal in due if not self._stopped]
            except Exception as error:
                failures += 1
                self.away = reason(error)
                if failures > 1:  # a single failure is no news
                    self.tell_away()
                with self._wake:
                    self._wake.notify_all()
                    pause = min(self._patience.pause * 2 ** min(failures - 1, 20), self._patience.longest)
                    self._wake.wait_for(lambda: self._stopped, pause)
                continue
            failures = 0
            with self._wake:
                self.away = None
                if self._told:
                    self._told = False
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
        entries = journal.pending(BATCH["metrics"])
        if not entries:
            return False
        parts = requests([entry.record or {"do": "unreadable"} for entry in entries])
        refused: list[tuple[Record, str]] = []
        while parts:
            part, run_id = parts.pop(0), journal.run_id
            try:
                if part[0]["do"] == "open":
                    parts += self._open(journal, part[0])
                elif run_id is None:
                    raise Refused("MLflow did not make the run")
                elif part[0]["do"] == "metrics":
                    if journal.had is None:
                        journal.had = self.client.steps(run_id)
                    points = [
                        Metric(key, value, record["at"], record["step"])
                        for record in part
                        for key, value in record["values"].items()
                        if record["step"] not in journal.had.get(key, ())
                    ]
                    self.client.log_batch(run_id, points)
                else:
                    self._send(journal, run_id, part)
            except Exception as error:
                if not is_refusal(error):
                    raise
                if run_id and self.client.is_gone(run_id):
                    say(f"run {journal.name} is not in MLflow any more; it is made again")
                    journal.forget()
                    return True
                if len(part) > 1:
                    parts[:0] = [part[: len(part) // 2], part[len(part) // 2 :]]
                else:
                    refused.append((part[0], reason(error)))
        if refused and journal.name not in self.refused:
            why = self.refused[journal.name] = refused[0][1]
            say(f"MLflow refused something of run {journal.name}: {why}; the rest goes on")
        # A line that cannot be read is told, but there is nothing in it to put aside.
        journal.delivered(entries, [(record, why) for record, why in refused if record["do"] != "unreadable"])
        self._notify()
        return True

    def _open(self, journal: Journal, record: Record) -> list[list[Record]]:
        """Find the run or make it -> its parameters and tags, which are to be sent next."""
        run_id, params = journal.run_id, record["params"]
        if run_id is None:
            found = self.client.find(self.experiment_id, kind=record["kind"], key=record["key"])
            run_id = found[0].info.run_id if found else None
        if run_id is None:
            tags = {KIND: record["kind"], KEY: record["key"]}
            run_id = self.client.create_run(self.experiment_id, record["at"], tags, record["name"]).info.run_id
            journal.had = {}
        else:
            self.client.update_run(run_id, status="RUNNING")
            # MLflow refuses to change a parameter; what does not affect the result may differ when a run is taken up.
            given = self.client.get_run(run_id).data.params
            params = {key: value for key, value in params.items() if key not in given}
            journal.had = self.client.steps(run_id)
        journal.made(run_id)
        return requests([{"do": "params", "values": params}]) + requests([{"do": "tags", "values": record["tags"]}])

    def _send(self, journal: Journal, run_id: str, part: Sequence[Record]) -> None:
        """Send records of one kind, other than metrics."""
        record = part[0]
        values = [item for one in part for item in one.get("values", {}).items()]
        match record["do"]:
            case "params":
                self.client.log_batch(run_id, params=[Param(key, value) for key, value in values])
            case "tags":
                self.client.log_batch(run_id, tags=[RunTag(key, self._resolve(value)) for key, value in values])
            case "file":
                self._store(run_id, journal.folder / record["path"], record["folder"])
            case "end":
                self.client.set_terminated(run_id, record["status"], record["at"])
            case _:
                raise Refused("the record cannot be read")

    def _store(self, run_id: str, path: Path, folder: str | None) -> None:
        if not path.is_file():
            raise Refused(f"{path} is not there any more")
        try:
            self.client.log_artifact(run_id, str(path), folder)
        except Exception as error:
            self._tries[path] += 1
            if is_refusal(error) or self._tries[path] < _TRIES:
                raise
            raise Refused(reason(error)) from error

    def _resolve(self, value: str) -> str:
        """A tag's value; where it is the reference of a run, MLflow's id of it, which is made first if need be."""
        if not value.startswith(REFERENCE):
            return value
        journal = self.journal(value)
        if journal and journal.run_id is None:
            self._deliver(journal)
        if journal is None or journal.run_id is None:
            raise Refused(f"{value} is not in MLflow")
        return journal.run_id
