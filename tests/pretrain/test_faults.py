"""After a fault, a pretraining ends exactly as it would have without it."""

import json
import re
import time
from collections.abc import Callable
from pathlib import Path
from subprocess import Popen

import psutil
import pytest
import torch
from runs import (
    SAVED,
    STEPS,
    Outcome,
    assert_close,
    assert_same,
    kill,
    outcome,
    saved,
    session,
    start,
    wait_for,
    workers,
    write,
)
from safetensors import safe_open
from tiny_learner import MASKED, PRIMUS

from ssl_ray.cli.main import main

pytestmark = pytest.mark.slow


def run(path: Path) -> None:
    assert main(["pretrain", str(path)]) == 0


def worker_of(driver: "Popen[bytes]") -> psutil.Process:
    """A training worker of the only driver that there is, one that lives."""

    def alive() -> list[psutil.Process]:
        assert driver.poll() is None, "the run has ended already"
        return [found for found in workers() if found.status() != psutil.STATUS_ZOMBIE]

    found: psutil.Process = wait_for(alive, "a training worker")[0]
    return found


def kill_when(driver: "Popen[bytes]", seen: Callable[[], bool], pause: float = 0.1) -> None:
    """SIGKILL to a training worker at the moment when something can be seen from outside.

    The worker is stopped first, and killed only if that can still be seen: a checkpoint is written in milliseconds.
    Looked for every `pause` seconds, as what is waited for runs on the same cores.
    """
    while True:
        worker = worker_of(driver)
        while not seen():
            assert worker.is_running(), "the worker ended by itself"
            time.sleep(pause)
        worker.suspend()
        if seen():
            worker.kill()
            worker.wait(60)
            return
        worker.resume()


def kill_a_reading_task() -> None:
    """SIGKILL to a process that reads patches right now, as its title says."""

    def reading() -> psutil.Process | None:
        for process in psutil.Process().children(recursive=True):
            try:
                if "_read_block" in " ".join(process.cmdline()):
                    process.suspend()
                    if "_read_block" in " ".join(process.cmdline()):
                        return process
                    process.resume()
            except psutil.NoSuchProcess:
                continue
        return None

    wait_for(reading, "a task that reads").kill()


def in_a_validation(folder: Path) -> Callable[[], bool]:
    """A validation draws a picture before it ends."""
    return lambda: any(folder.glob("output/*/*/pictures/*.png"))


def in_a_checkpoint(folder: Path) -> Callable[[], bool]:
    """Between its content and its manifest."""

    def unfinished() -> bool:
        written = folder.glob("output/*/*/checkpoints/.0*/state.pt")
        return any(not state.with_name("manifest.json").exists() for state in written)

    return unfinished


def test_workers_and_a_data_task_killed(undisturbed: Outcome, cohort: Path, tmp_path: Path, ray_cluster: None) -> None:
    """SIGKILL to the worker in mid-epoch, in a validation and between a checkpoint's content and its manifest, and to
    a process that reads patches, after which the training does not even start again: all ends as without."""
    path = write(tmp_path, cohort, max_failures=3)
    driver = start(path, session())
    try:
        kill_a_reading_task()
        kill_when(driver, lambda: bool(saved(tmp_path)))
        kill_when(driver, in_a_validation(tmp_path))
        kill_when(driver, in_a_checkpoint(tmp_path), pause=0.001)
        assert driver.wait(300) == 0, path.with_suffix(".log").read_text()[-3000:]
    finally:
        kill(driver)
    found = outcome(path)
    assert len(found.started) == 4, "once and after each killed worker"
    assert_same(found, undisturbed)


def test_a_sharded_run(cohort: Path, tmp_path: Path, ray_cluster: None) -> None:
    """With FSDP, another task and another network, one of two workers killed in a validation, where both are needed:
    the run goes on from what rank 0 gathered, to the losses and the whole weights of one worker."""
    network, task = {"network": PRIMUS | {"token": 8}}, MASKED["task"]
    run(alone := write(tmp_path / "alone", cohort, network, task=task))
    path = write(tmp_path, cohort, network, task=task, workers=2, shard=True)
    driver = start(path, session())
    try:
        kill_when(driver, in_a_validation(tmp_path))
        assert driver.wait(300) == 0, path.with_suffix(".log").read_text()[-3000:]
    finally:
        kill(driver)
    found = outcome(path)
    assert set(found.workers) == {2}
    assert found.started == [0, SAVED]
    assert_close(found, outcome(alone))


