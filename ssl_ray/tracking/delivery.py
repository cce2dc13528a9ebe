"""From the journals on disk to MLflow, in order, however often MLflow goes away."""

import atexit
import re
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from ssl_ray.console import say
from ssl_ray.tracking.journal import Journal
from ssl_ray.tracking.sender import BATCH, Gone, Sender, Stuck, is_refusal, reason, together

T = TypeVar("T")
_PAUSES = (0.5, 1.0, 2.0, 4.0, 8.0, 16.0, 30.0)


class Away(Exception):  # noqa: N818
    """MLflow does not answer."""


class Delivery:
    """The journals of one MLflow experiment, and the thread that delivers them."""

    def __init__(self, uri: str, folder: Path, find_experiment: Callable[[Any], str | None]) -> None:
        """Args:
        uri: MLflow's tracking URI.
        folder: of the journals.
        find_experiment: asks MLflow's client for the experiment's id, or makes it.
        """
        self.folder, self._find_experiment = folder, find_experiment
        self.sender = Sender(uri, self._resolve)
        self.place = re.sub(r"://[^/@\s]+@", "://", uri)
        self.away: str | None = None
        self._journals = {path.name: Journal(path) for path in sorted(folder.glob("*")) if path.is_dir()}
        self._again = {name: list(one.refused) for name, one in self._journals.items() if one.refused}
        self._stuck: dict[str, str] = {}
        self._failures = 0
        self._said = self._stopped = False
        self._wake = threading.Condition()
        self._thread = threading.Thread(target=self._work, daemon=True, name="ssl-ray-mlflow")

    @property
    def running(self) -> bool:
        """Whether what is appended is delivered, too."""
        return self._thread.is_alive()

    def start(self) -> None:
        """Begin to deliver, until the process ends."""
        if not self.running:
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
        """The journal of a run by its name, which is that of its folder, or by MLflow's id."""
        with self._wake:
            if create and name not in self._journals:
                self._journals[name] = Journal(self.folder / name)
            return self._journals.get(name) or next((j for j in self._journals.values() if j.run_id == name), None)

    def append(self, journal: Journal, record: dict[str, Any]) -> None:
        """Keep a record; it is on disk when this returns."""
        journal.append(record)
        with self._wake:
            self._wake.notify_all()

    @property
    def left(self) -> int:
        """How many records MLflow has not got yet."""
        with self._wake:
            return sum(journal.left for journal in self._journals.values())

    @property
    def refused(self) -> dict[str, str]:
        """What MLflow did not take: names of runs, each with its first reason."""
        with self._wake:
            reasons = {name: next(iter(one.refused.values())) for name, one in self._journals.items() if one.refused}
            return reasons | self._stuck

    def catch_up(self, seconds: float, journal: Journal | None = None, even_away: bool = False) -> None:
        """Wait until everything (of a run) is delivered, as long as there is hope."""
        deadline = time.monotonic() + seconds
        with self._wake:
            while self.running and (even_away or not self.away):
                left = [one for one in self._deliverable() if journal in (None, one)]
                if not left or (rest := deadline - time.monotonic()) <= 0:
                    return
                self._wake.wait(rest)

    def ask(self, question: Callable[[], T], seconds: float) -> T:
        """An answer from MLflow in time.

        Raises:
            Away: there is none, or was none just now.
            MlflowException: MLflow's own word.
        """
        if self.away:
            raise Away(self.away)
        answers: list[T] = []
        errors: list[Exception] = []

        def put() -> None:
            try:
                answers.append(question())
            except Exception as error:
                errors.append(error)

        why = f"no answer within {seconds:.0f} s"
        for _ in range(2):  # a connection that was idle may be closed by the server just now
            thread = threading.Thread(target=put, daemon=True)
            thread.start()
            thread.join(seconds)
            if answers:
                return answers[0]
            if not errors:
                break
            if is_refusal(errors[-1]):
                raise errors[-1]
            why = reason(errors[-1])
        if self.running:
            self.lost(why)
        raise Away(why)

    def lost(self, why: str, say_it: bool = False) -> None:
        """MLflow does not answer; the thread finds out when it is back."""
        with self._wake:
            self.away = why
            if say_it and not self._said:
                self._said = True
                say(
                    f"MLflow at {self.place} does not answer ({why}); metrics are kept in {self.folder} and delivered "
                    "when it is back"
                )
            self._wake.notify_all()

    def _deliverable(self) -> list[Journal]:
        return [one for name, one in self._journals.items() if one.left and name not in self._stuck]

    def _work(self) -> None:
        sender = self.sender
        while True:
            with self._wake:
                while not (self._stopped or self.away or self._again or self._deliverable()):
                    self._wake.wait()
                todo = self._deliverable()
            try:
                if self._stopped:
                    return
                sender.retrying = self._failures > 0
                if self.away or sender.experiment_id is None:
                    sender.experiment_id = self._find_experiment(sender.client)
                for name in list(self._again):
                    self._try_again(self._journals[name])
                # A request each, so that no run waits for another's backlog.
                moved = [self._advance(journal) for journal in todo if not self._stopped]
            except Exception as error:
                self._pause(reason(error))
                continue
            with self._wake:
                self.away, self._failures = None, 0
                if self._said:
                    self._said = False
                    say(f"MLflow at {self.place} is back")
                self._wake.notify_all()
                if todo and not any(moved):  # what is left waits for room on the disk
                    self._wake.wait(1)

    def _pause(self, why: str) -> None:
        self._failures += 1
        self.lost(why, say_it=self._failures == 2)  # a single failure is no news
        end = time.monotonic() + _PAUSES[min(self._failures, len(_PAUSES)) - 1]
        with self._wake:
            while not self._stopped and (rest := end - time.monotonic()) > 0:
                self._wake.wait(rest)

    def _try_again(self, journal: Journal) -> None:
        """What was refused before this process began: once more, for its reason may be mended by now."""
        places = self._again[journal.name]
        while places:
            entry = journal.at(places[0])
            try:
                taken = entry is None or (journal.run_id and not self.sender.send(journal, [entry]))
            except Gone:  # whoever deleted the run does not miss it
                taken = True
            if taken:
                journal.settle(places[0])
            places.pop(0)
        with self._wake:
            del self._again[journal.name]

    def _advance(self, journal: Journal) -> bool:
        """Deliver a run's oldest records, as many as go in one request -> whether there were any on disk."""
        group = together(journal.pending(BATCH))
        if not group:
            return False
        name = journal.name
        try:
            refused = self.sender.send(journal, group)
        except Gone:
            say(f"run {name} is not in MLflow any more; it is made again")
            journal.forget()
        except Stuck as error:
            say(f"MLflow does not make run {name}: {error}; what belongs to it is kept in {journal.folder}")
            with self._wake:
                self._stuck[name] = str(error)
        else:
            if refused and not journal.refused:
                say(f"MLflow refused something of run {name}: {next(iter(refused.values()))}; the rest goes on")
            journal.delivered(group, refused)
        with self._wake:
            self._wake.notify_all()
        return True

    def _resolve(self, name: str) -> str:
        """MLflow's id of the run of a journal, which is made first where it is not yet."""
        journal = self.journal(name)
        if journal is None:
            return ""
        if journal.run_id is None:
            self._advance(journal)
        return journal.run_id or ""
