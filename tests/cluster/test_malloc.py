"""malloc's habits, as the kernel sees them."""

import multiprocessing
import resource
import sys
import threading
from concurrent.futures import ProcessPoolExecutor

import pytest
import ray
import torch

from ssl_ray.cluster.malloc import environment, keep_freed

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="glibc")


def faults(keep: bool) -> int:
    """Pages that the kernel maps for a tensor of 100 MB in a thread, after others were freed there.

    Some more are mapped at first: glibc leaves small gaps between aligned blocks until a cache of those is full.
    """
    if keep:
        keep_freed()
    found = []

    def work() -> None:
        for _ in range(20):
            before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
            tensor = torch.ones(25_000_000)
            del tensor
            found.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    return found[-1]


@pytest.fixture(scope="module")
def default() -> int:
    """Of a process that malloc was not told anything in."""
    return in_a_process(keep=False)


def in_a_process(keep: bool) -> int:
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(faults, keep).result()


def test_memory_is_mapped_once(default):
    """By default all pages are mapped again for each tensor."""
    assert 5 * in_a_process(keep=True) < default


def test_what_a_user_has_set_stays(monkeypatch):
    """Variables of glibc's malloc in the driver's environment are not overruled."""
    monkeypatch.delenv("MALLOC_TRIM_THRESHOLD_", raising=False)
    assert environment()["MALLOC_TRIM_THRESHOLD_"] == "500000000"
    monkeypatch.setenv("MALLOC_TRIM_THRESHOLD_", "131072")
    assert "MALLOC_TRIM_THRESHOLD_" not in environment()


def test_rays_workers_are_set_up_so(ray_cluster, default):
    """Training runs in a thread that begins after the worker was set up."""
    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])
    assert 5 * ray.get(ray.remote(faults).remote(keep=False)) < default
