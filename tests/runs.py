"""A small pretraining that tests disturb, and what is compared afterwards."""

import contextlib
import glob
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import torch
from studies import place_database, small_tree, write_study
from torch import Tensor

from ssl_ray.networks.weight_files import load_weights
from ssl_ray.study.experiment import load
from ssl_ray.study.parts import folders_of, tracker_of

STEPS, SAVED = 240, 40
"""Optimizer steps of the run, and after how many it writes a checkpoint."""


@dataclass(frozen=True)
class Outcome:
    """What a run ends with: losses by step, the exported weights, the steps that it started at, steps done again."""

    losses: dict[int, float]
    weights: dict[str, Tensor]
    started: list[int]
    replayed: list[int]
    workers: list[int]


def write(folder: Path, cohort: Path, study: dict[str, Any] | None = None, **pretrain: Any) -> Path:
    """The experiment's YAML: 240 steps of a tiny network, each logged, in float32."""
    steps = {"batch_size": 4, "epochs": 120, "validate_every": 30, "log_every": 1, "checkpoint_every": SAVED}
    changes = {"name": "faults", "pretrain": steps | {"block_megabytes": 0.08} | pretrain}
    place_database(folder / "mlflow.db")
    return write_study(folder / "faults.yaml", small_tree(folder, cohort, **changes) | (study or {}))


_logs: list[Path] = []
"""Of every run that was started, so that one that did not do what was waited for can say why."""


def start(
    path: Path, address: str = "", *more: str, log: Path | None = None, patch: str = ""
) -> subprocess.Popen[bytes]:
    """`ssl-ray pretrain` in a process group of its own, on a Ray of its own or the one at an address.

    Python code in `patch` is run in the driver first; it finds `ssl_ray.pretrain.driver` as `train`.
    """
    out = (log or path.with_suffix(".log")).open("ab")
    _logs.append(Path(out.name))
    environment = {**os.environ, "RAY_ADDRESS": address, "SSL_RAY_TRACEBACK": "1"}
    imports = "import sys\nfrom ssl_ray.cli.main import main\nfrom ssl_ray.pretrain import driver as train"
    patched = f"{imports}\n{patch}\nsys.exit(main())"
    program = ["-c", patched] if patch else ["-m", "ssl_ray"]
    return subprocess.Popen(
        [sys.executable, *program, "pretrain", str(path), *more],
        env=environment,
        start_new_session=True,
        stdout=out,
        stderr=subprocess.STDOUT,
    )


def session() -> str:
    """Address of the Ray that the fixture `ray_cluster` has started; a driver there waits for none of its own."""
    import ray

    return str(ray.get_runtime_context().gcs_address)


def kill(driver: subprocess.Popen[bytes]) -> None:
    """SIGKILL to a driver; its Ray notices some seconds later, and its workers go on writing until then."""
    with contextlib.suppress(psutil.NoSuchProcess):
        family = psutil.Process(driver.pid).children(recursive=True) + workers()
        os.killpg(driver.pid, signal.SIGKILL)
        driver.wait()
        psutil.wait_procs(family, timeout=60)


def outcome(path: Path) -> Outcome:
    """Read the result of a finished run; fails where MLflow has a step twice or more than one run."""
    study = load(path, [])
    tracker = tracker_of(study)
    (run,) = tracker.runs(kind="pretraining")
    assert run.info.status == "FINISHED"
    points = tracker.client.get_metric_history(run.info.run_id, "loss")
    # Ray's queue may hand over two records that were sent at about the same time in either order.
    losses = {point.step: point.value for point in sorted(points, key=lambda point: point.step)}
    assert len(losses) == len(points), "a step is logged twice"
    (weights,) = folders_of(study).study.glob("pretrain-*/best.safetensors")

    def numbers(metric: str) -> list[int]:
        return [int(value) for _, value in sorted(tracker.history(run.info.run_id, f"system/{metric}").items())]

    return Outcome(losses, load_weights(weights), numbers("started_at"), numbers("replayed_steps"), numbers("workers"))


def assert_same(found: Outcome, expected: Outcome, starts: int = 2) -> None:
    """Every loss and weight bit by bit, no step missing, and it did go on from a checkpoint."""
    print(f"started at {found.started}, steps done again {found.replayed}")
    assert list(found.losses) == list(range(1, STEPS + 1)), "no step is missing"
    assert found.losses == expected.losses, "bit by bit, every step"
    for name, tensor in expected.weights.items():
        assert torch.equal(found.weights[name], tensor), name
    assert len(found.started) >= starts
    assert found.started[0] == 0
    assert found.started[-1] >= SAVED, "it did not go on from a checkpoint"
    assert max(found.replayed) <= 3 * SAVED, "more than the steps since the checkpoint before the last"


def assert_close(found: Outcome, expected: Outcome) -> None:
    """Another number of workers adds up in another order: the same samples, so the same losses but for rounding."""
    assert list(found.losses) == list(range(1, STEPS + 1))
    differences = {step: abs(found.losses[step] - loss) for step, loss in expected.losses.items()}
    assert all(differences[step] < 1e-4 * expected.losses[step] for step in range(1, 21)), "not yet added up"
    assert max(differences.values()) < 1e-3
    for name, tensor in expected.weights.items():
        assert torch.allclose(found.weights[name], tensor, atol=2e-2), name


def wait_for(condition: Callable[[], Any], what: str, seconds: float = 240) -> Any:
    """The first true value of a condition."""
    deadline = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < deadline, "\n".join([what, *(log.read_text()[-3000:] for log in _logs[-1:])])
        # What is waited for runs on the same cores: looking for processes all the time takes half of one from it.
        time.sleep(0.2)
    return found


def saved(folder: Path) -> list[int]:
    """Steps of the whole checkpoints under a folder, in which a run writes and removes them meanwhile."""
    steps = []
    # Unlike `Path.glob`, this goes on where a folder is gone before it is looked into.
    for path in glob.glob(f"{folder}/**/checkpoints/[!.]*/manifest.json", recursive=True):
        with contextlib.suppress(OSError):
            steps.append(json.loads(Path(path).read_text())["step"])
    return sorted(steps)


def workers(root: psutil.Process | None = None) -> list[psutil.Process]:
    """Training workers among the descendants of a process."""
    found = []
    for process in (root or psutil.Process()).children(recursive=True):
        try:
            if "RayTrainWorker" in " ".join(process.cmdline()):
                found.append(process)
        except psutil.Error:
            continue
    return found
