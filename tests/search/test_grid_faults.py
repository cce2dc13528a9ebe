"""After a fault, a grid ends with exactly one finished run a cell, each as if nothing had happened."""

import contextlib
import itertools
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from functools import lru_cache, partial
from pathlib import Path
from typing import Any
from unittest import mock

import events
import psutil
import pytest
import ray
import runs
import torch
from events import after_steps, in_network, on_open, on_rename
from ray import tune
from safetensors.torch import load_file
from studies import place_database, small_tree, write_study
from torch import Tensor, nn

from ssl_ray.cli.main import main
from ssl_ray.search.cells import CELL, FAILURE
from ssl_ray.study.experiment import load
from ssl_ray.study.parts import folders_of, tracker_of
from ssl_ray.tracking.tracker import Tracker

pytestmark = pytest.mark.slow
wait_for = partial(runs.wait_for, seconds=120)
for module in (events, sys.modules[__name__]):
    ray.cloudpickle.register_pickle_by_value(module)  # workers cannot import a test

A, B = "n02-random-lr0.001-run0", "n04-random-lr0.001-run0"
STEPS = 12
"""Validations and checkpoints at steps 4, 8 and 12."""

Outcome = dict[str, tuple[dict[str, list[tuple[int, float]]], dict[str, Tensor]]]
"""Of every cell: each metric's history, and the weights."""


def die(*_: Any) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def die_half_way(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)
    die()


def crash() -> None:
    raise RuntimeError("the moon is in the way")


def die_in_prediction(after: str) -> AbstractContextManager[None]:
    """While the network predicts, once a checkpoint that matches is there."""
    from monai.networks.nets import UNETR

    def fault(network: nn.Module, image: Tensor) -> None:
        if not network.training and list(Path("/").glob(after.lstrip("/"))):
            die()

    return in_network(UNETR, fault)


def poison_step(number: int) -> AbstractContextManager[None]:
    """The images of one training step hold a NaN."""
    from monai.networks.nets import UNETR

    steps = itertools.count(1)

    def fault(network: nn.Module, images: Tensor) -> Tensor | None:
        return images * math.nan if network.training and next(steps) == number else None

    return in_network(UNETR, fault)


def pause(study: str) -> None:
    Path(study, "plan", "paused").write_text(str(os.getpid()))
    time.sleep(600)


FAULTS: dict[str, Callable[[str, str], AbstractContextManager[None]]] = {
    # name: how it comes, out of the study's folder and the pattern of the trial's
    "killed in training": lambda study, trial: after_steps(5, die),
    "killed in validation": lambda study, trial: die_in_prediction(f"{trial}/checkpoints/00000004"),
    "killed in a checkpoint": lambda study, trial: on_open(f"{trial}/checkpoints/.00000008-*/state.pt", die_half_way),
    "killed in the evaluation": lambda study, trial: die_in_prediction(f"{trial}/checkpoints/00000012"),
    "killed in the result": lambda study, trial: on_rename(f"{trial}/model.safetensors", die),
    "crash after step 5": lambda study, trial: after_steps(5, crash),
    "crash after step 9": lambda study, trial: after_steps(9, crash),
    "nan": lambda study, trial: poison_step(6),
    "pause": lambda study, trial: after_steps(5, lambda: pause(study)),
}


def with_planned_faults(trainable: Callable[[Any], None], study: str) -> Callable[[Any], None]:
    """What Tune ships to a trial's process: the same, with the next fault that the test has planned for its cell."""

    def faulty(space: dict[str, Any]) -> None:
        cell = space["cell"].name
        plan, fault = Path(study, "plan", cell), ""
        with contextlib.suppress(FileNotFoundError):
            fault, _, rest = plan.read_text().partition("\n")
            plan.write_text(rest)
        with FAULTS[fault](study, f"{study}/finetune-*/{cell}-*") if fault else contextlib.nullcontext():
            trainable(space)

    return faulty


@contextlib.contextmanager
def planned_faults(path: Path) -> Iterator[None]:
    """Whatever this process gives to Tune has the faults that are planned for the study."""
    study, real = str(folders_of(load(path)).study), tune.with_resources
    with mock.patch.object(
        tune, "with_resources", lambda trainable, resources: real(with_planned_faults(trainable, study), resources)
    ):
        yield


