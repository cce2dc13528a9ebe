"""After a fault, a pretraining ends exactly as it would have without it."""

import os
import re
import signal
from pathlib import Path

import pytest
import torch
from runs import SAVED, STEPS, assert_close, assert_same, kill, outcome, saved, start, wait_for, write

from ssl_ray.cli import main

pytestmark = pytest.mark.slow


def sabotage(monkeypatch, markers: Path) -> None:
    """Have a process killed once at each of four places in the code; a file says which were reached."""
    from ssl_ray.pretrain import driver as train

    def disturbed(job):

        from ssl_ray.pretrain import learner, stream
        from ssl_ray.pretrain import worker as loop
        from ssl_ray.training import checkpoint

        def deadly(module, name, place, due):
            genuine, calls = getattr(module, name), []

            def killed(*args, **kwargs):
                calls.append(args)
                if due(args, len(calls)) and not (markers / place).exists():
                    (markers / place).touch()
                    os.kill(os.getpid(), signal.SIGKILL)
                return genuine(*args, **kwargs)

            setattr(module, name, killed)

        deadly(loop, "learning_rate", "in mid-epoch", lambda args, calls: args[1] == 90)
        deadly(learner, "corrupt", "in a validation", lambda args, calls: calls > 1 and not torch.is_grad_enabled())
        deadly(checkpoint, "_digest", "in a checkpoint", lambda args, calls: calls == 2)
        deadly(stream, "_read_block", "in a data task", lambda args, calls: int(args[0]["id"][0]) == 3)
        loop.train_loop(job)

    monkeypatch.setattr(train, "work", disturbed)


def run(path: Path, *more: str) -> None:
    assert main(["pretrain", str(path), *more]) == 0


def test_workers_and_a_data_task_killed(undisturbed, cohort, tmp_path, monkeypatch):
    """SIGKILL to the worker in mid-epoch, in a validation and between a checkpoint's content and its manifest, and to
    a process that reads patches, which does not even make the training start anew: all ends as without."""
    path = write(tmp_path, cohort, max_failures=3)
    markers = tmp_path / "markers"
    markers.mkdir()
    sabotage(monkeypatch, markers)
    run(path)
    places = {"in mid-epoch", "in a validation", "in a checkpoint", "in a data task"}
    assert {marker.name for marker in markers.iterdir()} == places
    found = outcome(path)
    assert len(found.started) == 4, "once and after each killed worker"
    assert_same(found, undisturbed)


def test_a_sharded_run(undisturbed, cohort, tmp_path, monkeypatch):
    """With FSDP, one of two workers killed in a validation, where both are needed: the run goes on from what rank 0
    gathered, to the losses and the whole weights of one worker."""
    path = write(tmp_path, cohort, workers=2, shard=True)
    markers = tmp_path / "markers"
    markers.mkdir()
    for place in ("in mid-epoch", "in a checkpoint", "in a data task"):
        (markers / place).touch()  # as if it had been killed there already
    sabotage(monkeypatch, markers)
    run(path)
    found = outcome(path)
    assert set(found.workers) == {2}
    assert found.started == [0, SAVED]
    assert_close(found, undisturbed)


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


def test_the_driver_killed_and_its_checkpoint_torn(undisturbed, cohort, tmp_path):
    """After SIGKILL, and with its newest checkpoint cut off, the same command goes on from the one before; MLflow has
    every step once, those before the kill too."""
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
    assert_same(found, undisturbed)


def test_a_result_is_not_made_twice(cohort, tmp_path, ray_cluster):
    """A finished run given again does nothing; its weights deleted, they come back from the last checkpoint.

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
    weights.unlink()
    run(path)
    assert outcome(path).started == [0, STEPS]


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
