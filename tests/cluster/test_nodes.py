"""Several nodes on this machine: one lost, one gained, one announced to leave."""

import itertools
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest
from runs import SAVED, STEPS, assert_close, assert_same, kill, outcome, saved, start, wait_for, workers, write

from ssl_ray.cli.main import main

pytestmark = pytest.mark.slow


QUICK = {
    "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "10",  # instead of a minute, for workers on a node that is gone
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "1",  # whatever Ray this process has started before
    "RAY_TRAIN_PREEMPTION_POLL_INTERVAL_S": "0.5",
    "TORCH_PROCESS_GROUP_SHUTDOWN_TIMEOUT_S": "2",  # instead of half a minute, for a worker that is suspended
}
"""How soon Ray notices what the tests do."""


@contextmanager
def head_of(cpus: int) -> Iterator[Any]:
    """A cluster of one node, to which others can be added."""
    from ray.cluster_utils import Cluster

    small = {"object_store_memory": 150 * 10**6, "include_dashboard": False}
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": cpus, **small})
    try:
        yield cluster
    finally:
        cluster.shutdown()


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    """A head of one CPU, to which each test adds the nodes that it needs; Ray starts once for all of them."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in QUICK.items():
            patch.setenv(name, value)
        with head_of(1) as cluster:
            yield cluster


def add_node(cluster: Any) -> None:
    cluster.add_node(num_cpus=1, object_store_memory=150 * 10**6)


def with_nodes(cluster: Any, count: int) -> str:
    """Add nodes until there are so many beside the head -> the cluster's address."""
    while len(cluster.worker_nodes) < count:
        add_node(cluster)
    return str(cluster.address)


def raylet(node: object) -> psutil.Process:
    """The process of a node's raylet."""
    (info,) = node.all_processes["raylet"]  # type: ignore[attr-defined]
    return psutil.Process(info.process.pid)


def kill_a_node_with_a_worker(cluster, folder: Path) -> int:
    """SIGKILL to the raylet of a node other than the head that holds a training worker, after the first checkpoint."""
    wait_for(lambda: saved(folder), "a checkpoint")
    for node in list(cluster.worker_nodes):
        process = raylet(node)
        if workers(process):
            cluster.remove_node(node, allow_graceful=False)
            return process.pid
    raise AssertionError("no node but the head has a training worker")


RESIZE_AT_ONCE = """
from functools import partial
train.train.ScalingConfig = partial(train.train.ScalingConfig, elastic_resize_monitor_interval_s=1.0)
"""


def test_a_node_killed_and_another_gained(undisturbed, cohort, tmp_path, cluster):
    """With `workers: [1, 2]`, a node dies and no other is there: the run goes on with one worker, and reads though no
    CPU is left for that; after a node came, it goes on with two."""
    path = write(tmp_path, cohort, workers=[1, 2])
    driver = start(path, with_nodes(cluster, 1), patch=RESIZE_AT_ONCE)
    try:
        kill_a_node_with_a_worker(cluster, tmp_path)
        before = saved(tmp_path)[-1]
        wait_for(lambda: saved(tmp_path)[-1] > before, "a checkpoint of one worker")
        (alone,) = workers()
        alone.suspend()  # the whole run takes seconds, and Ray looks for new nodes every 20
        add_node(cluster)
        wait_for(lambda: len(workers()) == 2, "two workers in place of one")
        assert driver.wait(300) == 0, path.with_suffix(".log").read_text()[-3000:]
    finally:
        kill(driver)
    found = outcome(path)
    assert [count for count, _ in itertools.groupby(found.workers)] == [2, 1, 2]
    assert found.started == sorted(found.started)
    assert found.started[1] >= SAVED
    assert_close(found, undisturbed)