def drive(path: Path, *options: str) -> int:
    """The command line, with planned faults."""
    with planned_faults(path):
        return main(["finetune", str(path), *options])


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def experiment(cohort: Path, cache: Path, tmp_path: Path) -> Callable[..., Path]:
    """Writes a grid of two cells, one trial at a time, with the faults planned for each."""

    def make(**plan: list[str]) -> Path:
        return write(tmp_path, cohort, cache, plan)

    return make


def write(folder: Path, cohort: Path, cache: Path, plan: dict[str, list[str]]) -> Path:
    tree = small_tree(
        folder,
        cohort,
        name="grid",
        cache=str(cache),
        finetune={
            "cohort": {"splits": {2: "labelled_2.json", 4: "labelled_4.json"}},
            "patches_per_volume": 2,
            "steps": STEPS,
            "validate_every": 4,
            "checkpoint_minutes": 0,
            "grid": {"init": ["random"], "lr": [1e-3]},
            "max_concurrent_trials": 1,
            "max_failures": -1,
        },
    )
    place_database(folder / "mlflow.db")
    path = write_study(folder / "grid.yaml", tree)
    plans = folders_of(load(path)).study / "plan"
    plans.mkdir(parents=True)
    for cell, faults in plan.items():
        (plans / {"a": A, "b": B}[cell]).write_text("\n".join(faults))
    return path


