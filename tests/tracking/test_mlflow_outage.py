"""MLflow goes away at the worst moments: every step arrives once, in order, as it was; no training notices."""

import contextlib
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import pytest
import runs
from mlflow.tracking import MlflowClient

from ssl_ray.config.loading import dump
from ssl_ray.config.schema import Study
from ssl_ray.study.parts import folders_of, tracker_of
from ssl_ray.tracking.journal import Journal
from ssl_ray.tracking.tracker import PRETRAINING_RUN

pytestmark = pytest.mark.slow
wait_for = partial(runs.wait_for, seconds=120)


class Server:
    """A real `mlflow server` with SQLite on loopback, to be killed and started again."""

    def __init__(self, folder):
        with socket.create_server(("127.0.0.1", 0)) as free:
            self.port = free.getsockname()[1]
        self.uri, self._folder, self._process = f"http://127.0.0.1:{self.port}", folder, None

    def start(self):
        command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(self.port)]
        command += ["--workers", "1", "--backend-store-uri", f"sqlite:///{self._folder / 'mlflow.db'}"]
        command += ["--artifacts-destination", str(self._folder / "artifacts")]
        log = (self._folder / "server.log").open("ab")
        self._process = subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True)
        wait_for(self._healthy, "mlflow server")

    def _healthy(self):
        with contextlib.suppress(OSError):
            return urllib.request.urlopen(f"{self.uri}/health", timeout=5).status == 200

    def kill(self):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()


class Proxy:
    """Forwards to the server; the answers to the next requests of a kind are kept back and the connection is cut."""

    def __init__(self, port):
        self._target, self._listener = port, socket.create_server(("127.0.0.1", 0))
        self.uri = f"http://127.0.0.1:{self._listener.getsockname()[1]}"
        self.cut, self.times, self.done = re.compile(rb"(?!)"), 0, 0
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self):
        while True:
            client, _ = self._listener.accept()
            server = socket.create_connection(("127.0.0.1", self._target))
            state = {"request": b""}
            threading.Thread(target=self._requests, args=(client, server, state), daemon=True).start()
            threading.Thread(target=self._answers, args=(client, server, state), daemon=True).start()

    def _requests(self, client, server, state):
        with contextlib.suppress(OSError):
            while data := client.recv(1 << 16):
                if line := re.match(rb"(?:GET|POST|PUT|PATCH) \S+", data):
                    state["request"] = line.group()
                server.sendall(data)
        close(server, client)

    def _answers(self, client, server, state):
        with contextlib.suppress(OSError):
            while data := server.recv(1 << 16):
                if self.times and self.cut.search(state["request"]):
                    self.times -= 1
                    self.done += 1
                    break
                client.sendall(data)
        close(server, client)


def close(*sockets):
    for one in sockets:
        with contextlib.suppress(OSError):
            one.shutdown(socket.SHUT_RDWR)
        one.close()


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    server = Server(tmp_path_factory.mktemp("server"))
    server.start()
    yield server
    server.kill()


@pytest.fixture
def running(server):
    """The server; it is started again for the next test where this one left it dead."""
    if not server._healthy():
        server.start()
    return server


@pytest.fixture
def said(monkeypatch):
    lines = []
    monkeypatch.setattr("ssl_ray.tracking.delivery.say", lines.append)
    monkeypatch.setattr("ssl_ray.tracking.tracker.say", lines.append)
    return lines


@pytest.fixture(autouse=True)
def short_pauses(monkeypatch):
    monkeypatch.setattr("ssl_ray.tracking.delivery._PAUSES", (0.1, 0.2, 0.4))


def make_study(tmp_path, uri):
    preparation = {"spacing": 2, "hu_window": [0, 1]}
    tree = {
        "name": tmp_path.name,
        "output": str(tmp_path / "output"),
        "pretrain": {"sources": [{"root": "x", "datalist": "x.json"}], "preparation": preparation},
        "finetune": {"cohort": {"root": "x", "classes": 2, "splits": {1: "x.json"}}, "preparation": preparation},
        "tracking": {"uri": uri},
    }
    return Study.model_validate(tree)


