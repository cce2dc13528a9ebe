"""Where a study's MLflow is. MLflow itself takes a second to import, and is not imported here."""

import os
import sqlite3
from contextlib import closing
from pathlib import Path

from ssl_ray.config.schema import Tracking
from ssl_ray.errors import UserError
from ssl_ray.storage.folders import Folders
from ssl_ray.text import check_encoded

URI = "MLFLOW_TRACKING_URI"
"""Environment variable of MLflow's own; a study that names a server does not read it."""


def tracking_uri(settings: Tracking, folders: Folders) -> str:
    """Where MLflow keeps the runs: `tracking.uri`, or else MLFLOW_TRACKING_URI, or else SQLite in the output folder.

    A study that was begun with SQLite stays there, whatever the variable says: on a server all would be trained again.
    A UserError where it would be SQLite, and the output folder cannot hold it, or no URI of SQLAlchemy's can name it.
    """
    path, variable = folders.output.folder / "mlflow.db", os.environ.get(URI)
    begun = variable and not folders.output.origin and _has_experiment(path, settings.experiment or folders.name)
    if uri := settings.uri or (None if begun else variable):
        check_encoded("tracking.uri" if settings.uri else URI, uri)
        return uri
    if folders.output.origin:
        raise UserError(
            "output: in an object store there is no place for MLflow's database, so tracking.uri must name a server"
        )
    if set("?%") & set(str(path)):
        raise UserError(f"output: MLflow's database cannot lie at {path}: no ? and no %, or a server in tracking.uri")
    return f"sqlite:///{path}"


def sqlite_file(uri: str) -> Path | None:
    """The file that a tracking URI of SQLite names; None for servers, other databases, and one in memory."""
    scheme, _, path = uri.partition("?")[0].partition(":///")
    return Path(path) if scheme == "sqlite" and path and not path.startswith((":", "file:")) else None


def _has_experiment(database: Path, name: str) -> bool:
    """Whether a database of MLflow's, which other studies may have made, has an experiment, also a deleted one.

    One that cannot be read may have it: MLflow says what is wrong with it.
    """
    if not database.exists():
        return False
    try:
        with closing(sqlite3.connect(f"{database.as_uri()}?mode=ro", uri=True)) as opened:
            return opened.execute("SELECT 1 FROM experiments WHERE name = ?", (name,)).fetchone() is not None
    except sqlite3.Error:
        return True