@pytest.fixture(scope="module")
def undisturbed(ray_cluster: None, cohort: Path, cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Outcome:
    """What the grid finds without faults."""
    path = write(tmp_path_factory.mktemp("undisturbed"), cohort, cache, {})
    assert main(["finetune", str(path)]) == 0
    return outcome(path)


def runs_of(path: Path) -> dict[str, Any]:
    """Newest state of every cell's run by name; no cell has two."""
    found = tracker_of(load(path)).runs(kind="trial")
    by_name = {run.data.tags[CELL]: run for run in found}
    assert len(by_name) == len(found)
    return by_name


@lru_cache
def reader(path: Path) -> Tracker:
    """Of a study that has ended: one for all metrics, of which every organ has some."""
    return tracker_of(load(path), create=False)


def history(path: Path, run: Any, metric: str) -> list[tuple[int, float]]:
    points = reader(path).client.get_metric_history(run.info.run_id, metric)
    return [(point.step, point.value) for point in sorted(points, key=lambda point: point.timestamp)]


def starts(path: Path, cell: str) -> list[float]:
    """The step that each start of a trial went on from, and how many steps it had to do again."""
    run = runs_of(path)[cell]
    again = [int(value) for _, value in history(path, run, "system/replayed_steps")]
    print(f"{cell}: steps done again {again}")
    assert max(again) < 4, "less than between two checkpoints"
    return [value for _, value in history(path, run, "system/started_at")]


def outcome(path: Path) -> Outcome:
    """Of every cell: each metric's history but of clocks and starts, and the weights."""
    found = {}
    for name, run in runs_of(path).items():
        assert run.info.status == "FINISHED"
        assert not run.data.tags.get(FAILURE)
        metrics = [metric for metric in run.data.metrics if not metric.startswith("system/")]
        histories = {metric: history(path, run, metric) for metric in metrics}
        for metric, points in histories.items():
            assert len({step for step, _ in points}) == len(points), f"{metric}: a step is logged twice"
        assert [step for step, _ in sorted(histories["loss"])] == list(range(1, STEPS + 1)), "no step is missing"
        (weights,) = folders_of(load(path)).study.glob(f"finetune-*/{name}-*/model.safetensors")
        assert [child.name for child in weights.parent.iterdir() if child.is_dir()] == [], "checkpoints are gone"
        found[name] = {metric: sorted(points) for metric, points in histories.items()}, load_file(weights)
    return found


def assert_same(path: Path, expected: Outcome) -> None:
    found = outcome(path)
    assert found.keys() == expected.keys() == {A, B}
    for cell, (histories, weights) in found.items():
        assert histories == expected[cell][0], f"{cell}: bit by bit, every step and every score"
        for name, tensor in expected[cell][1].items():
            assert torch.equal(weights[name], tensor), f"{cell}: {name}"


def test_a_trial_killed_again_and_again(
    undisturbed: Outcome, experiment: Callable[..., Path], capfd: pytest.CaptureFixture[str]
) -> None:
    """SIGKILL in training, validation, a checkpoint, the evaluation and the result: each time it goes on from its own
    newest whole checkpoint, in a new process, and the other cell is not touched."""
    kills = [name for name in FAULTS if name.startswith("killed")]
    path = experiment(a=kills)
    assert drive(path) == 0
    assert starts(path, A) == [0, 4, 4, 4, 12, 12]
    assert starts(path, B) == [0]
    assert_same(path, undisturbed)
    out = capfd.readouterr().out
    assert out.count("worker process died") == len(kills)
    assert "2 cells trained now, 0 were done already" in out


def test_a_trial_that_crashes_is_tried_again_and_then_a_hole(
    undisturbed: Outcome, experiment: Callable[..., Path], capfd: pytest.CaptureFixture[str]
) -> None:
    """Tried again `max_failures` times from its checkpoint, then recorded with its reason; the grid goes on with exit
    code 1, the report shows the hole, and the same command given again tries that cell alone."""
    path = experiment(a=["crash after step 5", "crash after step 9"])
    options = ["--set", "finetune.max_failures=1"]
    with planned_faults(path):
        assert main(["run", str(path), *options]) == 1
    out = capfd.readouterr().out
    assert "RuntimeError: the moon is in the way" in out
    failed, other = runs_of(path)[A], runs_of(path)[B]
    assert (failed.info.status, other.info.status) == ("FAILED", "FINISHED")
    assert failed.data.tags[FAILURE] == "RuntimeError: the moon is in the way"
    assert b"crash" in (tracker_of(load(path)).read(failed.info.run_id, "failure.txt") or b"")
    assert starts(path, A) == [0, 4]
    page = (folders_of(load(path)).study / "report.md").read_text()
    assert f"`{A}` failed: RuntimeError: the moon is in the way" in page
    assert "no random run is finished (failed)" in page, "a hole where the number would stand"
    assert "**1 of 2 cells has no result**" in page

    assert main(["run", str(path), *options]) == 0
    assert "1 cells trained now, 1 were done already" in capfd.readouterr().out
    assert starts(path, A) == [0, 4, 8], "it goes on from where it had come to"
    assert runs_of(path)[A].info.run_id == failed.info.run_id
    assert runs_of(path)[B].info.end_time == other.info.end_time
    assert_same(path, undisturbed)
    assert "the moon" not in (folders_of(load(path)).study / "report.md").read_text()


def test_a_trial_that_is_not_finite_stops_and_is_not_tried_again(
    undisturbed: Outcome, experiment: Callable[..., Path], capfd: pytest.CaptureFixture[str]
) -> None:
    """With `stop`, the run names step and volumes, and is not retried; without the cause, the cell ends as ever."""
    path = experiment(b=["nan"])
    options = ["--set", "finetune.on_nonfinite=stop"]
    assert drive(path, *options) == 1
    failed = runs_of(path)[B]
    assert failed.info.status == "FAILED"
    assert "step 6: loss nan, gradient norm nan; patches 10 to 11 of seed 0, volumes " in failed.data.tags[FAILURE]
    assert starts(path, B) == [0]
    kept = list(folders_of(load(path)).study.glob(f"finetune-*/{B}-*/faults/step_0000006.*"))
    assert len(kept) == 1
    assert main(["finetune", str(path), *options]) == 0
    assert starts(path, B) == [0, 4]
    for file in kept:
        file.unlink()
    kept[0].parent.rmdir()
    assert_same(path, undisturbed)


def driver(path: Path) -> subprocess.Popen[bytes]:
    """A driver of its own, on the session's cluster."""
    address = ray.get_runtime_context().gcs_address
    # A shell starts what it puts into the background, such as a run of these tests, with Ctrl-C ignored.
    code = "import signal, sys; signal.signal(signal.SIGINT, signal.default_int_handler); "
    code += "from pathlib import Path; import test_grid_faults as t; sys.exit(t.drive(Path(sys.argv[1])))"
    here = Path(__file__).parent
    places = os.pathsep.join([str(here), str(here.parent), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "RAY_ADDRESS": address, "PYTHONPATH": places}
    log = (path.parent / "driver.log").open("w")
    return subprocess.Popen(
        [sys.executable, "-c", code, str(path)],
        env=environment,
        start_new_session=True,
        stdout=log,
        stderr=subprocess.STDOUT,
    )


def end_the_driver(path: Path, number: signal.Signals) -> int:
    """A signal to a driver whose second cell is in mid-training, and the end of that trial -> the driver's code."""
    paused = folders_of(load(path)).study / "plan" / "paused"
    paused.unlink(missing_ok=True)
    process = driver(path)
    try:
        wait_for(lambda: process.poll() is not None or (paused.is_file() and paused.read_text()), "the second cell")
        assert process.poll() is None, (path.parent / "driver.log").read_text()
        process.send_signal(number)
        return process.wait(60)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        wait_for(lambda: not psutil.pid_exists(int(paused.read_text())), "Ray ends the trial of a driver that is gone")


def test_the_driver_ends_and_is_started_again(
    undisturbed: Outcome, experiment: Callable[..., Path], capfd: pytest.CaptureFixture[str]
) -> None:
    """By Ctrl-C, then by SIGKILL, with one cell finished and the other in mid-training. Open runs end as killed where
    the driver can still do so; the same command goes on from the checkpoint and leaves the finished cell alone."""
    path = experiment(b=["pause", "pause"])
    assert end_the_driver(path, signal.SIGINT) == 1
    log = (path.parent / "driver.log").read_text()
    assert "the same command goes on" in log
    assert "Traceback" not in log
    finished, open_run = runs_of(path)[A], runs_of(path)[B]
    (grid_run,) = tracker_of(load(path)).runs(kind="grid")
    assert finished.info.status == "FINISHED"
    assert (open_run.info.status, grid_run.info.status) == ("KILLED", "KILLED")
    end_the_driver(path, signal.SIGKILL)

    assert main(["finetune", str(path)]) == 0
    assert "1 cells trained now, 1 were done already" in capfd.readouterr().out
    assert starts(path, B) == [0, 4, 4]
    again = runs_of(path)[A]
    assert (again.info.run_id, again.info.end_time, again.data.metrics) == (
        finished.info.run_id,
        finished.info.end_time,
        finished.data.metrics,
    )
    assert runs_of(path)[B].info.run_id == open_run.info.run_id
    assert_same(path, undisturbed)


@contextlib.contextmanager
def node() -> Iterator[Callable[[], list[int]]]:
    """A further node of the session's cluster, and its processes."""
    address = ray.get_runtime_context().gcs_address
    options = ["--num-cpus=2", "--object-store-memory=100000000", "--block"]
    command = [sys.executable, "-m", "ray.scripts.scripts", "start", f"--address={address}", *options]
    before = alive()  # one that was killed may still count
    starter = psutil.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True)

    def kill() -> list[int]:
        """As if the machine lost power."""
        processes = [*starter.children(recursive=True), starter]
        for process in processes:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        starter.wait()
        return [process.pid for process in processes]

    try:
        wait_for(lambda: alive() - before, "the new node")
        yield kill
    finally:
        if starter.poll() is None:
            kill()
        wait_for(lambda: not alive() - before, "the end of the node")


def alive() -> set[str]:
    return {node["NodeID"] for node in ray.nodes() if node["Alive"]}


def test_a_trial_whose_node_is_lost_goes_on_at_another(undisturbed: Outcome, experiment: Callable[..., Path]) -> None:
    """A node dies with the trial on it, and another one comes: there the trial goes on from its checkpoint."""
    path = experiment(a=["pause"])
    paused = folders_of(load(path)).study / "plan" / "paused"
    # A trial needs more than what is left of the first node.
    holder = ray.remote(num_cpus=1)(Holder).remote()
    ray.get(holder.ready.remote())
    with contextlib.ExitStack() as stack, ThreadPoolExecutor() as pool:
        lose = stack.enter_context(node())

        def exchange() -> list[int]:
            wait_for(lambda: paused.is_file() and paused.read_text(), "the trial")
            lost = lose()
            stack.enter_context(node())
            return lost

        lost = pool.submit(exchange)
        assert drive(path, "--set", "finetune.cpus_per_trial=1.5") == 0
        assert int(paused.read_text()) in lost.result()
    ray.kill(holder)
    assert starts(path, A) == [0, 4]
    assert_same(path, undisturbed)


class Holder:
    def ready(self) -> bool:
        return True
