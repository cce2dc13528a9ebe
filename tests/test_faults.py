"""After a fault, a run ends exactly as it would have without it."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import psutil
import pytest
import torch
import yaml

from ssl_ray.cli import main
from ssl_ray.experiment import load
from ssl_ray.networks import load_weights
from ssl_ray.tracking import Tracker

pytestmark = pytest.mark.slow

LONG = ["pretrain.epochs=200", "pretrain.checkpoint_every=50", "pretrain.validate_every=50"]


@pytest.fixture(scope="module")
def undisturbed(ray_cluster, tmp_path_factory, cohort):
    """Losses by step and final weights of a run without faults."""
    folder = tmp_path_factory.mktemp("undisturbed")
    return outcome(folder, run(write(folder, cohort)))


def write(folder, cohort):
    preparation = {"spacing": 9, "window": [-175, 250]}
    tree = {
        "name": "faults",
        "output": str(folder / "output"),
        "network": {"hidden_size": 48, "mlp_dim": 64, "num_heads": 3, "feature_size": 4},
        "pretrain": {
            "sources": [{"root": str(cohort), "datalist": "unlabelled.json"}],
            "preparation": preparation,
            "patch_size": 16,
            "batch_size": 4,
            "log_every": 1,
            "corruption": {"inpaint_size": [2, 6], "outpaint_size": [4, 10], "shuffle_size": 3},
            "precision": "float32",
        },
        "finetune": {
            "cohort": {"root": str(cohort), "classes": 14, "splits": {2: "labelled_2.json"}},
            "preparation": preparation,
            "patch_size": 16,
        },
    }
    path = folder / "faults.yaml"
    path.write_text(yaml.safe_dump(tree))
    return path


def options():
    return [word for setting in LONG for word in ("--set", setting)]


def run(path):
    assert main(["pretrain", str(path), *options()]) == 0
    return path


def outcome(folder, path):
    study = load(path, LONG)
    tracker = Tracker(study)
    (pretraining,) = tracker.runs(kind="pretraining")
    assert pretraining.info.status == "FINISHED"
    history = tracker.client.get_metric_history(pretraining.info.run_id, "loss")
    losses = {point.step: point.value for point in history}
    assert len(losses) == len(history), "a step is logged twice"
    starts = [point.value for point in tracker.client.get_metric_history(pretraining.info.run_id, "started_at")]
    (weights,) = study.folder.glob("pretrain-*/best.safetensors")
    return losses, load_weights(weights), sorted(starts)


def assert_same(found, expected):
    (losses, weights, starts), (all_losses, all_weights, _) = found, expected
    assert starts[0] == 0
    assert starts[-1] >= 50, "it did not go on from a checkpoint"
    assert losses == all_losses, "bit by bit, every step"
    assert list(losses) == list(range(1, len(losses) + 1)), "no step is missing"
    for name, tensor in all_weights.items():
        assert torch.equal(weights[name], tensor), name


def wait_for(condition, what, seconds=120):
    deadline = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < deadline, what
        time.sleep(0.05)
    return found


def checkpoints(folder):
    """Checkpoints that Ray Train knows of: those it has on disk but not in its books are lost in a fault."""
    for snapshot in folder.glob("output/faults/ray/pretrain-*/checkpoint_manager_snapshot.json"):
        with contextlib.suppress(ValueError):  # being written
            return json.loads(snapshot.read_text())["checkpoint_results"]
    return []


def workers():
    """Training workers of the Ray that this test session started."""
    mine = psutil.Process().children(recursive=True)
    return [process for process in mine if process.is_running() and "RayTrainWorker" in " ".join(process.cmdline())]


def test_a_worker_killed_in_mid_epoch(undisturbed, cohort, tmp_path):
    """SIGKILL after the first checkpoint: every loss and the weights equal the undisturbed run's."""
    path = write(tmp_path, cohort)

    def kill():
        wait_for(lambda: checkpoints(tmp_path), "a checkpoint")
        victims = wait_for(workers, "a training worker")
        for process in victims:
            process.send_signal(signal.SIGKILL)
        return [process.pid for process in victims]

    with ThreadPoolExecutor() as pool:
        killed = pool.submit(kill)
        run(path)
        assert killed.result()
    assert_same(outcome(tmp_path, path), undisturbed)


def test_the_driver_killed_and_started_again(undisturbed, cohort, tmp_path):
    """The same command, given again after SIGKILL, goes on from the last checkpoint and ends with the same weights."""
    path = write(tmp_path, cohort)
    command = [sys.executable, "-m", "ssl_ray", "pretrain", str(path), *options()]
    first = subprocess.Popen(command, env={**os.environ, "RAY_ADDRESS": ""}, start_new_session=True)
    wait_for(lambda: checkpoints(tmp_path), "a checkpoint")
    os.killpg(first.pid, signal.SIGKILL)
    first.wait()
    run(path)
    (losses, weights, starts), (all_losses, all_weights, once) = outcome(tmp_path, path), undisturbed
    assert once == [0]
    assert starts[-1] >= 50, "it did not go on from a checkpoint"
    # What the killed driver had not yet handed to MLflow is missing; whatever is there is right.
    assert losses.items() <= all_losses.items()
    assert max(losses) == max(all_losses)
    for name, tensor in all_weights.items():
        assert torch.equal(weights[name], tensor), name
