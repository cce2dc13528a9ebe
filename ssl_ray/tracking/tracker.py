"""MLflow: one experiment a study, one run a pretraining, one parent run for the grid with a child run a trial.

Only the driver speaks to MLflow. What it writes goes to a journal on disk first and from there, in a thread of its own,
to MLflow: neither a slow server nor one that is away slows or stops a training. A run is found again by the tag
`ssl_ray.key`, a digest of everything that its result depends on.
"""

import hashlib
import math
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Mapping
from contextlib import suppress
from operator import attrgetter
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import quote

from ssl_ray.config.schema import Tracking
from ssl_ray.console import say
from ssl_ray.errors import UserError
from ssl_ray.storage.folders import Folders
from ssl_ray.text import without_password
from ssl_ray.tracking.client import KEY as KEY
from ssl_ray.tracking.client import NOTE as NOTE
from ssl_ray.tracking.client import (
    PARENT,
    STUDY,
    Away,
    Client,
    MlflowException,
    MlflowRun,
    entities,
    source,
    timeout,
    why,
)
from ssl_ray.tracking.delivery import Delivery
from ssl_ray.tracking.models import register
from ssl_ray.tracking.run import REFERENCE, Record, now
from ssl_ray.tracking.run import Run as Run
from ssl_ray.tracking.uri import URI, sqlite_file, tracking_uri
from ssl_ray.tracking.view import experiment_tags, link

T = TypeVar("T")
PRETRAINING_RUN = "ssl_ray.pretraining_run"
"""Tag of a trial that started from pretrained weights: the id of the run that made them."""


class MissingExperiment(UserError):  # noqa: N818
    """MLflow answers, but has no experiment of that name."""


