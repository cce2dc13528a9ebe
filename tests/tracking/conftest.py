"""Trackers that are stopped after the test, a real MLflow server, and what the user was told."""

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from outside import Said, Server
from studies import place_database

from ssl_ray.config.schema import Tracking
from ssl_ray.storage.folders import Folders
from ssl_ray.tracking.tracker import Tracker


@pytest.fixture(scope="session")
def database(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An empty database of MLflow's."""
    path = tmp_path_factory.mktemp("database") / "mlflow.db"
    place_database(path)
    return path


@pytest.fixture
def folders(tmp_path: Path) -> Folders:
    """Of a study that has the name of the test, and so an experiment of its own on a shared server."""
    return Folders.of(tmp_path.name, str(tmp_path / "output"))


@pytest.fixture
def track(folders: Folders, database: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Tracker]]:
    """Make a tracker of the study, on a server or its own database; one at a time delivers, as in a study."""
    monkeypatch.setattr("ssl_ray.tracking.delivery.LONGEST_PAUSE", 0.4)
    made: list[Tracker] = []

    def make(uri: str | None = None, create: bool = True) -> Tracker:
        own = folders.output.folder / "mlflow.db"
        if uri is None and not own.exists():
            own.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(database, own)
        for tracker in made:
            tracker.stop()
        made.append(Tracker(Tracking(uri=uri), folders, create))
        return made[-1]

    yield make
    for tracker in made:
        tracker.stop()


@pytest.fixture
def said(capsys: pytest.CaptureFixture[str]) -> Said:
    return Said(capsys)


@pytest.fixture(scope="session")
def one_server(tmp_path_factory: pytest.TempPathFactory, database: Path) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("server")
    shutil.copyfile(database, folder / "mlflow.db")
    server = Server(folder)
    server.start()
    yield server
    server.kill()


@pytest.fixture
def server(one_server: Server) -> Server:
    """The server that all tests share, started again where the test before left it dead."""
    if not one_server.answers():
        one_server.start()
    return one_server
