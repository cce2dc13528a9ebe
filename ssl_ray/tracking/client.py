"""MLflow's client as we use it: settings, the tags that a run is found by, and what an error means.

Other modules of this package take MLflow's names from here, so that the settings are made before mlflow is imported.
"""

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from logging import CRITICAL, getLogger
from typing import TypeAlias

os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")  # read when mlflow is imported
# By itself MLflow repeats a request whose answer got lost, "create a run" included; here it is looked up first.
os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "60")
os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")

from mlflow.entities import Metric as Metric
from mlflow.entities import Param as Param
from mlflow.entities import Run
from mlflow.entities import RunTag as RunTag
from mlflow.exceptions import MlflowException as MlflowException
from mlflow.tracking import MlflowClient
from requests.exceptions import HTTPError

from ssl_ray.errors import UserError

# The one private name of MLflow here. This logger tells of every table that MLflow creates, and shows a traceback
# whenever a database does not answer. If MLflow renames it, these lines appear in the terminal; nothing else changes.
getLogger("mlflow.store.db.utils").setLevel(CRITICAL)

MlflowRun: TypeAlias = Run
KEY, KIND, PARENT = "ssl_ray.key", "ssl_ray.kind", "mlflow.parentRunId"


class Away(UserError):  # noqa: N818
    """MLflow does not answer; says why."""


class Refused(Exception):  # noqa: N818
    """MLflow answers, and does not take something; says why."""


class Client(MlflowClient):
    """MLflow's client, and two questions more."""

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


@contextmanager
def timeout(seconds: int) -> Iterator[None]:
    """Within, a request to MLflow is given up after so many seconds, unless it would have been earlier anyway."""
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


def reason(error: BaseException) -> str:
    """What is wrong, on one short line and without passwords."""
    text = " ".join(str(error).split()) or type(error).__name__
    known = re.search(r"\[Errno -?\d+\] ([^'\")]+)|(too many \d+ error responses)|(Read timed out)", text)
    return without_password(known[known.lastindex or 0] if known else text)[:200]


def without_password(text: str) -> str:
    """A text whose URLs have no user name and password any more."""
    return re.sub(r"://[^/@\s]+@", "://", text)
