"""After a fault, a pretraining ends exactly as it would have without it."""

import os
import re
import signal
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from runs import SAVED, STEPS, assert_same, kill, outcome, saved, start, wait_for, workers, write

from ssl_ray.cli import main

pytestmark = pytest.mark.slow


def sabotage(monkeypatch, marker: Path, place: str) -> None:
    """Have rank 0 killed once, when the training worker comes to a place in the code."""
    from ssl_ray.pretrain import train

    def disturbed(job):
        import signal

        from ssl_ray import checkpoint
        from ssl_ray.pretrain import learner, loop, stream

        module, name = {
            "validation": (learner, "corrupt"),
            "checkpoint": (checkpoint, "_digest"),
            "opening": (loop, "open_window"),
            "reading": (stream, "_read_block"),
        }[place]
        genuine = getattr(module, name)
        calls = []

        def deadly(*args, **kwargs):
            calls.append(args)
            validating = place != "validation" or not torch.is_grad_enabled()
            if validating and len(calls) > 1 and not marker.exists():
                marker.touch()
                os.kill(os.getpid(), signal.SIGKILL)
            return genuine(*args, **kwargs)

        setattr(module, name, deadly)
        loop.train_loop(job)

    monkeypatch.setattr(train, "work", disturbed)


def run(path: Path, *more: str) -> None:
    assert main(["pretrain", str(path), *more]) == 0


def test_a_worker_killed_in_mid_epoch(undisturbed, cohort, tmp_path):
    """SIGKILL between two checkpoints: every loss and the weights equal the undisturbed run's."""
    path = write(tmp_path, cohort)

    def strike() -> list[int]:
        wait_for(lambda: saved(tmp_path), "a checkpoint")
        victims = wait_for(workers, "a training worker")
        for process in victims:
            process.send_signal(signal.SIGKILL)
        return [process.pid for process in victims]

    with ThreadPoolExecutor() as pool:
        killed = pool.submit(strike)
        run(path)
        assert killed.result()
    assert_same(outcome(path), undisturbed)


@pytest.mark.parametrize("place", ["validation", "checkpoint"])
def test_a_worker_killed_in_a_delicate_moment(undisturbed, cohort, tmp_path, monkeypatch, place):
    """SIGKILL in the middle of a validation, and between a checkpoint's content and its manifest."""
    path = write(tmp_path, cohort)
    sabotage(monkeypatch, tmp_path / "done", place)
    run(path)
    assert (tmp_path / "done").exists()
    assert_same(outcome(path), undisturbed)


def test_a_data_task_killed(undisturbed, cohort, tmp_path, monkeypatch):
    """The process that reads patches is killed: Ray Data reads the block again, training does not even start anew."""
    path = write(tmp_path, cohort)
    from ssl_ray.pretrain import train

    marker = tmp_path / "done"

    def disturbed(job):
        import signal

        from ssl_ray.pretrain import loop, stream

        genuine = stream._read_block

        def deadly(rows, feed, window):
            if int(rows["id"][0]) == 3 and not marker.exists():
                marker.touch()
                os.kill(os.getpid(), signal.SIGKILL)
            return genuine(rows, feed, window)

        stream._read_block = deadly
        loop.train_loop(job)

    monkeypatch.setattr(train, "work", disturbed)
    run(path)
    assert marker.exists()
    found = outcome(path)
    assert found.started == [0]
    assert found.losses == undisturbed.losses
    assert all(torch.equal(found.weights[name], tensor) for name, tensor in undisturbed.weights.items())


def test_the_driver_killed_and_started_again(undisturbed, cohort, tmp_path):
    """The same command, given again after SIGKILL, goes on; MLflow has every step once, those before the kill too."""
    path = write(tmp_path, cohort)
    first = start(path)
    wait_for(lambda: saved(tmp_path), "a checkpoint")
    kill(first)
    run(path)
    assert_same(outcome(path), undisturbed)


def test_the_end_of_a_job(undisturbed, cohort, tmp_path):
    """SIGTERM (`ray job stop`), as Ctrl-C: exit code 1, one clear line, and the same command goes on."""
    path = write(tmp_path, cohort)
    first = start(path)
    wait_for(lambda: saved(tmp_path), "a checkpoint")
    first.terminate()
    assert first.wait(60) == 1
    text = path.with_suffix(".log").read_text()
    assert "interrupted; the same command goes on" in text
    assert not re.search(r'File ".*/ssl_ray/', text), "a traceback of ours"
    run(path)
    assert_same(outcome(path), undisturbed)


def test_a_torn_checkpoint(undisturbed, cohort, tmp_path):
    """The newest checkpoint is cut off: the one before is used, and the end is the same."""
    path = write(tmp_path, cohort)
    first = start(path)
    wait_for(lambda: len(saved(tmp_path)) == 2, "two checkpoints")
    kill(first)
    before, last = saved(tmp_path)[-2:]
    (newest,) = tmp_path.glob(f"**/checkpoints/{last:08d}/state.pt")
    with newest.open("r+b") as file:
        file.truncate(newest.stat().st_size // 3)
    run(path)
    found = outcome(path)
    assert found.started[-1] == before
    assert found.losses == undisturbed.losses
    assert all(torch.equal(found.weights[name], tensor) for name, tensor in undisturbed.weights.items())


def test_a_result_is_not_made_twice(undisturbed, cohort, tmp_path, capfd):
    """A finished run given again does nothing; its weights deleted, they come back from the last checkpoint."""
    path = write(tmp_path, cohort)
    run(path)
    run(path)
    assert outcome(path).started == [0]
    (weights,) = tmp_path.glob("output/faults/pretrain-*/best.safetensors")
    weights.unlink()
    run(path)
    assert outcome(path).started == [0, STEPS]


def test_checkpoints_by_time(cohort, tmp_path, ray_cluster):
    """Without `checkpoint_every`, one is written whenever `checkpoint_minutes` have passed, and the newest two stay."""
    path = write(tmp_path, cohort, checkpoint_every=None, checkpoint_minutes=0.01)
    run(path)
    steps = saved(tmp_path)
    assert len(steps) == 2
    assert steps[1] == STEPS
    assert steps[0] > SAVED


def test_a_loss_that_explodes(cohort, tmp_path, ray_cluster, capfd):
    """A divergent training stops with the step, the rank and the samples, keeps them, and is not tried again."""
    path = write(tmp_path, cohort, max_skipped=2, optimizer={"lr": 1e30})
    assert main(["pretrain", str(path)]) == 1
    text = capfd.readouterr().err
    assert "rank 0: loss" in text
    assert "samples" in text
    kept = sorted(tmp_path.glob("**/faults/step_*_rank_0.safetensors"))
    assert len(kept) == 3
    assert all(part.with_suffix(".json").is_file() for part in kept)


def test_two_at_once(cohort, tmp_path, capfd):
    """A second process on the same study is refused with the first one's host and process."""
    path = write(tmp_path, cohort)
    first = start(path)
    try:
        lock = tmp_path / "output" / ".faults.lock"
        wait_for(lambda: lock.is_file() and lock.read_text(), "the lock")
        assert main(["pretrain", str(path)]) == 2
        assert f"process {first.pid}" in capfd.readouterr().err
    finally:
        kill(first)