class Tracker:
    """The study's MLflow experiment.

    Whatever is read has what was written before. While MLflow is away, a training (`create`) finds only what its
    journal has as finished; anybody else gets a UserError.

    Attributes:
        study: its name.
        facts: tags of every run that is opened: who has started what, which code, on what.
    """

    def __init__(self, settings: Tracking, folders: Folders, create: bool = True) -> None:
        """Args:
        settings: tracking URI and experiment; see `tracking_uri` and the study's name where they are left out.
        folders: of the study; the journals lie in `<study>/journal`.
        create: make the experiment where it does not exist yet, and deliver what this process and those before it have
            logged, which only one process may; if not, MLflow has to answer.

        Raises:
            UserError: when the experiment does not exist and is not to be made, or when MLflow does not answer, unless
                it did so before and the journal therefore knows that the address is right.
        """
        self.uri = tracking_uri(settings, folders)
        self.experiment, self._create = settings.experiment or folders.name, create
        self.study, self._opened = folders.name, set[str]()
        self.facts = {STUDY: folders.name, **source()}
        # As a name: `/Shared/ct` or `..` must not lead out of the folder.
        self._artifacts = folders.output.folder / "artifacts" / quote(self.experiment, safe=" ").lstrip(".")
        # Another server, experiment or format begins another journal: run ids of one mean nothing to the other.
        name = hashlib.sha256(f"format 3 {without_password(self.uri)} {self.experiment}".encode()).hexdigest()[:12]
        home = folders.study / "journal" / name
        self._delivery = delivery = Delivery(self.uri, home, self._find, folders.output.pull)
        if (variable := os.environ.get(URI)) and not settings.uri:
            begun = f"where the study was begun, so {URI} is not read"
            taken = f"out of {URI}, as tracking.uri is not set"
            delivery.place += f" ({taken if self.uri == variable else begun})"
            if create:
                say(f"MLflow: {delivery.place}")
        if not create and (database := sqlite_file(self.uri)) and not database.exists():
            raise self._missing  # asking MLflow would make it
        try:
            if create:
                folders.output.folder.mkdir(parents=True, exist_ok=True)
            with timeout(5):  # a wrong address is to be found out within seconds
                delivery.experiment_id = delivery.ask(self._find)
        except (Away, MlflowException, OSError) as error:
            delivery.set_away(delivery.away or why(error))
            if not create or not home.is_dir():
                text = f"tracking.uri: MLflow at {delivery.place} does not answer ({delivery.away})"
                raise UserError(text) from error
        if create:
            if not home.is_dir() and [*folders.study.glob("journal/*")]:
                say(f"WARNING: {self._where}: not where the study was begun; what was finished there is not known here")
            home.mkdir(parents=True, exist_ok=True)
            delivery.start()
        else:
            self.settle()  # says what only the next training delivers

    @property
    def _where(self) -> str:
        return f"{self._delivery.place}: MLflow experiment {self.experiment!r}"

    @property
    def _missing(self) -> MissingExperiment:
        return MissingExperiment(f"{self._where} does not exist; run the study first, or this in its folder")

    def _find(self, client: Client) -> str:
        """MLflow's id of the experiment, which is made if need be."""
        found = client.get_experiment_by_name(self.experiment)
        if found is None and not self._create:
            raise self._missing
        if found is None:
            # A local store would put artifacts under the current directory; a server decides for itself.
            artifacts = None if self.uri.startswith(("http", "databricks")) else self._artifacts.as_uri()
            return str(client.create_experiment(self.experiment, artifacts, experiment_tags(self.study)))
        if found.lifecycle_stage == "deleted":
            raise UserError(f"{self._where} is deleted; restore it, or name another one in tracking.experiment")
        for key, value in experiment_tags(self.study).items():
            if found.tags.get(key) != value:
                client.set_experiment_tag(found.experiment_id, key, value)
        return str(found.experiment_id)

    def link(self, server: str) -> str:
        """Where the study's trials are compared, on the MLflow server at this address."""
        return link(server, self._delivery.experiment_id or "", self.study)

    @property
    def client(self) -> Client:
        """MLflow's own client."""
        self._delivery.catch_up(30)
        return self._delivery.client

    def runs(self, **tags: str) -> list[MlflowRun]:
        """Runs whose tags (`kind`, `key`, `parent`) match, newest first."""
        return self._ask(lambda client, _: client.find(self._delivery.experiment_id, **tags), [])

    def finished(self, kind: str, key: str) -> str | None:
        """Id of the finished run of a key; by the journal where MLflow is away or has not heard of the run yet."""
        run = self._delivery.runs.get(_name(kind, key))
        done = run.id if run and run.summary.status == "FINISHED" else None
        if run and done and (run.waiting or run.run_id is None):
            return done
        try:
            found = self._delivery.ask(lambda client: client.find(self._delivery.experiment_id, kind=kind, key=key))
        except Away:
            return done
        return next((one.info.run_id for one in found if one.info.status == "FINISHED"), None)

    def history(self, run_id: str, metric: str) -> dict[int, float]:
        """Values of a metric by step, ascending."""
        return {one.step: one.value for one in sorted(self.points(run_id, metric), key=attrgetter("step", "timestamp"))}

    def points(self, run_id: str, metric: str) -> list[entities.Metric]:
        """Values of a metric, with their steps and times in ms, in no order."""
        return self._ask(lambda client, run: list(client.get_metric_history(run, metric)), [], run_id)

    def files(self, run_id: str, folder: str | None = None) -> list[str]:
        """Paths of a run's artifacts in one folder, numbers in order."""
        items: list[Any] = self._ask(lambda client, run: client.list_artifacts(run, folder), [], run_id)
        paths = [item.path for item in items if not item.is_dir]
        return sorted(paths, key=lambda path: re.sub(r"\d+", lambda number: number[0].zfill(12), path))

    def read(self, run_id: str, path: str) -> bytes | None:
        """Content of an artifact, or None where the run has none of that path."""
        if path not in self.files(run_id, path.rpartition("/")[0] or None):
            return None
        with tempfile.TemporaryDirectory() as folder:
            got = self._ask(lambda client, run: client.download_artifacts(run, path, folder), None, run_id)
            return Path(got).read_bytes() if got else None

    def attach(self, run_id: str, path: Path, folder: str | None = None) -> None:
        """Log a file with a run that may have ended long ago."""
        self._ask(lambda client, run: client.log_artifact(run, str(path), folder), None, run_id)

    def conclude(self, run_id: str, metrics: Mapping[str, float], tags: Mapping[str, str]) -> None:
        """Log metrics and tags with a run that may have ended long ago, in place of those that it had.

        A metric that it has under the same first name, e.g. `answer/`, and that is not among these, becomes nan.
        """
        first = {name.partition("/")[0] for name in metrics}
        had: dict[str, float] = self._ask(lambda client, run: client.get_run(run).data.metrics, {}, run_id)
        gone = {name: math.nan for name in had if name.partition("/")[0] in first}
        points = [entities.Metric(name, value, now(), 0) for name, value in {**gone, **metrics}.items()]
        named = [entities.RunTag(name, value) for name, value in tags.items()]
        self._ask(lambda client, run: client.log_batch(run, points, (), named), None, run_id)

    def register(self, name: str, about: str, run_id: str, description: str) -> None:
        """Make the model of a run the `best` version of a registered one; `about` is of all versions."""
        self._ask(lambda client, run: register(client, name, about, run, description), None, run_id)

    def describe(self, text: str) -> None:
        """Describe the experiment, in Markdown."""
        tag = self._delivery.experiment_id, NOTE, text
        self._ask(lambda client, _: client.set_experiment_tag(*tag), None)

    def open(
        self,
        kind: str,
        key: str,
        name: str,
        params: Mapping[str, Any],
        parent: str | None = None,
        tags: Mapping[str, str] | None = None,
    ) -> Run:
        """The run of a key, new or taken up again; one that was deleted in MLflow is a new one.

        Args:
            key: digest of everything that its result depends on.
            params: those that the run has already stay as they are.
            parent: `id` of the run that this one belongs to.
            tags: a value that is another run's `id` becomes MLflow's id of it.
        """
        delivery, journal = self._delivery, _name(kind, key)
        record: Record = {"do": "open", "at": now(), "kind": kind, "key": key, "name": name}
        with delivery.wake:
            run = delivery.runs.setdefault(journal, Run(delivery.folder / journal, delivery.wake))
        # Ray Tune waits meanwhile. Without an answer (two tries), the journal knows what this machine has logged.
        with suppress(Away, MlflowException, OSError), timeout(5):
            found = delivery.ask(lambda client: client.find(delivery.experiment_id, kind=kind, key=key))
            if not found and run.run_id and not run.waiting:
                shutil.rmtree(run.folder)
                run = delivery.runs[journal] = Run(run.folder, delivery.wake)
            if found and journal not in self._opened:  # another machine may have gone on with it
                steps = delivery.ask(lambda client: client.steps(found[0].info.run_id))
                new = {metric: sorted(set(theirs) - run.logged(metric)) for metric, theirs in steps.items()}
                record["known"] = {metric: theirs for metric, theirs in new.items() if theirs}
            self._opened.add(journal)
        run.append(record)
        run.params(params)
        run.tags({**self.facts, **(tags or {}), **({PARENT: parent} if parent else {})})
        return run

    def settle(self, timeout: float = 60) -> int:
        """Wait at the end of a study until MLflow has everything, and say what it has not -> records that are left."""
        delivery = self._delivery
        delivery.catch_up(timeout, even_away=True)
        if left := delivery.left:
            say(f"MLflow has not got everything: {left} records are in {delivery.folder} for the study's next run")
        return left

    def stop(self) -> None:
        """Deliver no more in this process; what is left stays on disk for the next tracker."""
        self._delivery.stop()

    def _ask(self, question: Callable[[Client, str], T], nothing: T, run_id: str = "") -> T:
        """An answer of MLflow, e.g. about a run, which gets `nothing` where MLflow has not made it yet."""
        self._delivery.catch_up(30)
        run = self._delivery.runs.get(run_id.removeprefix(REFERENCE))
        real = run.id if run else run_id
        if real.startswith(REFERENCE):
            return nothing
        try:
            return self._delivery.ask(lambda client: question(client, real))
        except Away:
            if self._create:
                return nothing
            raise


def rename_experiment(settings: Tracking, folders: Folders, name: str) -> bool:
    """Give the study's MLflow experiment another name, once it has everything -> whether there was one."""
    try:
        tracker = Tracker(settings, folders, create=False)
    except MissingExperiment:
        return False
    tracker._delivery.start()
    try:
        if left := tracker.settle(30):
            raise UserError(f"{folders.study}: MLflow has yet to get {left} records; it has to have them first")
        tracker.client.rename_experiment(tracker._delivery.experiment_id, name)
    except MlflowException as error:
        raise UserError(f"tracking.experiment: MLflow does not rename it ({why(error)})") from error
    finally:
        tracker.stop()
    return True


def _name(kind: str, key: str) -> str:
    return f"{kind}-{quote(key, safe='')}"
