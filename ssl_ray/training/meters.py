"""What a running training uses, as metrics under MLflow's prefix `system/`, which its UI shows on a page of its own."""

import resource
import sys

import torch

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
