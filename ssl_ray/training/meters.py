"""What a running training uses, as metrics under MLflow's prefix `system/`, which its UI shows on a page of its own."""

import logging
import math
import resource
import sys
import time

import torch

from ssl_ray.cluster.private import object_store_statistics
from ssl_ray.training.devices import known_device
from ssl_ray.training.precision import named

PREFIX = "system/"
RATE, WAIT = f"{PREFIX}patches_per_second", f"{PREFIX}data_wait_percentage"
WORKER_MEMORY = f"{PREFIX}worker_memory_peak_megabytes"


def peak_memory(device: torch.device) -> float:
    """The most bytes that this process has had allocated on its GPU, or on a CPU its largest resident set."""
    if device.type == "cuda":
        return float(torch.cuda.max_memory_allocated(device))
    unit = 1 if sys.platform == "darwin" else 1024
    return float(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit)


def device_name(device: torch.device) -> str:
    """The kind of a GPU, as its maker calls it, or `CPU`."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"


def arithmetic_rate(flops: float, workers: int, device: torch.device, dtype: torch.dtype) -> dict[str, float]:
    """FLOP/s of a worker as metrics; also as a share of its GPU's peak (MFU) where that is known.

    `flops` are the FLOP/s of all workers, of the model's own matrix products and convolutions, forward and backward.
    """
    metrics = {f"{PREFIX}teraflops_per_second_per_worker": flops / workers / 1e12}
    found = known_device(torch.cuda.get_device_name(device)) if device.type == "cuda" else None
    if found:
        metrics[f"{PREFIX}mfu_percentage"] = 100 * flops / workers / found.peak(named(dtype))
    return metrics


class ObjectStore:
    """The object store of the cluster that this process is connected to."""

    def __init__(self) -> None:
        self._next = 0.0  # no sample before this time
        self._spilled_before: float | None = None

    def sample(self) -> dict[str, float]:
        """Use of all nodes' object stores together, and what they spilled to disk since the first sample.

        Empty when the last sample is less than ten seconds ago, and for good once Ray gave no answer.
        """
        if time.monotonic() < self._next:
            return {}
        self._next = time.monotonic() + 10
        try:
            found = object_store_statistics()
        except Exception as error:  # whatever a later version of Ray raises, a training must not stop for its metrics
            logging.getLogger(__name__).warning("no figures of the object store: %s", error)
            self._next = math.inf
            return {}
        if self._spilled_before is None:
            self._spilled_before = found["spilled"]
        return {
            f"{PREFIX}object_store_usage_megabytes": found["used"] / 1e6,
            f"{PREFIX}object_store_usage_percentage": 100 * found["used"] / max(found["capacity"], 1),
            f"{PREFIX}object_store_spilled_megabytes": (found["spilled"] - self._spilled_before) / 1e6,
        }