def test_the_end_of_a_job(
    undisturbed: Outcome, cohort: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """SIGTERM (`ray job stop`), as Ctrl-C: no record is lost of what the workers do until they are stopped, and they
    are stopped whatever holds the driver on its way out, e.g. an MLflow server that is away. A second
    process is refused that long, with the first one's number. Then exit code 1, one clear line, and the same command
    goes on."""
    path, go = write(tmp_path, cohort), tmp_path / "go"
    held = f"""
from pathlib import Path
from time import sleep
from ssl_ray.tracking.tracker import Tracker
settle = Tracker.settle
def hold(tracker):
    while not Path({str(go)!r}).exists():
        sleep(0.1)
    return settle(tracker)
Tracker.settle = hold
"""
    first = start(path, patch=held)
    try:
        wait_for(lambda: saved(tmp_path), "a checkpoint")
        first.terminate()
        wait_for(lambda: not workers(psutil.Process(first.pid)), "the end of the workers", 30)
        assert main(["pretrain", str(path)]) == 2
        assert f"process {first.pid}" in capfd.readouterr().err
        go.touch()
        assert first.wait(60) == 1
    finally:
        kill(first)
    text = path.with_suffix(".log").read_text()
    assert "interrupted; what is finished is kept, and the same command goes on" in text
    assert not re.search(r'File ".*/ssl_ray/', text), "a traceback of ours"
    run(path)
    assert_same(outcome(path), undisturbed)


def test_the_driver_killed_and_its_checkpoint_torn(
    undisturbed: Outcome, cohort: Path, tmp_path: Path, ray_cluster: None
) -> None:
    """After SIGKILL, and with its newest checkpoint cut off, the same command goes on from the one before; MLflow has
    every step once, those before the kill too."""
    path = write(tmp_path, cohort)
    first = start(path, session())
    wait_for(lambda: len(saved(tmp_path)) == 2, "two checkpoints")
    kill(first)
    before, last = saved(tmp_path)[-2:]
    (newest,) = tmp_path.glob(f"**/checkpoints/{last:08d}/state.pt")
    with newest.open("r+b") as file:
        file.truncate(newest.stat().st_size // 3)
    run(path)
    found = outcome(path)
    assert found.started[-1] == before
    assert_same(found, undisturbed)


def test_a_result_is_not_made_twice(cohort: Path, tmp_path: Path, ray_cluster: None) -> None:
    """A finished run given again does nothing; its weights deleted, the same ones are found again, not the last.

    Without `checkpoint_every`, one is written whenever `checkpoint_minutes` have passed, and the newest two stay.
    """
    path = write(tmp_path, cohort, checkpoint_every=None, checkpoint_minutes=0.01)
    run(path)
    steps = saved(tmp_path)
    assert len(steps) == 2
    assert steps[1] == STEPS
    assert steps[0] > SAVED
    run(path)
    assert outcome(path).started == [0]
    (weights,) = tmp_path.glob("output/faults/pretrain-*/best.safetensors")
    expected = outcome(path).weights
    weights.unlink()
    run(path)
    found = outcome(path)
    assert found.started in ([0, steps[0]], [0, 0]), "before they were found"
    assert all(torch.equal(found.weights[name], value) for name, value in expected.items())


def test_a_loss_that_explodes(
    cohort: Path, tmp_path: Path, ray_cluster: None, capfd: pytest.CaptureFixture[str]
) -> None:
    """A divergent training stops with the step, the rank and the samples, keeps them, and is not tried again."""
    path = write(tmp_path, cohort, max_skipped=2, optimizer={"lr": 1e30})
    assert main(["pretrain", str(path)]) == 1
    text = capfd.readouterr().err
    assert "rank 0: loss" in text
    assert "samples" in text
    kept = sorted(tmp_path.glob("**/faults/rank_0/step_*.safetensors"))
    assert len(kept) == 3
    with safe_open(kept[0], "pt") as file:
        facts = json.loads(file.metadata()["facts"])
        assert set(file.keys()) > {"images", "indices", "model.norm.weight"}
    assert [place["sample"] for place in facts["samples"]] == [4 * (facts["step"] - 1) + row for row in range(4)]
