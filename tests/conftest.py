"""One thread a test process, one Ray cluster a test session."""

import os

os.environ["OMP_NUM_THREADS"] = "1"
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.pop("MLFLOW_TRACKING_URI", None)  # a server of the person who runs the tests
os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
# As `connect` has them on a machine of one's own. A process of Ray takes two seconds of a core to start.
os.environ.setdefault("RAY_prestart_worker_first_driver", "0")
os.environ.setdefault("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "0")
# How soon Ray notices what the tests do: every start, fault and end of a training waits until Ray Train looks again,
# and a node that was killed is lost after five checks, one every half second. A slow answer still has ten seconds.
os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.3")
os.environ.setdefault("RAY_health_check_period_ms", "500")

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from filelock import FileLock
from hypothesis import settings

from ssl_ray.cluster.malloc import keep_freed

keep_freed()
torch.set_num_threads(1)
settings.register_profile("ssl_ray", deadline=None, print_blob=True)
settings.load_profile("ssl_ray")


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Whatever asks for a Ray is slow, as to start one takes ten seconds by itself; files with slow tests come first.

    Two processes then share the many short files that are left, and end at about the same time.
    """
    for item in items:
        if "ray_cluster" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.slow)
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)


@pytest.fixture(scope="session")
def ray_cluster() -> Iterator[None]:
    """A local Ray of two CPUs, shared by all tests that ask for it."""
    import ray

    from ssl_ray.cluster.worker import quiet, runtime_env

    quiet()
    ray.init(
        address="local",  # never the cluster that somebody works on
        num_cpus=2,
        object_store_memory=10**9,
        include_dashboard=False,
        runtime_env=runtime_env(),
        log_to_driver=False,
    )
    yield
    ray.shutdown()


@pytest.fixture(scope="session")
def cohort(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six unlabelled volumes and seven labelled ones."""
    from ssl_ray.config.schema import PhantomCohort
    from ssl_ray.phantom.cohort import write_cohort

    root = tmp_path_factory.mktemp("cohort")
    numbers = {"unlabelled": 6, "labelled": 4, "validation": 2, "test": 1, "seed": 1}
    write_cohort(PhantomCohort(root=str(root), splits=(2, 4), **numbers))
    return root


@pytest.fixture(scope="module")
def probe() -> Iterator[Any]:
    """The process that reads the hostile input of one test module."""
    from hostile import Probe

    one = Probe()
    yield one
    one.close()


@pytest.fixture(scope="session")
def undisturbed(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, cohort: Path) -> Any:
    """The small pretraining of tests/runs.py without any fault, which one test process carries out for all."""
    from runs import outcome, write

    from ssl_ray.cli.main import main

    own = tmp_path_factory.getbasetemp()
    folder = (own.parent if "PYTEST_XDIST_WORKER" in os.environ else own) / "undisturbed"
    with FileLock(f"{folder}.lock"):
        if not (folder / "done").is_file():
            request.getfixturevalue("ray_cluster")
            assert main(["pretrain", str(write(folder, cohort))]) == 0
            (folder / "done").touch()
        return outcome(folder / "faults.yaml")
