"""MLflow's client as we use it: settings, the tags that a run is found by, and what an error means.

Other modules of this package take MLflow's names from here, so that the settings are made before mlflow is imported.
"""

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from logging import CRITICAL, getLogger
from typing import Any, TypeAlias

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
BATCH = {"metrics": 1000, "params": 100, "tags": 100}
"""How many of a kind MLflow takes in one request."""


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


class Away(UserError):  # noqa: N818
    """MLflow does not answer; says why."""


class Refused(Exception):  # noqa: N818
    """MLflow answers, and does not take something; says why."""


class Client(MlflowClient):
    """MLflow's client, and three questions more."""

    def find(self, experiment_id: str | None, **tags: str) -> list[MlflowRun]:
        """Runs whose tags (`kind`, `key`, `parent`) match, newest first."""
        names = {"kind": KIND, "key": KEY, "parent": PARENT}
        terms = " and ".join(f"tags.`{names[name]}` = '{value}'" for name, value in tags.items())
        found: list[MlflowRun] = []
        token = None
        while True:
            page = self.search_runs([experiment_id], terms, order_by=["start_time DESC"], page_token=token)
            found += page
            token = page.token
            if not token:
                return found

    def steps(self, run_id: str) -> dict[str, set[int]]:
        """Steps of every metric of a run."""
        metrics = self.get_run(run_id).data.metrics
        return {metric: {point.step for point in self.get_metric_history(run_id, metric)} for metric in metrics}

    def is_gone(self, run_id: str) -> bool:
        """Whether a run was deleted, or is not known to MLflow at all."""
        try:
            return bool(self.get_run(run_id).info.lifecycle_stage == "deleted")
        except MlflowException as error:
            if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                raise
            return True


def requests(records: Sequence[dict[str, Any]]) -> list[list[dict[str, Any]]]:
    """Records of one kind in lists that fit into a request; metrics, parameters and tags with one value a record."""
    kind = records[0]["do"]
    if kind not in BATCH:
        return [list(records)]
    single = [record | {"values": {key: value}} for record in records for key, value in record["values"].items()]
    return [single[at : at + BATCH[kind]] for at in range(0, len(single), BATCH[kind])]


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
    inner = re.search(r"\[Errno -?\d+\] ([^'\")]+)", text) or re.search(r"(too many \d+ error responses)", text)
    return without_password(inner[1] if inner else text)[:200]


def without_password(text: str) -> str:
    """A text whose URLs have no user name and password any more."""
    return re.sub(r"://[^/@\s]+@", "://", text)