def test_a_node_killed_and_replaced(undisturbed, cohort, tmp_path, cluster):
    """With `workers: 2` and room for one, the run waits, and goes on from its checkpoint when there is a node again."""
    path = write(tmp_path, cohort, workers=2)
    driver = start(path, with_nodes(cluster, 1))
    try:
        kill_a_node_with_a_worker(cluster, tmp_path)
        wait_for(lambda: not workers(raylet(cluster.head_node)), "the end of the worker that is left", 60)
        before = saved(tmp_path)
        time.sleep(5)
        assert driver.poll() is None
        assert saved(tmp_path) == before
        add_node(cluster)
        assert driver.wait(300) == 0, path.with_suffix(".log").read_text()[-3000:]
    finally:
        kill(driver)
    found = outcome(path)
    assert found.started[-1] >= SAVED
    assert set(found.workers) == {2}
    assert_close(found, undisturbed)


ASK_AT_EVERY_STEP = """
def work(job):
    from ssl_ray.pretrain import begin, worker
    worker._PREEMPTION_SECONDS = 0.0
    worker.train_loop(job, begin.begin(job))
trainer = train.TorchTrainer
train.TorchTrainer = lambda _, **options: trainer(work, **options)
"""


def test_a_node_announced_to_leave(undisturbed, cohort, tmp_path, cluster):
    """Ray says that a node will be preempted, and it dies: a checkpoint is written just in time, and the two workers go
    on from it on the nodes that are left."""
    path = write(tmp_path, cohort, workers=2, checkpoint_every=None, checkpoint_minutes=60)
    driver = start(path, with_nodes(cluster, 2), patch=ASK_AT_EVERY_STEP)
    try:
        wait_for(lambda: list(tmp_path.glob("output/*/*/best.safetensors")), "the first validation")
        ranks = workers()
        for rank in ranks:  # the whole run takes seconds: it is held until Ray knows of the drain
            rank.suspend()
        assert not saved(tmp_path)
        node = next(node for node in cluster.worker_nodes if workers(raylet(node)))
        drain = ["drain-node", "--address", cluster.address, "--node-id", node.node_id]
        drain += ["--reason", "DRAIN_NODE_REASON_PREEMPTION", "--reason-message", "test"]
        ray = Path(sys.executable).with_name("ray")
        subprocess.run([ray, *drain, "--deadline-remaining-seconds", "20"], check=True, capture_output=True)
        time.sleep(2)
        for rank in ranks:
            rank.resume()
        (step,) = wait_for(lambda: saved(tmp_path), "a checkpoint just in time", 20)
        assert step < STEPS
        cluster.remove_node(node, allow_graceful=False)
        assert driver.wait(300) == 0, path.with_suffix(".log").read_text()[-3000:]
    finally:
        kill(driver)
    found = outcome(path)
    assert found.started[-1] == step
    assert_close(found, undisturbed)


def test_the_head_killed(undisturbed, cohort, tmp_path, monkeypatch, ray_cluster):
    """Ray does not survive it and ends the driver with one line; the same command goes on on a new cluster."""
    # Not before this process is connected: it would end as well, since it has clients of the dead head.
    monkeypatch.setenv("RAY_gcs_rpc_server_reconnect_timeout_s", "5")  # instead of a minute
    path = write(tmp_path, cohort)
    with head_of(2) as cluster:
        driver = start(path, cluster.address)
        try:
            wait_for(lambda: saved(tmp_path), "a checkpoint")
            family = [raylet(cluster.head_node), *raylet(cluster.head_node).children(recursive=True)]
            (server,) = cluster.head_node.all_processes["gcs_server"]
            for process in (server.process.pid, family[0].pid):
                psutil.Process(process).kill()
            assert driver.wait(120) == 1
            psutil.wait_procs(family, timeout=60)
        finally:
            kill(driver)
    text = path.with_suffix(".log").read_text()
    assert "GCS may have been killed" in text
    assert "Traceback" not in text
    assert main(["pretrain", str(path)]) == 0
    assert_same(outcome(path), undisturbed)