def journalled(study, name):
    """(metric, step, value, time stamp) of all points in a run's journal, in its order."""
    (folder,) = folders_of(study).study.glob(f"journal/*/{name}")
    entries = [entry.record for entry in Journal(folder)._entries(0)]
    return [
        (key, record["step"], value, record["at"])
        for record in entries
        if record["do"] == "metrics"
        for key, value in record["values"].items()
    ]


def stored(server, study, kind, key):
    """The one run of a key, asked of the server itself, and its points."""
    client = MlflowClient(server.uri)
    experiment = client.get_experiment_by_name(study.name)
    (run,) = [
        run
        for run in client.search_runs([experiment.experiment_id])
        if (run.data.tags["ssl_ray.kind"], run.data.tags["ssl_ray.key"]) == (kind, key)
    ]
    history = [point for metric in run.data.metrics for point in client.get_metric_history(run.info.run_id, metric)]
    return run, [(point.key, point.step, point.value, point.timestamp) for point in history]


def assert_once(server, study, points, kind="trial", key="key"):
    run, found = stored(server, study, kind, key)
    for metric in {point[0] for point in points}:
        assert [point for point in found if point[0] == metric] == [point for point in points if point[0] == metric]
    assert len(found) == len(points)
    return run


def test_the_server_killed_while_it_is_written_to(running, tmp_path, said):
    """Steps before, during and after the outage are there once, with the values and time stamps of the journal."""
    study = make_study(tmp_path, running.uri)
    tracker = tracker_of(study)
    run = tracker.open("trial", "key", "name", {"a": 1})
    for step in range(600):
        run.metrics({"loss": 1 / (step + 1), "lr": 0.1}, step)
        if step == 100:
            tracker._delivery.catch_up(20)
        if step == 200:
            running.kill()
        time.sleep(0.001)
    (tmp_path / "file.txt").write_text("content")
    run.artifact(tmp_path / "file.txt", "folder")
    run.text("words", "words.txt")
    run.tags({"colour": "blue"})
    points = journalled(study, "trial-key")
    run.close()
    wait_for(lambda: said, "a line that MLflow is away")
    assert tracker.settle(1) > 0
    running.start()
    assert tracker.settle(60) == 0
    found = assert_once(running, study, points)
    assert len(points) == 1200
    assert (found.info.status, found.data.tags["colour"], found.data.params) == ("FINISHED", "blue", {"a": "1"})
    assert tracker.read(run.id, "folder/file.txt") == b"content"
    assert tracker.read(run.id, "words.txt") == b"words"
    assert sum("does not answer" in line and "metrics are kept in" in line for line in said) == 1
    assert said.count(f"MLflow at {running.uri} is back") == 1
    tracker.stop()


CUTS = ["experiments/create", "runs/create", "runs/log-batch", "PUT .*/artifacts/", "runs/update", "runs/search", "."]


@pytest.mark.parametrize("cut", CUTS)
def test_an_answer_that_gets_lost(running, tmp_path, said, cut):
    """The server has done what it was asked and nobody heard of it, up to three times: everything is there once."""
    proxy = Proxy(running.port)
    proxy.cut = re.compile(cut.encode())
    study = make_study(tmp_path, proxy.uri)
    if cut == "experiments/create":
        proxy.times = 3
        tracker = tracker_of(study)
    else:
        tracker = tracker_of(study)
        proxy.times = 3
    run = tracker.open("trial", "key", "name", {f"param{number}": number for number in range(150)})
    for step in range(300):
        run.metrics({"loss": 1 / (step + 1), "nan": float("inf")}, step)
        if step % 100 == 50:
            tracker._delivery.catch_up(0.3)
    run.tags({"colour": "blue"})
    run.text("words", "words.txt")
    points = [
        (key, step, min(value, sys.float_info.max), at) for key, step, value, at in journalled(study, "trial-key")
    ]
    run.close()
    assert tracker.settle(60) == 0
    assert proxy.done == (1 if cut.endswith("create") else 3), "what was made is found, not made again"
    found = assert_once(running, study, points)
    assert len(found.data.params) == 150
    assert found.info.status == "FINISHED"
    assert tracker._delivery.refused == {}
    tracker.stop()


