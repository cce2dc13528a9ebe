"""From the journals on disk to MLflow, in order, however often MLflow goes away.

A request whose answer got lost may have been carried out, and is simply sent again. MLflow's SQL store takes a repeated
point (same value, step and time stamp) for the same one; parameters, tags, files and the end of a run may be repeated;
a run is looked up by its key before it is made.
"""

import threading
from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import TypeVar

from ssl_ray.console import say
from ssl_ray.tracking.client import (
    KEY,
    KIND,
    Away,
    Client,
    Metric,
    Param,
    Refused,
    RunTag,
    is_refusal,
    reason,
    without_password,
)
from ssl_ray.tracking.run import REFERENCE, Record, Run

T = TypeVar("T")
_PARAMS = 100
"""How many parameters MLflow takes in one request."""

_FILE_TRIES = 5
"""So often is a file tried that cannot be stored although MLflow answers, e.g. for want of a right or of a library."""


class Delivery:
    """The runs of one MLflow experiment, and the thread that delivers what they log.

    Attributes:
        folder: of the runs' journals.
        place: MLflow's tracking URI without user name and password.
        experiment_id: MLflow's id of the experiment, None until it is known.
        away: why MLflow does not answer; None while it does.
    """

    def __init__(self, uri: str, folder: Path, find_experiment: Callable[[Client], str], longest_pause: float) -> None:
        """`find_experiment` asks MLflow for the experiment's id, or makes it; the pause is in seconds."""
        self._uri, self.folder, self._find_experiment, self._longest_pause = uri, folder, find_experiment, longest_pause
        self.place = without_password(uri)
        self.experiment_id: str | None = None
        self.away: str | None = None
        self._told = self._stopped = False
        self._told_refused: set[str] = set()
        self._wake = threading.Condition()
        # By name, so that grid and pretraining come before the trials that refer to them.
        self._runs = {path.name: Run(path, self._notify) for path in sorted(folder.glob("*/"))}
        self._thread = threading.Thread(target=self._work, daemon=True, name="ssl-ray-mlflow")

    @cached_property
    def client(self) -> Client:
        """MLflow's client; making it may already need MLflow's database."""
        return Client(self._uri)

    @property
    def silence(self) -> str:
        """What to tell the user while MLflow is away."""
        return f"tracking.uri: MLflow at {self.place} does not answer ({self.away})"

    @property
    def running(self) -> bool:
        """Whether what is logged is delivered, too."""
        return self._thread.is_alive()

    def start(self) -> None:
        """Begin to deliver, until the process ends."""
        if not self.running:
            self._thread.start()

    def stop(self) -> None:
        """Deliver no more; what is left stays on disk."""
        self._stopped = True
        self._notify()
        if self.running:
            self._thread.join(10)

    def run(self, run: str, create: bool = False) -> Run | None:
        """A run by its name, a reference to it, or MLflow's id."""
        name = run.removeprefix(REFERENCE)
        with self._wake:
            if create and name not in self._runs:
                self._runs[name] = Run(self.folder / name, self._notify)
            return self._runs.get(name) or next((one for one in self._runs.values() if one.run_id == name), None)

    def _notify(self) -> None:
        with self._wake:
            self._wake.notify_all()

    def _due(self, run: Run | None = None) -> list[Run]:
        return [one for one in self._runs.values() if one.waiting and run in (None, one)]

    @property
    def left(self) -> int:
        """Number of records that MLflow has not got yet."""
        with self._wake:
            return sum(len(run.waiting) for run in self._due())

    def catch_up(self, seconds: float, run: Run | None = None, even_away: bool = False) -> None:
        """Wait until everything (of a run) is delivered, as long as there is hope."""

        def settled() -> bool:
            return not self.running or bool(self.away and not even_away) or not self._due(run)

        with self._wake:
            self._wake.wait_for(settled, seconds)

    def ask(self, question: Callable[[Client], T]) -> T:
        """An answer from MLflow.

        Raises:
            Away: there is none, or was none just now.
            MlflowException: MLflow's own word.
        """
        for last in (False, True):  # a server may close an idle connection at the moment when we use it
            if self.away:
                break
            try:
                return question(self.client)
            except Exception as error:
                if is_refusal(error):
                    raise
                if last:
                    self.away = reason(error)
                    self._notify()  # the thread finds out when it is back
        raise Away(self.silence)

    def tell_away(self) -> None:
        """Tell the user that MLflow does not answer, once until it is back."""
        if not self._told:
            self._told = True
            say(
                f"MLflow at {self.place} does not answer ({self.away}); metrics are kept in {self.folder} and "
                "delivered when it is back"
            )

    def _work(self) -> None:
        """Send the oldest records of every run in turn, a request each, so that no run waits for another's backlog.

        What MLflow refuses as a whole is sent once more value by value, and what it refuses then is put aside.
        """
        pause = 0.0
        while not self._stopped:
            with self._wake:
                self._wake.wait_for(lambda: self._stopped or self.away or self._due())
                due = self._due()
            try:
                if self.away:
                    self.experiment_id = self._find_experiment(self.client)
                for run in due:
                    batch = run.pending()
                    parts, refused = [batch], []
                    for part in parts:
                        try:
                            if part[0]["do"] != "metrics":
                                self._send(run, part[0])
                            elif run.run_id is None:
                                raise Refused("MLflow did not make the run")
                            else:
                                points = [
                                    Metric(key, value, record["at"], record["step"])
                                    for record in part
                                    for key, value in record["values"].items()
                                ]
                                self.client.log_batch(run.run_id, points)
                        except Exception as error:
                            run.tries += 1
                            if not is_refusal(error) and not (part[0]["do"] == "file" and run.tries >= _FILE_TRIES):
                                raise
                            values = [(one, key, value) for one in part for key, value in one.get("values", {}).items()]
                            if len(values) > 1:
                                parts += [[one | {"values": {key: value}}] for one, key, value in values]
                            else:
                                refused.append((part[0], reason(error)))
                    run.delivered(batch, refused)
                    if refused and run.name not in self._told_refused:
                        self._told_refused.add(run.name)
                        say(f"MLflow refused something of run {run.name}: {refused[0][1]}; it is kept in {run.folder}")
            except Exception as error:
                self.away = reason(error)
                if pause:  # a single failure is no news
                    self.tell_away()
                pause = min(2 * pause or 0.5, self._longest_pause)
                with self._wake:
                    self._wake.notify_all()
                    self._wake.wait_for(lambda: self._stopped, pause)
            else:
                pause = 0.0
                self._back()

    def _back(self) -> None:
        with self._wake:
            self.away = None
            if self._told:
                self._told = False
                say(f"MLflow at {self.place} is back")
            self._wake.notify_all()

    def _send(self, run: Run, record: Record) -> None:
        """Send a record of anything but metrics."""
        run_id = self._open(run, record) if record["do"] == "open" else run.run_id
        if run_id is None:
            raise Refused("MLflow did not make the run")
        match record["do"]:
            case "open":
                self.client.update_run(run_id, status="RUNNING")
            case "params":
                # MLflow refuses to change a parameter; what does not affect the result may differ on taking up a run.
                given = self.client.get_run(run_id).data.params
                params = [Param(key, value) for key, value in record["values"].items() if key not in given]
                for at in range(0, len(params), _PARAMS):
                    self.client.log_batch(run_id, params=params[at : at + _PARAMS])
            case "tags":
                tags = [RunTag(key, self._resolve(value)) for key, value in record["values"].items()]
                self.client.log_batch(run_id, tags=tags)
            case "file":
                self.client.log_artifact(run_id, str(run.folder / record["path"]), record["folder"])
            case "end":
                self.client.set_terminated(run_id, record["status"], record["at"])
            case "unreadable":
                raise Refused("the record cannot be read")

    def _open(self, run: Run, record: Record) -> str:
        """MLflow's id of the run, which is found or made."""
        if run.run_id is None:
            tags = {"kind": record["kind"], "key": record["key"]}
            if found := self.client.find(self.experiment_id, **tags):
                made = found[0]
            else:
                tags = {KIND: record["kind"], KEY: record["key"]}
                made = self.client.create_run(self.experiment_id, record["at"], tags, record["name"])
            run.made(made.info.run_id)
        assert run.run_id
        return run.run_id

    def _resolve(self, value: str) -> str:
        """A tag's value; where it is the reference of a run, which was opened before, MLflow's id of that."""
        if not value.startswith(REFERENCE):
            return value
        run = self.run(value)
        if run is None or run.run_id is None:
            raise Refused(f"{value} is not in MLflow")
        return run.run_id
