"""From the journals on disk to MLflow, in order, however often MLflow goes away.

A request whose answer got lost may have been carried out, and is simply sent again. MLflow's SQL store takes a repeated
point (same value, step and time stamp) for the same one; parameters, tags, files and the end of a run may be repeated;
a run is looked up by its key before it is made.
"""

import json
import re
import time
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property
from pathlib import Path
from threading import Condition, Thread
from typing import TypeVar

from ssl_ray.console import say
from ssl_ray.storage.files import file_digest
from ssl_ray.text import without_password
from ssl_ray.tracking.client import KEY, KIND, Away, Client, Refused, entities, is_refusal, why
from ssl_ray.tracking.models import dataset_input, find_model, log_model
from ssl_ray.tracking.run import FILE_TRIES, REFERENCE, NetworkFile, Record, Run

T = TypeVar("T")
_PARAMS = 100
"""How many parameters MLflow takes in one request."""
LONGEST_PAUSE = 30.0
"""Seconds between two tries to reach MLflow, at most."""


class Delivery(Thread):
    """The runs of one MLflow experiment, and the thread that delivers what they log.

    Attributes:
        folder: of the runs' journals.
        place: MLflow's tracking URI without user name and password.
        experiment_id: None until it is known.
        runs: by name, those that an earlier process left included.
        away: why MLflow does not answer; None while it does.
    """

    def __init__(
        self, uri: str, folder: Path, find_experiment: Callable[[Client], str], fetch: Callable[[Path], bool]
    ) -> None:
        """`find_experiment` asks MLflow for the experiment's id, or makes it.

        `fetch` brings a file of weights onto this machine, whichever wrote it -> whether there is one.
        """
        super().__init__(daemon=True, name="ssl-ray-mlflow")
        self._uri, self.folder, self._find_experiment, self._fetch = uri, folder, find_experiment, fetch
        self.place = without_password(uri)
        self.experiment_id: str | None = None
        self.away: str | None = None
        self._stopped = False
        self.wake = Condition()
        # In this order grid and pretraining come before the trials that refer to them.
        self.runs = {path.name: Run(path, self.wake) for path in sorted(folder.glob("*/"))}

    @cached_property
    def client(self) -> Client:
        """MLflow's client; making it may already need MLflow's database."""
        return Client(self._uri)

    def stop(self) -> None:
        """Deliver no more; what is left stays on disk."""
        with self.wake:
            self._stopped = True
            self.wake.notify_all()
        if self.is_alive():
            self.join(10)

    @property
    def left(self) -> int:
        """Number of records that MLflow has not got yet."""
        return sum(len(run.waiting) for run in list(self.runs.values()))

    def _due(self) -> list[Run]:
        """Runs of which something can be sent now."""
        return [run for run in list(self.runs.values()) if run.waiting and run.due <= time.monotonic()]

    def catch_up(self, seconds: float, even_away: bool = False) -> None:
        """Wait until everything is delivered that can be sent now; `even_away`: or that may be within these seconds."""

        def done() -> bool:
            return not self.is_alive() or not (self.left if even_away else self._due() and not self.away)

        with self.wake:
            self.wake.wait_for(done, seconds)

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
                    self.set_away(why(error))
        raise Away(f"tracking.uri: MLflow at {self.place} does not answer ({self.away})")

    def set_away(self, away: str | None) -> None:
        """Note why MLflow does not answer, or that it does, for all who wait."""
        with self.wake:
            self.away = away
            self.wake.notify_all()

    def run(self) -> None:
        """Send the oldest records of every run in turn, a request each, so that no run waits for another's backlog."""
        failures = 0
        while not self._stopped:
            with self.wake:
                self.wake.wait_for(lambda: self._stopped or self.away or self._due(), min(1, LONGEST_PAUSE))
            try:
                if self.away and not self._stopped:
                    self.experiment_id = self._find_experiment(self.client)
                for run in self._due():
                    if self._stopped:
                        return
                    self._deliver(run)
            except Exception as error:
                self.set_away(why(error))
                failures = min(failures + 1, 10)
                if failures == 2:  # a single failure is no news
                    say(f"MLflow at {self.place} does not answer ({self.away}); metrics are kept in {self.folder}")
                with self.wake:
                    self.wake.wait_for(lambda: self._stopped, _pause(failures))
            else:
                failures = 0
                self.set_away(None)

    def _deliver(self, run: Run) -> None:
        """Send the oldest records of a run.

        What MLflow refuses as a whole is sent once more value by value, and what it refuses then is put aside. So is a
        file that cannot be stored although MLflow answers, e.g. for want of a right or of a library, after FILE_TRIES;
        until then its run waits and no other, and the next process tries it again.

        Raises:
            Exception: whatever it is, MLflow does not answer.
        """
        batch = run.pending()
        parts, refused = [batch], []
        for part in parts:
            try:
                self._send(run, part)
            except Exception as error:
                if not is_refusal(error):
                    if part[0]["do"] not in ("file", "model"):
                        raise
                    self._find_experiment(self.client)  # raises where MLflow itself does not answer
                    run.tries += 1
                    if run.tries < FILE_TRIES:
                        run.due = time.monotonic() + _pause(run.tries)
                        return
                values = [(one, *value) for one in part for value in one.get("values", {}).items()]
                if len(values) > 1:
                    parts += [[one | {"values": {key: value}}] for one, key, value in values]
                else:
                    refused.append((part[0], why(error)))
        run.delivered(batch, refused)

    def _send(self, run: Run, part: Sequence[Record]) -> None:
        """Send records of metrics, or one of anything else."""
        record = part[0]
        values: dict[str, str] = record.get("values", {})
        if record["do"] == "open" and run.run_id is None:
            kind, key = record["kind"], record["key"]
            found = self.client.find(self.experiment_id, kind=kind, key=key)
            new = self.experiment_id, record["at"], {KIND: kind, KEY: key}, record["name"]
            run.run_id = (found[0] if found else self.client.create_run(*new)).info.run_id
            run.save()
        run_id = _known(run)
        match record["do"]:
            case "open":
                self.client.update_run(run_id, status="RUNNING")
            case "metrics":
                self.client.log_batch(run_id, [*self._points(run_id, part)])
            case "params":
                # MLflow refuses to change a parameter; what does not affect the result may differ on taking up a run.
                given = self.client.get_run(run_id).data.params
                params = [entities.Param(key, value) for key, value in values.items() if key not in given]
                for at in range(0, len(params), _PARAMS):
                    self.client.log_batch(run_id, params=params[at : at + _PARAMS])
            case "tags":
                tags = [entities.RunTag(key, self._resolved(value)) for key, value in values.items()]
                self.client.log_batch(run_id, tags=tags)
            case "datasets":
                self.client.log_inputs(run_id, [dataset_input(one) for one in record["values"].values()])
            case "model":
                if (path := run.folder / record["path"]).exists():  # if not, MLflow has it
                    made = NetworkFile(**json.loads(path.read_text()))
                    weights = Path(made.weights)
                    if not self._fetch(weights) or file_digest(weights) != made.digest:
                        raise Refused(f"{weights} is gone, or another file than the run has made")
                    log_model(self.client, run_id, made)
            case "file":
                if (path := run.folder / record["path"]).exists():  # if not, MLflow has it
                    self.client.log_artifact(run_id, str(path), record["folder"])
            case "end":
                self.client.set_terminated(run_id, record["status"], record["at"])
            case "replayed":
                pass  # MLflow has the step
            case "unreadable":
                raise Refused("the record cannot be read")

    def _points(self, run_id: str, part: Sequence[Record]) -> Iterator[entities.Metric]:
        """The points of records of metrics, tied to the run's model and its datasets where they are about them."""
        for record in part:
            model = find_model(self.client, run_id) if "of" in record else None
            for key, value in record["values"].items():
                point = key, value, record["at"], record["step"]
                about = [of for first, of in record.get("of", {}).items() if key.startswith(first)] if model else []
                yield entities.Metric(*point, *([model.model_id] if model else []), *(about[0] if about else []))

    def _resolved(self, text: str) -> str:
        """A tag's value with MLflow's ids in place of the names that runs go by until they have one."""
        if text.startswith(REFERENCE):
            return _known(self.runs.get(text.removeprefix(REFERENCE)))
        return re.sub(f"{REFERENCE}([\\w.%-]+)", lambda name: _known(self.runs.get(name[1])), text)


def _pause(failures: int) -> float:
    return min(2.0**failures / 4, LONGEST_PAUSE)


def _known(run: Run | None) -> str:
    """MLflow's id of a run."""
    if run is None or run.run_id is None:
        raise Refused("MLflow did not make the run")
    return run.run_id
