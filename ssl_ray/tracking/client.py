"""MLflow's client as we use it: settings, the tags that a run is found by, and what an error means.

Other modules of this package take MLflow's names from here, so that the settings are made before mlflow is imported.
"""

import os
import re
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

from mlflow.artifacts import download_artifacts as download_artifacts
from mlflow.entities import Dataset as Dataset
from mlflow.entities import DatasetInput as DatasetInput
from mlflow.entities import InputTag as InputTag
from mlflow.entities import LoggedModel as LoggedModel
from mlflow.entities import LoggedModelOutput as LoggedModelOutput
from mlflow.entities import LoggedModelStatus as LoggedModelStatus
from mlflow.entities import Metric as Metric
from mlflow.entities import Param as Param
from mlflow.entities import Run
from mlflow.entities import RunTag as RunTag
from mlflow.exceptions import MlflowException as MlflowException
from mlflow.tracking import MlflowClient
from mlflow.tracking.context.registry import resolve_tags as resolve_tags
from requests.exceptions import HTTPError
from sqlalchemy import make_url

from ssl_ray.errors import UserError
from ssl_ray.text import without_password

# A private name of MLflow, as is MAX_RETRY_COUNT below. This logger tells of every table that MLflow creates, and shows
# a traceback whenever a database does not answer. If MLflow renames it, these lines appear in the terminal; no more.
getLogger("mlflow.store.db.utils").setLevel(CRITICAL)

MlflowRun: TypeAlias = Run
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
        super().__init__(uri)
        if uri.startswith("sqlite:") and "%" in uri:
            # MLflow makes the folder of the URI as it is written, percent signs included, beside the one that is meant.
            with suppress(OSError):  # not empty: it is the one that is meant
                os.removedirs(Path(uri.removeprefix("sqlite:///")).parent)

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


def database_uri(path: Path) -> str:
    """The URI of an SQLite file; a UserError where this version of SQLAlchemy, which MLflow uses, has none for it."""
    for text in (str(path), str(path).replace("%", "%25").replace("?", "%3F")):
        if make_url(uri := f"sqlite:///{text}").database == str(path):
            return uri
    raise UserError(f"output: MLflow's database cannot lie at {path}: no ? and no %xx, or a server in tracking.uri")


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
