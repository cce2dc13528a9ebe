"""Two processes on one study would overwrite each other's work."""

import os
from pathlib import Path

import pytest

from ssl_ray.errors import UserError
from ssl_ray.storage.folders import Folders
from ssl_ray.study.lock import only_one


def test_the_second_on_a_study_is_refused_with_the_name_of_the_first(tmp_path: Path) -> None:
    """Another study in the same folder is not kept waiting; the lock ends with the work."""
    folders, others = Folders.of("a", str(tmp_path)), Folders.of("b", str(tmp_path))
    refused = pytest.raises(UserError, match=f"another process works on this study: .*process {os.getpid()}")
    with only_one(folders), only_one(others), refused, only_one(folders):
        pass
    with only_one(folders):
        pass
