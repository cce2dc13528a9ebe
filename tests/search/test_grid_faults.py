"""After a fault, a grid ends with exactly one finished run a cell, each as if nothing had happened."""

import contextlib
import os
import pkgutil
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from unittest import mock

import numpy as np
import psutil
import pytest
import ray
import runs
import torch
import yaml
from safetensors.torch import load_file

from ssl_ray.cli import main
from ssl_ray.config.loading import load
from ssl_ray.finetune.patches import PatchSampler
from ssl_ray.finetune.trial import run_trial
from ssl_ray.search import grid
from ssl_ray.search.callbacks import FAILURE
from ssl_ray.study.parts import folders_of, tracker_of

pytestmark = pytest.mark.slow
wait_for = partial(runs.wait_for, seconds=120)
ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])  # workers cannot import a test

A, B = "n02-random-lr0.001-seed0", "n04-random-lr0.001-seed0"
STEPS = 12
"""Validations and checkpoints at steps 4, 8 and 12."""

real_trial, real_save, real_batch = run_trial, torch.save, PatchSampler.batch


def die(*_, **__):
    os.kill(os.getpid(), signal.SIGKILL)


def die_in_the_middle_of(state, path, *_):
    real_save(state, path)
    os.truncate(path, path.stat().st_size // 2)
    die()


def crash(*_, **__):
    raise RuntimeError("the moon is in the way")


def poison(sampler, step):
    images, labels = real_batch(sampler, step)
    return images * np.nan, labels


FAULTS = {
    # name: (what of the trial is replaced, at which call since the trial started, by what)
    "killed in training": ("ssl_ray.finetune.learner.take_step", 6, die),
    "killed in validation": ("ssl_ray.finetune.learner.predict", 2, die),
    "killed in a checkpoint": ("ssl_ray.training.checkpoint.torch.save", 1, die_in_the_middle_of),
    "killed in the evaluation": ("ssl_ray.finetune.trial.evaluate", 2, die),
    "killed in the result": ("ssl_ray.finetune.trial_folder.save", 1, die),
    "crash": ("ssl_ray.finetune.learner.take_step", 6, crash),
    "nan": ("ssl_ray.finetune.trial.PatchSampler.batch", 6, poison),
    "pause": ("ssl_ray.finetune.learner.take_step", 6, None),
}


def faulty_trial(study, cell, data, weights, folder, device, key):
    """In a trial's process: `run_trial`, with the next fault that the test has planned for this cell."""
    plan, fault = folders_of(study).study / "plan" / cell.name, None
    with contextlib.suppress(FileNotFoundError):
        fault, _, rest = plan.read_text().partition("\n")
        plan.write_text(rest)
    arguments = study, cell, data, weights, folder, device, key
    if not fault:
        yield from real_trial(*arguments)
        return
    target, count, what = FAULTS[fault]
    original, calls = pkgutil.resolve_name(target), iter(range(1, 1000))

    def pause(*_, **__):
        (folders_of(study).study / "plan" / "paused").write_text(str(os.getpid()))
        time.sleep(600)

    def wrapped(*arguments, **options):
        return (what or pause)(*arguments, **options) if next(calls) == count else original(*arguments, **options)

    with mock.patch(target, wrapped):
        yield from real_trial(*arguments)


def drive(path, *options):
    """The command line, with planned faults."""
    with mock.patch.object(grid, "work", faulty_trial):
        return main(["finetune", str(path), *options])


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def experiment(cohort, cache, tmp_path):
    """Writes a grid of two cells, one trial at a time, with the faults planned for each."""

    def make(**plan):
        return write(tmp_path, cohort, cache, plan)

    return make


def write(folder, cohort, cache, plan):
    preparation = {"spacing": 9, "hu_window": [-175, 250]}
    tree = {
        "name": "grid",
        "output": str(folder / "output"),
        "cache": str(cache),
        "network": {"hidden_size": 48, "mlp_dim": 64, "num_heads": 3, "feature_size": 4},
        "pretrain": {
            "sources": [{"root": str(cohort), "datalist": "unlabelled.json"}],
            "preparation": preparation,
            "patch_size": 16,
            "corruption": {"inpaint_size": [2, 6], "outpaint_size": [4, 10], "shuffle_size": 3},
        },
        "finetune": {
            "cohort": {"root": str(cohort), "classes": 14, "splits": {2: "labelled_2.json", 4: "labelled_4.json"}},
            "preparation": preparation,
            "patch_size": 16,
            "patches_per_volume": 2,
            "steps": STEPS,
            "validate_every": 4,
            "checkpoint_minutes": 0,
            "precision": "float32",
            "grid": {"init": ["random"], "lr": [1e-3]},
            "max_concurrent_trials": 1,
            "max_failures": -1,
        },
    }
    path = folder / "grid.yaml"
    path.write_text(yaml.safe_dump(tree))
    (folders_of(load(path)).study / "plan").mkdir(parents=True)
    for cell, faults in plan.items():
        (folders_of(load(path)).study / "plan" / {"a": A, "b": B}[cell]).write_text("\n".join(faults))
    return path


@pytest.fixture(scope="module")
def undisturbed(ray_cluster, cohort, cache, tmp_path_factory):
    """What the grid finds without faults."""
    path = write(tmp_path_factory.mktemp("undisturbed"), cohort, cache, {})
    assert main(["finetune", str(path)]) == 0
    return outcome(path)


def runs(path):
    """Newest state of every cell's run by name; no cell has two."""
    found = tracker_of(load(path)).runs(kind="trial")
    by_name = {run.info.run_name: run for run in found}
    assert len(by_name) == len(found)
    return by_name


def history(path, run, metric):
    points = tracker_of(load(path)).client.get_metric_history(run.info.run_id, metric)
    return [(point.step, point.value) for point in sorted(points, key=lambda point: point.timestamp)]


def starts(path, cell):
    """The step that each start of a trial went on from, and how many steps it had to do again."""
    run = runs(path)[cell]
    again = [int(value) for _, value in history(path, run, "replayed_steps")]
    print(f"{cell}: steps done again {again}")
    assert max(again) < 4, "less than between two checkpoints"
    return [value for _, value in history(path, run, "started_at")]


def outcome(path):
    """Of every cell: each metric's history but of clocks and starts, and the weights."""
    found = {}
    for name, run in runs(path).items():
        assert run.info.status == "FINISHED"
        assert not run.data.tags.get(FAILURE)
        metrics = run.data.metrics.keys() - {"seconds_per_step", "started_at", "replayed_steps"}
        histories = {metric: history(path, run, metric) for metric in metrics if not metric.startswith("system/")}
        for metric, points in histories.items():
            assert len({step for step, _ in points}) == len(points), f"{metric}: a step is logged twice"
        assert [step for step, _ in sorted(histories["loss"])] == list(range(1, STEPS + 1)), "no step is missing"
        (weights,) = folders_of(load(path)).study.glob(f"finetune-*/{name}-*/unetr.safetensors")
        assert [child.name for child in weights.parent.iterdir() if child.is_dir()] == [], "checkpoints are gone"
        found[name] = {metric: sorted(points) for metric, points in histories.items()}, load_file(weights)
    return found


def assert_same(path, expected):
    found = outcome(path)
    assert found.keys() == expected.keys() == {A, B}
    for cell, (histories, weights) in found.items():
        assert histories == expected[cell][0], f"{cell}: bit by bit, every step and every score"
        for name, tensor in expected[cell][1].items():
            assert torch.equal(weights[name], tensor), f"{cell}: {name}"


def test_a_trial_killed_again_and_again(undisturbed, experiment, capfd):
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


def test_a_trial_that_crashes_is_tried_again_and_then_a_hole(undisturbed, experiment, capfd):
    """Tried again `max_failures` times from its checkpoint, then recorded with its reason; the grid goes on with exit
    code 1, the report shows the hole, and the same command given again tries that cell alone."""
    path = experiment(a=["crash", "crash"])
    options = ["--set", "finetune.max_failures=1"]
    with mock.patch.object(grid, "work", faulty_trial):
        assert main(["run", str(path), *options]) == 1
    out = capfd.readouterr().out
    assert "RuntimeError: the moon is in the way" in out
    failed, other = runs(path)[A], runs(path)[B]
    assert (failed.info.status, other.info.status) == ("FAILED", "FINISHED")
    assert failed.data.tags[FAILURE] == "RuntimeError: the moon is in the way"
    assert b"crash" in tracker_of(load(path)).read(failed.info.run_id, "failure.txt")
    assert starts(path, A) == [0, 4]
    page = (folders_of(load(path)).study / "report.md").read_text()
    assert f"`{A}` failed: RuntimeError: the moon is in the way" in page
    assert "random initialisation is failed" in page, "a hole where the number would stand"
    assert "**1 of 2 cells has no result**" in page

    assert main(["run", str(path), *options]) == 0
    assert "1 cells trained now, 1 were done already" in capfd.readouterr().out
    assert starts(path, A) == [0, 4, 8], "it goes on from where it had come to"
    assert runs(path)[A].info.run_id == failed.info.run_id
    assert runs(path)[B].info.end_time == other.info.end_time
    assert_same(path, undisturbed)
    assert "the moon" not in (folders_of(load(path)).study / "report.md").read_text()


def test_a_trial_that_is_not_finite_stops_and_is_not_tried_again(undisturbed, experiment, capfd):
    """With `stop`, the run names step and volumes, and is not retried; without the cause, the cell ends as ever."""
    path = experiment(b=["nan"])
    options = ["--set", "finetune.on_nonfinite=stop"]
    assert drive(path, *options) == 1
    failed = runs(path)[B]
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


def driver(path):
    """A driver of its own, on the session's cluster."""
    address = ray.get_runtime_context().gcs_address
    code = "import sys, test_grid_faults as t; sys.exit(t.drive(sys.argv[1]))"
    places = os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "RAY_ADDRESS": address, "PYTHONPATH": places}
    log = (path.parent / "driver.log").open("w")
    return subprocess.Popen(
        [sys.executable, "-c", code, str(path)],
        env=environment,
        start_new_session=True,
        stdout=log,
        stderr=subprocess.STDOUT,
    )


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT], ids=lambda number: number.name)
def test_the_driver_ends_and_is_started_again(undisturbed, experiment, capfd, number):
    """With one cell finished and the other in mid-training. Open runs end as killed where the driver can still do so;
    the same command, given again, goes on from the checkpoint and leaves the finished cell alone."""
    path = experiment(b=["pause"])
    process = driver(path)
    log = path.parent / "driver.log"
    paused = folders_of(load(path)).study / "plan" / "paused"
    try:
        wait_for(lambda: process.poll() is not None or (paused.is_file() and paused.read_text()), "the second cell")
        assert process.poll() is None, log.read_text()
        process.send_signal(number)
        code = process.wait(60)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    wait_for(lambda: not psutil.pid_exists(int(paused.read_text())), "Ray ends the trial of a driver that is gone")
    finished, open_run = runs(path)[A], runs(path)[B]
    assert finished.info.status == "FINISHED"
    (grid_run,) = tracker_of(load(path)).runs(kind="grid")
    if number != signal.SIGKILL:
        assert code == 1
        assert (open_run.info.status, grid_run.info.status) == ("KILLED", "KILLED")
        assert "the same command goes on" in log.read_text()
        assert "Traceback" not in log.read_text()

    assert main(["finetune", str(path)]) == 0
    assert "1 cells trained now, 1 were done already" in capfd.readouterr().out
    assert starts(path, B) == [0, 4]
    again = runs(path)[A]
    assert (again.info.run_id, again.info.end_time, again.data.metrics) == (
        finished.info.run_id,
        finished.info.end_time,
        finished.data.metrics,
    )
    assert runs(path)[B].info.run_id == open_run.info.run_id
    assert_same(path, undisturbed)


