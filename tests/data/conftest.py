"""What tests of preparing and of the store begin with."""

from pathlib import Path

import pytest
from volumes import make_case

from ssl_ray.data.datalist import Case
from ssl_ray.data.store import Store


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "store")


@pytest.fixture
def case(tmp_path: Path) -> Case:
    return make_case(tmp_path)
