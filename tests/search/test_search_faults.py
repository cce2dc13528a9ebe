"""A search whose driver is killed in mid-training goes on, and ends with one run a cell."""

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
import ray
from runs import wait_for
from studies import place_database, small_tree, write_study

from ssl_ray.cli.main import main
from ssl_ray.search.cells import JOURNAL
from ssl_ray.study.experiment import load
from ssl_ray.study.parts import folders_of, tracker_of

pytestmark = pytest.mark.slow
STEPS = 60


def write(folder: Path, cohort: Path) -> Path:
    """Five cells over learning rate and two pretrainings, one trial at a time; the worse ones are stopped."""
    space = {"finetune.optimizer.lr": {"loguniform": [1e-4, 1e-2]}, "pretrain.epochs": {"choice": [20, 24]}}
    tree = small_tree(
        folder,
        cohort,
        name="search",
        pretrain={"batch_size": 4, "validate_every": 10, "checkpoint_every": 5},
        finetune={
            "grid": {"init": ["pretrained"]},
            "patches_per_volume": 2,
            "steps": STEPS,
            "validate_every": 10,
            "checkpoint_minutes": 0,
            "max_concurrent_trials": 1,
        },
        search={"algorithm": "optuna", "scheduler": "asha", "samples": 5, "space": space},
    )
    place_database(folder / "mlflow.db")
    return write_study(folder / "search.yaml", tree)


def start(path: Path) -> subprocess.Popen[bytes]:
    """`ssl-ray run` in a process group of its own, on the session's cluster."""
    environment = {**os.environ, "RAY_ADDRESS": ray.get_runtime_context().gcs_address}
    return subprocess.Popen(
        [sys.executable, "-m", "ssl_ray", "run", str(path)],
        env=environment,
        start_new_session=True,
        stdout=(path.parent / "driver.log").open("ab"),
        stderr=subprocess.STDOUT,
    )


def kill_when(path: Path, condition: Callable[[], Any], what: str) -> None:
    """Run until a condition holds, then SIGKILL, and wait until Ray has ended what belonged to the driver."""
    process = start(path)
    try:
        wait_for(lambda: process.poll() is not None or condition(), what)
        assert process.poll() is None, (path.parent / "driver.log").read_text()
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    wait_for(lambda: not busy(), "Ray ends the trial of a driver that is gone")


def busy() -> bool:
    """Whether a process of a trial or of a pretraining is there."""
    names = ("ImplicitFunc", "RayTrainWorker", "TrainController")
    processes = psutil.Process().children(recursive=True)
    for process in processes:
        with contextlib.suppress(psutil.Error):
            if any(name in " ".join(process.cmdline()) for name in names):
                return True
    return False


def test_a_search_that_is_killed_twice(
    ray_cluster: None, cohort: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Once in a pretraining and once in a trial after another one has finished: finished cells and pretrainings are
    left alone, the trial goes on, stopped cells are no failed ones, and the best one can be run."""
    path = write(tmp_path, cohort)
    study = load(path)
    home = folders_of(study).study
    kill_when(path, lambda: list(home.glob("pretrain-*/checkpoints/[!.]*/manifest.json")), "a pretraining")

    def one_finished_and_one_begun() -> bool:
        logs = [found.read_text() for found in home.glob("journal/*/trial-*/records.jsonl")]
        going = [log for log in logs if "system/started_at" in log and '"do": "end"' not in log]
        return bool(going) and any("selected/step" in log for log in logs if log not in going)

    kill_when(path, one_finished_and_one_begun, "a trial after another one has finished")
    tracker = tracker_of(study)
    before = {run.info.run_id: run.info.end_time for run in tracker.runs(kind="trial") if run.info.status == "FINISHED"}
    drawn = (home / JOURNAL).read_bytes()
    tracker.stop()

    assert main(["run", str(path)]) == 0
    out = capfd.readouterr().out
    tracker = tracker_of(study, create=False)
    (parent,) = tracker.runs(kind="search")
    assert parent.info.status == "FINISHED"
    runs = tracker.runs(kind="trial", parent=parent.info.run_id)
    assert len(runs) == len({run.info.run_name for run in runs}) == 5
    finished = [run for run in runs if run.info.status == "FINISHED"]
    stopped = [run for run in runs if run.data.tags.get("ssl_ray.stopped")]
    assert len(finished) + len(stopped) == 5
    assert {run.info.status for run in stopped} <= {"KILLED"}
    assert finished
    assert before.items() <= {run.info.run_id: run.info.end_time for run in runs}.items(), "what was done is left alone"
    assert len({frozenset(run.data.params) for run in runs}) == 1, "the compare view needs equal names"
    started = [len(tracker.points(run.info.run_id, "system/started_at")) for run in runs]
    assert sorted(started) == [1, 1, 1, 1, 2], "the trial that was killed is taken up again, and no other"
    for run in finished:
        history = tracker.client.get_metric_history(run.info.run_id, "loss")
        assert len({point.step for point in history}) == len(history) == STEPS, "no step is logged twice"
    pretrainings = tracker.runs(kind="pretraining")
    assert len(pretrainings) <= 2, "cells share them"
    assert {run.info.status for run in pretrainings} == {"FINISHED"}
    assert (home / JOURNAL).read_bytes().startswith(drawn)
    assert "Best on validation" in (home / "report.md").read_text()
    assert f"{len(finished)} finished" in out

    assert main(["run", str(path)]) == 0
    again = {run.info.run_id: run.info.end_time for run in tracker.runs(kind="trial")}
    assert again == {run.info.run_id: run.info.end_time for run in runs}, "nothing is trained again"
    assert load(home / "best.yaml").search is None
