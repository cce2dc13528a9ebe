"""MLflow goes away at the worst moments: every step arrives once, in order, as it was; no training notices."""

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import runs
from mlflow.entities import Run as MlflowRun
from mlflow.tracking import MlflowClient
from outside import Proxy, Said, Server

from ssl_ray.errors import UserError
from ssl_ray.storage.folders import Folders
from ssl_ray.tracking.tracker import PRETRAINING_RUN, Tracker

pytestmark = pytest.mark.slow
Track = Callable[..., Tracker]
Point = tuple[str, int, float, int]
"""Metric, step, value, time stamp."""


def journalled(folders: Folders, name: str) -> list[Point]:
    """All points in a run's journal, in its order."""
    (path,) = folders.study.glob(f"journal/*/{name}/records.jsonl")
    records = [json.loads(line) for line in path.read_text().splitlines()]
    return [
        (key, record["step"], value, record["at"])
        for record in records
        if record["do"] == "metrics"
        for key, value in record["values"].items()
    ]


def stored(server: Server, folders: Folders, kind: str, key: str) -> tuple[MlflowRun, list[Point]]:
    """The one run of a key, asked of the server itself, and its points."""
    client = MlflowClient(server.uri)
    experiment = client.get_experiment_by_name(folders.name)
    (run,) = [
        run
        for run in client.search_runs([experiment.experiment_id])
        if (run.data.tags["ssl_ray.kind"], run.data.tags["ssl_ray.key"]) == (kind, key)
    ]
    history = [point for metric in run.data.metrics for point in client.get_metric_history(run.info.run_id, metric)]
    return run, [(point.key, point.step, point.value, point.timestamp) for point in history]


def assert_once(server: Server, folders: Folders, points: Sequence[Point], key: str = "key") -> MlflowRun:
    run, found = stored(server, folders, "trial", key)
    for metric in {point[0] for point in points}:
        assert [point for point in found if point[0] == metric] == [point for point in points if point[0] == metric]
    assert len(found) == len(points)
    return run


def test_many_runs_while_the_server_is_killed(
    server: Server, track: Track, folders: Folders, tmp_path: Path, said: Said
) -> None:
    """Four threads write trials before, during and after the outage: each is complete, and none mixed up."""
    tracker = track(server.uri)
    grid = tracker.open("grid", "g", "grid", {})
    (tmp_path / "file.txt").write_text("content")
    written = threading.Barrier(5)

    def trial(number: int) -> list[Point]:
        run = tracker.open("trial", str(number), str(number), {"number": number}, grid.id)
        for step in range(400):
            run.metrics({"loss": number + step / 1000, "lr": 0.1}, step)
            if step == 150:
                tracker.files(run.id)  # MLflow has what was written so far
                written.wait()
            time.sleep(0.001)
        run.artifact(tmp_path / "file.txt", "folder")
        run.text("words", "words.txt")
        run.tags({"colour": "blue"})
        points = journalled(folders, f"trial-{number}")
        run.close()
        return points

    with ThreadPoolExecutor(4) as pool:
        trials = [pool.submit(trial, number) for number in range(4)]
        written.wait()
        time.sleep(0.1)
        server.kill()
        everything = [one.result() for one in trials]
    runs.wait_for(lambda: said.count("does not answer"), "a line that MLflow is away", 20)
    assert tracker.settle(1) > 0
    server.start()
    assert tracker.settle(60) == 0
    parent, _ = stored(server, folders, "grid", "g")
    for number, points in enumerate(everything):
        run = assert_once(server, folders, points, key=str(number))
        assert len(points) == 800
        assert (run.info.status, run.data.tags["colour"]) == ("FINISHED", "blue")
        assert run.data.tags["mlflow.parentRunId"] == parent.info.run_id
        assert run.data.params == {"number": str(number)}
        assert tracker.read(run.info.run_id, "folder/file.txt") == b"content"
        assert tracker.read(run.info.run_id, "words.txt") == b"words"
    assert said.count("metrics are kept in") == 1


CUTS = ["experiments/create", "runs/create", "runs/log-batch", "PUT .*/artifacts/", "runs/update", "runs/search", "."]


@pytest.mark.parametrize("cut", CUTS)
def test_an_answer_that_gets_lost(server: Server, track: Track, folders: Folders, said: Said, cut: str) -> None:
    """The server has done what it was asked and nobody heard of it, up to three times: everything is there once."""
    proxy = Proxy(server.port)
    proxy.cut = re.compile(cut.encode())
    proxy.times = 3 if cut == "experiments/create" else 0
    tracker = track(proxy.uri)
    proxy.times = 3
    run = tracker.open("trial", "key", "name", {f"param{number}": number for number in range(150)})
    for step in range(300):
        run.metrics({"loss": 1 / (step + 1), "nan": float("inf")}, step)
        if step % 100 == 50:
            time.sleep(0.3)  # for a delivery of its own
    run.tags({"colour": "blue"})
    run.text("words", "words.txt")
    points = [
        (key, step, min(value, sys.float_info.max), at) for key, step, value, at in journalled(folders, "trial-key")
    ]
    run.close()
    assert tracker.settle(60) == 0
    assert proxy.done == (1 if cut.endswith("create") else 3), "what was made is found, not made again"
    found = assert_once(server, folders, points)
    assert len(found.data.params) == 150
    assert found.info.status == "FINISHED"
    assert said.count("refused") == 0