@contextlib.contextmanager
def node():
    """A further node of the session's cluster, and its processes."""
    address = ray.get_runtime_context().gcs_address
    options = ["--num-cpus=2", "--object-store-memory=100000000", "--block"]
    command = [sys.executable, "-m", "ray.scripts.scripts", "start", f"--address={address}", *options]
    before = len(alive())
    starter = psutil.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True)

    def kill():
        """As if the machine lost power."""
        processes = [*starter.children(recursive=True), starter]
        for process in processes:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        starter.wait()
        return [process.pid for process in processes]

    try:
        wait_for(lambda: len(alive()) > before, "the new node")
        yield kill
    finally:
        if starter.poll() is None:
            kill()
        wait_for(lambda: len(alive()) <= before, "the end of the node")


def alive():
    return [node for node in ray.nodes() if node["Alive"]]


def test_a_trial_whose_node_is_lost_goes_on_at_another(undisturbed, experiment):
    """A node dies with the trial on it, and another one comes: there the trial goes on from its checkpoint."""
    path = experiment(a=["pause"])
    paused = folders_of(load(path)).study / "plan" / "paused"
    # A trial needs more than what is left of the first node.
    holder = ray.remote(num_cpus=1)(Holder).remote()
    ray.get(holder.ready.remote())
    with contextlib.ExitStack() as stack, ThreadPoolExecutor() as pool:
        lose = stack.enter_context(node())

        def exchange():
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
    def ready(self):
        return True
