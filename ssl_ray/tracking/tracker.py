"""MLflow: one experiment a study, one run a pretraining, one parent run for the grid with a child run a trial.

Only the driver speaks to MLflow. What it writes goes to a journal on disk first and from there, in a thread of its own,
to MLflow: neither a slow server nor one that is away slows or stops a training. A run is found again by the tag
`ssl_ray.key`, a digest of everything that its result depends on.
"""

import hashlib
import json
import logging
import tempfile
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import quote

from ssl_ray.tracking.sender import KEY as KEY  # first: it sets what MLflow reads when it is imported
from ssl_ray.tracking.sender import REFERENCE, reason

# isort: split
from mlflow.entities import Experiment, RunData, RunInfo
from mlflow.entities import Run as MlflowRun
from mlflow.exceptions import MlflowException
from mlflow.tracking import MlflowClient

from ssl_ray.config.schema import Tracking
from ssl_ray.console import say
from ssl_ray.storage.folders import Folders
from ssl_ray.tracking.delivery import Away, Delivery
from ssl_ray.tracking.journal import Journal
from ssl_ray.tracking.run import Run as Run
from ssl_ray.tracking.run import now

# Tells of every table that it creates, and shows a traceback every time that a database does not answer.
logging.getLogger("mlflow.store.db.utils").setLevel(logging.CRITICAL)

T = TypeVar("T")
PRETRAINING_RUN = "ssl_ray.pretraining_run"
"""Lineage: on a trial that started from pretrained weights, the id of the run that made them."""

_CONTACT_SECONDS = 10.0
"""How long a server that a study names for the first time may take to answer."""

_deliveries: dict[Path, Delivery] = {}
"""One thread a journal and process: the report's tracker reads what the training's tracker still writes."""


class MissingExperiment(ValueError):  # noqa: N818
    """MLflow answers, but has no experiment of that name."""