def test_a_server_that_never_comes_back(server: Server, track: Track, folders: Folders, said: Said) -> None:
    """Two processes' worth of training end as if it were there; a third one, when it is, delivers all of it."""
    track(server.uri).stop()
    server.kill()
    tracker = track(server.uri)
    away = f"MLflow at {server.uri} does not answer (Connection refused); metrics are kept in"
    runs.wait_for(lambda: said.count(away), "a line that MLflow is away", 20)
    pretraining = tracker.open("pretraining", "p", "p", {"a": 1})
    pretraining.metrics({"loss": 1.0}, 1)
    assert pretraining.logged("loss") == {1}
    assert tracker.finished("pretraining", "p") is None
    pretraining.close()
    assert tracker.settle(0.5) == 5
    tracker.stop()

    tracker = track(server.uri)
    done = tracker.finished("pretraining", "p")
    assert done == pretraining.id
    grid = tracker.open("grid", "g", "grid", {})
    grid.text("{}", "cells.json")
    assert tracker.read(grid.id, "cells.json") is None
    assert tracker.runs(kind="trial") == []
    trial = tracker.open("trial", "t", "t", {}, grid.id, {PRETRAINING_RUN: done})
    assert trial.logged("loss") == set()
    for step in range(5):
        trial.metrics({"loss": step}, step)
    points = journalled(folders, "trial-t")
    trial.close()
    grid.close()
    assert tracker.settle(0.5) > 0
    tracker.stop()
    with pytest.raises(UserError, match=r"tracking\.uri: MLflow at http://127.0.0.1:\d+ does not answer \(Connection"):
        track(server.uri, create=False)

    server.start()
    tracker = track(server.uri)
    assert tracker.settle(60) == 0
    parent, _ = stored(server, folders, "grid", "g")
    source, _ = stored(server, folders, "pretraining", "p")
    found = assert_once(server, folders, points, key="t")
    assert found.data.tags["mlflow.parentRunId"] == parent.info.run_id
    assert found.data.tags[PRETRAINING_RUN] == source.info.run_id
    assert {run.info.status for run in (parent, source, found)} == {"FINISHED"}


DRIVER = """
import sys, time
from ssl_ray.config.schema import Tracking
from ssl_ray.storage.folders import Folders
from ssl_ray.tracking.tracker import Tracker
uri, name, output, first = sys.argv[1:]
run = Tracker(Tracking(uri=uri), Folders.of(name, output)).open("trial", "key", "name", {"a": 1})
for step in range(int(first), 100000):
    run.metrics({"loss": 1 / (step + 1)}, step)
    print(step, flush=True)
    time.sleep(0.002)
"""


def killed_driver(server: Server, folders: Folders, first: int) -> int:
    """A driver that logs from a step on and gets SIGKILL after 300 steps -> the last step that it logged."""
    command = [sys.executable, "-c", DRIVER, server.uri, folders.name, str(folders.output.folder), str(first)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, start_new_session=True)
    assert process.stdout
    lines = [process.stdout.readline() for _ in range(300)]
    os.killpg(process.pid, signal.SIGKILL)
    lines += process.stdout.readlines()
    process.wait()
    return max(int(line) for line in lines if line.strip().isdigit() and line.endswith("\n"))


@pytest.mark.parametrize("away", [False, True])
def test_the_driver_killed(server: Server, track: Track, folders: Folders, away: bool) -> None:
    """Twice in mid-delivery, or while the server is away: the last process replays steps and all are there."""
    track(server.uri).stop()
    if away:
        server.kill()
    last = 0
    for _ in range(2):
        last = killed_driver(server, folders, max(0, last - 50))
    if away:
        server.start()
    tracker = track(server.uri)
    run = tracker.open("trial", "key", "name", {"a": 1})
    for step in range(last - 50, last + 50):
        run.metrics({"loss": 1 / (step + 1)}, step)
    points = journalled(folders, "trial-key")
    run.close()
    assert tracker.settle(60) == 0
    assert_once(server, folders, points)
    assert [step for _, step, _, _ in points] == list(range(last + 50))
    assert all(value == 1 / (step + 1) for _, step, value, _ in points)
