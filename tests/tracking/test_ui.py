"""`ssl-ray ui` as a person runs it."""

import os
import subprocess
import sys
import time
from pathlib import Path
from urllib.parse import urlsplit

import psutil
import pytest
import requests
from studies import place_database, small_study, small_tree, write_study

from ssl_ray.study.parts import tracker_of

pytestmark = pytest.mark.slow


@pytest.mark.filterwarnings("ignore:.*sqlite.*")
def test_the_command_serves_the_studys_store_until_it_is_ended(tmp_path: Path) -> None:
    """The link that it prints is whole, its server has the experiment and its view, and nothing is left afterwards.

    No process shows the password of the store on its command line, which everybody can read.
    """
    tracking = {"uri": f"sqlite:///{tmp_path / 'mlflow.db'}?password=hunter"}
    path = write_study(tmp_path / "small.yaml", small_tree(tmp_path, tracking=tracking))
    place_database(tmp_path / "mlflow.db")
    tracker = tracker_of(small_study(tmp_path, tracking=tracking))
    tracker.stop()
    log = tmp_path / "ui.log"
    with log.open("wb") as out:
        command = [sys.executable, "-m", "ssl_ray", "ui", str(path), "--no-browser"]
        process = subprocess.Popen(command, stdout=out, stderr=out, env={**os.environ, "PYTHONUNBUFFERED": "1"})
    try:
        deadline = time.monotonic() + 120
        while "Ctrl-C ends it" not in log.read_text():
            assert process.poll() is None, log.read_text()
            assert time.monotonic() < deadline, log.read_text()
            time.sleep(0.2)
        link = urlsplit(log.read_text().partition("MLflow:")[2].split()[0])
        number, _, asked = link.fragment.removeprefix("/experiments/").partition("/runs?")
        assert link.hostname == "127.0.0.1"
        key = dict(pair.split("=") for pair in asked.split("&"))["viewStateShareKey"]
        answer = requests.get(
            f"http://{link.netloc}/api/2.0/mlflow/experiments/get", params={"experiment_id": number}, timeout=30
        ).json()
        assert answer["experiment"]["name"] == tracker.experiment
        assert f"mlflow.sharedViewState.{key}" in {tag["key"] for tag in answer["experiment"]["tags"]}
        started = psutil.Process(process.pid).children(recursive=True)
        assert {"mlflow", "uvicorn"} <= {word for one in started for word in one.cmdline()}
        assert not [one for one in started if "hunter" in " ".join(one.cmdline())]
        assert "hunter" not in log.read_text()
        process.terminate()  # as Ctrl-C, which a test process in the background may ignore
        assert process.wait(60) == 0
        _, left = psutil.wait_procs(started, 30)
        assert not left
    finally:
        process.kill()
