"""MLflow's client as we use it: settings, the tags that a run is found by, and what an error means.

Other modules of this package take MLflow's names from here, so that the settings are made before mlflow is imported.
"""

import os
import re
import shlex
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from logging import CRITICAL, getLogger
from pathlib import Path
from threading import Lock
from typing import TypeAlias

os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")  # read when mlflow is imported
os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
# By itself MLflow repeats a request whose answer got lost, "create a run" included; here it is looked up first.
os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "60")
os.environ.setdefault("MLFLOW_LOGGING_LEVEL", "WARNING")  # of every model it would tell that it looks at the example
os.environ.setdefault("MLFLOW_UV_AUTO_DETECT", "false")  # a model needs what it says, not what lies in this folder
os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")

from mlflow import entities as entities
from mlflow.artifacts import download_artifacts as download_artifacts
from mlflow.exceptions import MlflowException as MlflowException
from mlflow.tracking import MlflowClient
from mlflow.tracking.context.registry import resolve_tags
from requests.exceptions import HTTPError

from ssl_ray.errors import UserError
from ssl_ray.storage.files import UNIQUE, appearing, remove_stale
from ssl_ray.text import without_password
from ssl_ray.tracking.uri import sqlite_file

# A private name of MLflow, as is MAX_RETRY_COUNT below. This logger tells of every table that MLflow creates, and shows
# a traceback whenever a database does not answer. If MLflow renames it, these lines appear in the terminal; no more.
getLogger("mlflow.store.db.utils").setLevel(CRITICAL)

MlflowRun: TypeAlias = entities.Run
_GIT = "mlflow.source.git."
_ONE_TIMEOUT = Lock()  # the setting is the whole process's
KEY, KIND, PARENT, STUDY = "ssl_ray.key", "ssl_ray.kind", "mlflow.parentRunId", "ssl_ray.study"
DEVICE = "ssl_ray.device"
"""Tag of a pretraining or a trial: the kind of GPU that it last ran on, or CPU."""
NOTE = "mlflow.note.content"
"""Tag: the description of a run or experiment, in Markdown."""


class Away(UserError):  # noqa: N818
    """MLflow does not answer; says why."""


class Refused(Exception):  # noqa: N818
    """MLflow answers, and does not take something; says why."""


class Client(MlflowClient):
    """MLflow's client, and two questions more."""

    def __init__(self, uri: str) -> None:
        if not uri.startswith(("http", "databricks")):
            from mlflow.store.db import utils

            utils.MAX_RETRY_COUNT = 1  # instead of ten tries in 100 seconds: `Delivery` tries again by itself
            if file := sqlite_file(uri):
                _begin(file)
        super().__init__(uri)

    def find(self, experiment_id: str | None, **tags: str) -> list[MlflowRun]:
        """Runs whose tags (`kind`, `key`, `parent`) match, newest first."""
        names = {"kind": KIND, "key": KEY, "parent": PARENT}
        terms = " and ".join(f"tags.`{names[name]}` = '{value}'" for name, value in tags.items())
        # 50,000 runs are the most that MLflow gives at once.
        return list(self.search_runs([experiment_id], terms, max_results=50_000, order_by=["start_time DESC"]))

    def steps(self, run_id: str) -> dict[str, list[int]]:
        """Steps of every metric of a run."""
        metrics = self.get_run(run_id).data.metrics
        return {metric: [point.step for point in self.get_metric_history(run_id, metric)] for metric in metrics}


def _begin(database: Path) -> None:
    """See to it that MLflow's SQLite file is there, with all tables.

    By itself MLflow makes them in the file, in some fifty steps that are each for good: cut off between two of them, or
    where two processes do it at once, no MLflow ever opens the file again.
    """
    # At the end: its journal.
    remove_stale(database.parent, rf"\.{re.escape(database.name)}\.{UNIQUE}\.part(-\w+)?", seconds=3600)
    if database.exists():
        return
    from mlflow.store.tracking import DEFAULT_LOCAL_FILE_AND_ARTIFACT_PATH
    from mlflow.store.tracking.sqlalchemy_store import SqlAlchemyStore

    with appearing(database, replace=False) as part:
        store = SqlAlchemyStore(f"sqlite:///{part}", DEFAULT_LOCAL_FILE_AND_ARTIFACT_PATH)
        store.engine.dispose()  # close the file, so that all is in it and nobody has it open by its first name


@contextmanager
def timeout(seconds: int) -> Iterator[None]:
    """Within, a request to MLflow is given up after so many seconds, unless it would have been earlier anyway."""
    with _ONE_TIMEOUT:
        usual = os.environ["MLFLOW_HTTP_REQUEST_TIMEOUT"]
        os.environ["MLFLOW_HTTP_REQUEST_TIMEOUT"] = str(min(seconds, int(usual)))
        try:
            yield
        finally:
            os.environ["MLFLOW_HTTP_REQUEST_TIMEOUT"] = usual


def is_refusal(error: BaseException) -> bool:
    """Whether MLflow itself says no, rather than being away, overloaded or not letting anybody in."""
    if isinstance(error, HTTPError) and error.response is not None:
        status = error.response.status_code
    elif isinstance(error, MlflowException):
        # A proxy in front of MLflow has its own 404 while MLflow starts.
        status = 503 if error.error_code == "ENDPOINT_NOT_FOUND" else error.get_http_status_code()
    else:
        return isinstance(error, (Refused, UserError))
    return 400 <= status < 500 and status not in (401, 403, 408, 429)


def why(error: BaseException) -> str:
    """What is wrong, on one short line and without passwords."""
    text = " ".join(str(error).split()) or type(error).__name__
    known = re.search(r"\[Errno -?\d+\] ([^'\")]+)|(too many \d+ error responses)|(Read timed out)", text)
    return without_password(known[known.lastindex or 0] if known else text)[:200]


def source() -> dict[str, str]:
    """Tags of MLflow's own names: the command, who has given it, and the commit, if this package is in a checkout."""
    program = Path(sys.argv[0]).name
    # Word by word: quoted for the shell, a password with an apostrophe no longer looks like a part of its URI.
    words = map(without_password, sys.argv[1:])
    command = shlex.join(["ssl-ray" if program == "__main__.py" else program, *words])
    found: dict[str, str] = resolve_tags({"mlflow.source.name": command})
    tags = {key: value for key, value in found.items() if not key.startswith(_GIT)}  # of what lies around the program
    with suppress(Exception):  # no git, no checkout, or one that git does not trust
        from git import Repo

        repo = Repo(Path(__file__).parent, search_parent_directories=True)
        if repo.git.ls_files(__file__):  # not a virtual environment inside of somebody's checkout
            tags[f"{_GIT}commit"] = repo.head.commit.hexsha
            if repo.is_dirty():
                tags["ssl_ray.changed_since_commit"] = "true"
    return tags
