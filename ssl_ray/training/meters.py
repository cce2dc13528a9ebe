"""What a running training uses, under the names of MLflow's system metrics: `system/...` has a tab of its own there.

What a worker or a trial uses is sampled where a step is logged, in microseconds. The object store is asked for by the
driver, in the thread that writes to MLflow, every ten seconds at most.
"""

import logging
import resource
import sys
import time
from collections.abc import Mapping

import torch

from ssl_ray.console import say
from ssl_ray.networks.flops import known_device

PREFIX = "system/"
WORKER_MEMORY = f"{PREFIX}worker_memory_peak_megabytes"
_SAMPLE_SECONDS, _SILENT_SECONDS = 10.0, 60.0
_REPLY_SECONDS = 5.0


def peak_memory(device: torch.device) -> float:
    """Bytes: the most that this process has had allocated on its GPU, or on a CPU its largest resident set."""
    if device.type == "cuda":
        return float(torch.cuda.max_memory_allocated(device))
    unit = 1 if sys.platform == "darwin" else 1024
    return float(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit)


def arithmetic_rate(flops: float, workers: int, device: torch.device, dtype: torch.dtype) -> dict[str, float]:
    """FLOP/s as metrics: per worker, and as the share of its GPU's peak (MFU) where that is known.

    Args:
        flops: a second, over all workers, of the model's own matrix products and convolutions, forward and backward.
        workers: how many, each with a device of the same kind.
        device: of one of them.
        dtype: that it computes in.
    """
    metrics = {f"{PREFIX}teraflops_per_second_per_worker": flops / workers / 1e12}
    found = known_device(torch.cuda.get_device_name(device)) if device.type == "cuda" else None
    if found:
        metrics[f"{PREFIX}mfu_percentage"] = 100 * flops / workers / found.peak(str(dtype).removeprefix("torch."))
    return metrics


def as_system(metrics: Mapping[str, float]) -> dict[str, float]:
    """What of a record of the training belongs beside the system metrics as well: its rate, and its wait for data."""
    return {
        f"{PREFIX}patches_per_second": metrics["patches_per_second"],
        f"{PREFIX}data_wait_percentage": 100 * metrics["data_wait_share"],
    }


class ObjectStore:
    """The object store of the cluster that this process is connected to."""

    def __init__(self) -> None:
        self._next = 0.0
        self._before: float | None = None
        self._told, self._silent = False, False

    def sample(self) -> dict[str, float]:
        """Use of all nodes' object stores, and what was spilled from them to disk since the first sample.

        Empty when the last sample is less than ten seconds ago, and for a minute after Ray gave no answer. Spilling is
        said once, with the setting to change.
        """
        if time.monotonic() < self._next:
            return {}
        self._next = time.monotonic() + _SAMPLE_SECONDS
        try:
            stats = _stats()
        except Exception as error:  # a part of Ray that may change; to do without it is better than to stop a training
            if not self._silent:
                logging.getLogger(__name__).warning("no figures of the object store: %s", error)
            self._silent, self._next = True, time.monotonic() + _SILENT_SECONDS
            return {}
        used, capacity, spilled = stats["used"], stats["capacity"], stats["spilled"]
        if self._before is None:
            self._before = spilled
        spilled -= self._before
        if spilled > 0 and not self._told:
            self._told = True
            say(
                f"WARNING: Ray's object store ({capacity / 1e9:.3g} GB) is too small and spills to disk, which slows "
                "the feed: raise cluster.object_store_gigabytes (on a cluster that is there already, `ray start "
                "--object-store-memory`), or lower pretrain.block_megabytes"
            )
        return {
            f"{PREFIX}object_store_usage_megabytes": used / 1e6,
            f"{PREFIX}object_store_usage_percentage": 100 * used / capacity if capacity else 0.0,
            f"{PREFIX}object_store_spilled_megabytes": spilled / 1e6,
        }


def _stats() -> Mapping[str, float]:
    """Bytes used, there, and spilled since the cluster started. What `ray memory --stats-only` prints."""
    from ray._private import internal_api
    from ray._private.state import state

    found = internal_api.get_memory_info_reply(state, timeout_seconds=_REPLY_SECONDS).store_stats
    return {
        "used": float(found.object_store_bytes_used),
        "capacity": float(found.object_store_bytes_avail),
        "spilled": float(found.spilled_bytes_total),
    }