class Tracker:
    """The study's MLflow experiment. Whatever is read has what was written before, unless MLflow is away."""

    def __init__(self, settings: Tracking, folders: Folders, create: bool = True, deliver: bool | None = None) -> None:
        """Args:
        settings: tracking URI and experiment; the study's own database and name where they are left out.
        folders: of the study; the journal lies in `<study>/journal`.
        create: make the experiment where it does not exist yet; if not, MLflow has to answer.
        deliver: deliver what an earlier process left behind; as `create` says if left out. Only one process may.

        Raises:
            ValueError: when the experiment does not exist and is not to be made, or when MLflow does not answer, unless
                it did so before and the journal therefore knows that the address is right.
        """
        self.uri = settings.uri or f"sqlite:///{folders.output.folder / 'mlflow.db'}"
        self.experiment, self._create = settings.experiment or folders.name, create
        # Another server or experiment begins another journal: run ids of one mean nothing to the other.
        name = hashlib.sha256(f"{self.uri} {self.experiment}".encode()).hexdigest()[:12]
        home = folders.study / "journal" / name

        def find(client: MlflowClient) -> str | None:
            experiment = client.get_experiment_by_name(self.experiment)
            if experiment is not None:
                return str(experiment.experiment_id)
            if not create:
                return None
            # A local store would put artifacts under the current directory; a server decides for itself.
            artifacts = (folders.output.folder / "artifacts" / self.experiment).as_uri()
            return str(client.create_experiment(self.experiment, None if self.uri.startswith("http") else artifacts))

        self._delivery = delivery = _deliveries.get(home) or Delivery(self.uri, home, find)
        self._contact(find, home / "known.json")
        if deliver if deliver is not None else create:
            _deliveries[home] = delivery
            delivery.start()
        elif delivery.left and not delivery.running:
            say(f"{delivery.left} records for MLflow are still in {home}; the next run of the study delivers them")

    def _contact(self, find: Callable[[MlflowClient], str | None], known: Path) -> None:
        delivery = self._delivery

        def question() -> Experiment | None:
            found = find(delivery.sender.client)
            return None if found is None else delivery.sender.client.get_experiment(found)

        # A server that is there answers soon; a database on this disk may have to be made first.
        seconds = _CONTACT_SECONDS if self.uri.startswith("http") else 300.0
        try:
            if self.uri.startswith("sqlite:///"):
                Path(self.uri.removeprefix("sqlite:///")).parent.mkdir(parents=True, exist_ok=True)
            found = delivery.ask(question, seconds)
        except (Away, MlflowException, OSError) as error:
            if not self._create or not known.is_file():
                raise self._silent(reason(error)) from error
            delivery.sender.experiment_id = json.loads(known.read_text())["experiment_id"]
            delivery.lost(reason(error), say_it=True)
            return
        if found is None:
            raise MissingExperiment(
                f"{delivery.place}: no MLflow experiment named {self.experiment!r}; run the study first"
            )
        if found.lifecycle_stage == "deleted":
            raise ValueError(
                f"{delivery.place}: the MLflow experiment {self.experiment!r} is deleted; restore it, or name another "
                "one in tracking.experiment"
            )
        delivery.sender.experiment_id = found.experiment_id
        if self._create:
            known.parent.mkdir(parents=True, exist_ok=True)
            known.write_text(json.dumps({"experiment_id": found.experiment_id}))

    @property
    def client(self) -> MlflowClient:
        """MLflow's own client."""
        self._delivery.catch_up(30)
        return self._delivery.sender.client

    @property
    def experiment_id(self) -> str | None:
        """MLflow's id of the experiment."""
        return self._delivery.sender.experiment_id

    def runs(self, **tags: str) -> list[MlflowRun]:
        """Runs whose tags (`kind`, `key`, `parent`) match, newest first; none while MLflow is away from a training."""
        try:
            return self._ask(lambda: self._delivery.sender.find(**tags))
        except ValueError:
            if self._delivery.running and self._create:
                return []
            raise

    def finished(self, kind: str, key: str) -> MlflowRun | None:
        """The finished run of a key, or None; from the journal where MLflow is away or has not heard of it yet."""
        journal = self._delivery.journal(_name(kind, key))
        finished = journal is not None and journal.status == "FINISHED"
        self._delivery.catch_up(10, journal)
        if not (finished and journal and journal.left):
            with suppress(Away):  # the journal answers
                runs = self._delivery.ask(lambda: self._delivery.sender.find(kind=kind, key=key), 20)
                return next((run for run in runs if run.info.status == "FINISHED"), None)
        if not finished or journal is None:
            return None
        run_id = journal.run_id or REFERENCE + journal.name
        return MlflowRun(RunInfo(run_id, self.experiment_id or "", "", "FINISHED", 0, None, "active"), RunData())

    def history(self, run_id: str, metric: str) -> dict[int, float]:
        """Values of a metric by step, ascending."""
        points = self._ask(lambda: self._delivery.sender.client.get_metric_history(self._real(run_id), metric))
        return {point.step: point.value for point in sorted(points, key=lambda point: (point.step, point.timestamp))}

    def files(self, run_id: str, folder: str | None = None) -> list[str]:
        """Paths of a run's artifacts in one folder, sorted by name."""
        items = self._ask(lambda: self._delivery.sender.client.list_artifacts(self._real(run_id), folder))
        return sorted(item.path for item in items if not item.is_dir)

    def read(self, run_id: str, path: str) -> bytes | None:
        """Content of an artifact, or None where the run has none of that path; the journal's where MLflow is away."""
        try:
            if path not in self.files(run_id, path.rpartition("/")[0] or None):
                return None
            with tempfile.TemporaryDirectory() as folder:
                client = self._delivery.sender.client
                got = self._ask(lambda: client.download_artifacts(self._real(run_id), path, folder))
                return Path(got).read_bytes()
        except ValueError:
            journal = self._journal(run_id)
            if journal is None or not self._create:
                raise
            return journal.text(path)

    def attach(self, run_id: str, path: Path, folder: str | None = None) -> None:
        """Log a file with a run that may have ended long ago."""
        journal = self._journal(run_id)
        if journal and self._delivery.running:
            Run(self._delivery, journal).artifact(path, folder)
        else:
            self._delivery.sender.client.log_artifact(run_id, str(path), folder)

    def open(
        self,
        kind: str,
        key: str,
        name: str,
        params: Mapping[str, Any],
        parent: str | None = None,
        tags: Mapping[str, str] | None = None,
    ) -> "Run":
        """The run of a key, new or taken up again.

        Args:
            kind: what it is: pretraining, grid or trial.
            key: digest of everything that its result depends on.
            name: for the user.
            params: parameters; those that the run has already stay as they are.
            parent: `id` of the run that this one belongs to.
            tags: further tags; a value that is another run's `id` becomes MLflow's id of it.
        """
        journal = self._delivery.journal(_name(kind, key), create=True)
        assert journal is not None
        run = Run(self._delivery, journal)
        record = {"do": "open", "at": now(), "kind": kind, "key": key, "name": name, "parent": parent}
        record |= {"params": {key: str(value)[:6000] for key, value in params.items()}, "tags": dict(tags or {})}
        self._delivery.append(journal, record)
        return run

    def settle(self, timeout: float = 60) -> int:
        """Wait at the end of a study until MLflow has everything, and say what it has not -> records that are left."""
        delivery = self._delivery
        delivery.catch_up(timeout, even_away=True)
        for name, why in delivery.refused.items():
            say(f"MLflow refused something of run {name}: {why}; it is kept in {delivery.folder / name}")
        if left := delivery.left:
            why = f" ({delivery.away})" if delivery.away else ""
            say(
                f"MLflow at {delivery.place} has not got everything{why}: {left} records are kept in "
                f"{delivery.folder}; the next run of the study delivers them"
            )
        return left

    def stop(self) -> None:
        """Deliver no more in this process; what is left stays on disk for the next tracker."""
        self._delivery.stop()
        _deliveries.pop(self._delivery.folder, None)

    def _journal(self, run_id: str) -> Journal | None:
        return self._delivery.journal(run_id.removeprefix(REFERENCE))

    def _real(self, run_id: str) -> str:
        journal = self._journal(run_id)
        if run_id.startswith(REFERENCE) and journal and journal.run_id:
            return journal.run_id
        return run_id

    def _ask(self, question: Callable[[], T]) -> T:
        self._delivery.catch_up(30)
        try:
            return self._delivery.ask(question, 60)
        except Away as error:
            raise self._silent(str(error)) from error

    def _silent(self, why: str) -> ValueError:
        return ValueError(f"tracking.uri: MLflow at {self._delivery.place} does not answer ({why})")


def rename_experiment(settings: Tracking, folders: Folders, name: str) -> bool:
    """Give the study's MLflow experiment another name, once it has everything -> whether there was one.

    Raises:
        ValueError: when MLflow does not answer or refuses, or does not have everything yet.
    """
    try:
        tracker = Tracker(settings, folders, create=False, deliver=True)
    except MissingExperiment:
        return False
    try:
        if left := tracker.settle(30):
            raise ValueError(f"{folders.study}: MLflow has yet to get {left} records; it has to have them first")
        tracker.client.rename_experiment(tracker.experiment_id, name)
    except MlflowException as error:
        raise ValueError(f"tracking.experiment: MLflow does not rename it ({reason(error)})") from error
    finally:
        tracker.stop()
    return True


def _name(kind: str, key: str) -> str:
    return f"{kind}-{quote(key, safe='')}"
