"""What MLflow shows as a run's source: the command, who has given it, and the commit of this package."""

import shlex
import sys
from contextlib import suppress
from pathlib import Path

from ssl_ray.tracking.client import resolve_tags

_GIT = "mlflow.source.git."


def source() -> dict[str, str]:
    """Tags of MLflow's own names; the commit only where this package is part of a checkout, with what was changed."""
    program = Path(sys.argv[0]).name
    command = shlex.join(["ssl-ray" if program == "__main__.py" else program, *sys.argv[1:]])
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