def test_a_point_is_sent_again_only_where_it_is_missing(tmp_path, monkeypatch):
    """Also for a store that keeps every point it gets: what it has is read back before anything is repeated."""
    tracker = tracker_of(make_study(tmp_path, None))
    client = tracker.client
    whole, sent, failures = client.log_batch, [], [ConnectionError("cut"), ConnectionError("cut")]

    def log_batch(run_id, metrics=(), **rest):
        half = metrics if len(failures) != 2 else metrics[: len(metrics) // 2]
        whole(run_id, half, **rest)
        sent.extend((point.key, point.step) for point in half)
        if metrics and failures:
            raise failures.pop()

    monkeypatch.setattr(client, "log_batch", log_batch)
    run = tracker.open("trial", "key", "name", {})
    for step in range(500):
        run.metrics({"loss": step, "lr": 0.1}, step)
    run.close()
    assert tracker.settle() == 0
    assert not failures
    assert sorted(sent) == sorted((key, step) for step in range(500) for key in ("loss", "lr"))
    tracker.stop()


def test_a_server_that_never_comes_back(running, tmp_path, said):
    """Two processes' worth of training end as if it were there; a third one, when it is, delivers all of it."""
    study = make_study(tmp_path, running.uri)
    tracker_of(study).stop()
    running.kill()
    tracker = tracker_of(study)
    assert sum("does not answer" in line for line in said) == 1
    pretraining = tracker.open("pretraining", "p", "p", {"a": 1})
    pretraining.metrics({"loss": 1.0}, 1)
    assert pretraining.logged("loss") == {1}
    assert tracker.finished("pretraining", "p") is None
    pretraining.close()
    assert tracker.settle(0.5) == 3
    tracker.stop()

    tracker = tracker_of(study)
    done = tracker.finished("pretraining", "p")
    assert done.info.run_id == pretraining.id
    grid = tracker.open("grid", "g", "grid", {})
    grid.text("{}", "cells.json")
    assert tracker.read(grid.id, "cells.json") == b"{}"
    assert tracker.runs(kind="trial") == []
    trial = tracker.open("trial", "t", "t", {}, grid.id, {PRETRAINING_RUN: done.info.run_id})
    assert trial.logged("loss") == set()
    for step in range(5):
        trial.metrics({"loss": step}, step)
    points = journalled(study, "trial-t")
    trial.close()
    grid.close()
    assert tracker.settle(0.5) > 0
    tracker.stop()
    with pytest.raises(ValueError, match=r"tracking\.uri: MLflow at http://127.0.0.1:\d+ does not answer \(Connection"):
        tracker_of(study, create=False)

    running.start()
    tracker = tracker_of(study)
    assert tracker.settle(60) == 0
    parent, _ = stored(running, study, "grid", "g")
    source, _ = stored(running, study, "pretraining", "p")
    found = assert_once(running, study, points, key="t")
    assert found.data.tags["mlflow.parentRunId"] == parent.info.run_id
    assert found.data.tags[PRETRAINING_RUN] == source.info.run_id
    assert {run.info.status for run in (parent, source, found)} == {"FINISHED"}
    tracker.stop()


def test_an_address_that_never_answered_is_refused(tmp_path, monkeypatch):
    """Nobody listens, or somebody who stays silent: an error that names the setting and its value."""
    monkeypatch.setattr("ssl_ray.tracking.tracker._CONTACT_SECONDS", 1.0)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        uri = f"http://user:secret@127.0.0.1:{silent.getsockname()[1]}"
        place = uri.replace("user:secret@", "")
        with pytest.raises(
            ValueError, match=rf"tracking\.uri: MLflow at {place} does not answer \(no answer within 1 s"
        ):
            tracker_of(make_study(tmp_path, uri))
    with pytest.raises(ValueError, match=rf"tracking\.uri: MLflow at {place} does not answer \(Connection refused"):
        tracker_of(make_study(tmp_path, uri))


DRIVER = """
import sys, time, yaml
from ssl_ray.config.schema import Study
from ssl_ray.tracking.tracker import Tracker
study = Study.model_validate(yaml.safe_load(open(sys.argv[1])))
tracker = tracker_of(study)
run = tracker.open("trial", "key", "name", {"a": 1})
for step in range(int(sys.argv[2]), 100000):
    run.metrics({"loss": 1 / (step + 1)}, step)
    print(step, flush=True)
    time.sleep(0.002)
"""


def driver(study, tmp_path, first):
    path = tmp_path / "study.yaml"
    path.write_text(dump(study))
    command = [sys.executable, "-c", DRIVER, str(path), str(first)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, start_new_session=True)


def kill_after(process, steps):
    """SIGKILL after so many steps -> the last step that the driver logged."""
    lines = [process.stdout.readline() for _ in range(steps)]
    os.killpg(process.pid, signal.SIGKILL)
    lines += process.stdout.readlines()
    process.wait()
    return max(int(line) for line in lines if line.strip().isdigit() and line.endswith("\n"))


@pytest.mark.parametrize("away", [False, True])
def test_the_driver_killed(running, tmp_path, said, away):
    """Three times in mid-delivery, or while the server is away: the last process replays steps and all are there."""
    study = make_study(tmp_path, running.uri)
    tracker_of(study).stop()
    if away:
        running.kill()
    last = 0
    for _ in range(3):
        last = kill_after(driver(study, tmp_path, max(0, last - 50)), 300)
    if away:
        running.start()
    tracker = tracker_of(study)
    run = tracker.open("trial", "key", "name", {"a": 1})
    for step in range(last - 50, last + 50):
        run.metrics({"loss": 1 / (step + 1)}, step)
    points = journalled(study, "trial-key")
    run.close()
    assert tracker.settle(60) == 0
    assert_once(running, study, points)
    assert [step for _, step, _, _ in points] == list(range(last + 50))
    assert all(value == 1 / (step + 1) for _, step, value, _ in points)
    tracker.stop()


def test_many_runs_at_once_through_an_outage(running, tmp_path, said):
    """Trials that are written by several threads while the server dies and comes back: each complete, none mixed up."""
    study = make_study(tmp_path, running.uri)
    tracker = tracker_of(study)
    grid = tracker.open("grid", "g", "grid", {})
    written = threading.Barrier(5)

    def trial(number):
        run = tracker.open("trial", str(number), str(number), {"number": number}, grid.id)
        for step in range(100):
            run.metrics({"loss": number + step / 1000}, step)
            if step == 50:
                written.wait()
                written.wait()
        points = journalled(study, f"trial-{number}")
        run.close()
        return points

    with ThreadPoolExecutor(4) as pool:
        trials = [pool.submit(trial, number) for number in range(4)]
        written.wait()
        running.kill()
        written.wait()
        everything = [one.result() for one in trials]
    running.start()
    assert tracker.settle(60) == 0
    parent, _ = stored(running, study, "grid", "g")
    for number, points in enumerate(everything):
        run = assert_once(running, study, points, key=str(number))
        assert len(points) == 100
        assert run.data.tags["mlflow.parentRunId"] == parent.info.run_id
        assert run.data.params == {"number": str(number)}
    tracker.stop()
