"""How a process of Ray begins: loggers that say what matters, and memory that stays. Every one of them imports this.

And how often a piece of work was begun in any of them, as Ray Data tries one that kills its process for ever.
"""

import logging
import os
import sys
import warnings
from collections import Counter
from ipaddress import ip_address
from typing import Any

import ray
from ray.exceptions import RayError

from ssl_ray.cluster import malloc
from ssl_ray.cluster.private import LOG_LEVELS

_DRIVER_ONLY = ("ignite", "matplotlib.pyplot", "mlflow", "scipy.signal", "sklearn", "tensorboardX")
"""What MONAI loads where it is installed, though no worker uses it: 2 of the 3.5 s of its import, and 0.2 s more for
ignite, which comes with the extra `export`."""


def runtime_env() -> dict[str, Any]:
    """Ray's `runtime_env` for all worker processes: quiet loggers, and a malloc that keeps the memory it frees."""
    return {"worker_process_setup_hook": set_up_worker, "env_vars": malloc.environment()}


def set_up_worker() -> None:
    """Runs at the start of every worker process, once it is connected."""
    quiet()
    for name in _DRIVER_ONLY:
        sys.modules.setdefault(name, None)  # type: ignore[arg-type]  # importing it raises ModuleNotFoundError
    # Actors of Ray's own, such as Ray Train's cleaner of placement groups, look for their cluster on the machine. Where
    # there is another one, they end with a long traceback, or take a training for dead of which that knows nothing.
    os.environ["RAY_ADDRESS"] = ray.get_runtime_context().gcs_address
    if network := _interface_of(ray.util.get_node_ip_address()):
        os.environ.setdefault("GLOO_SOCKET_IFNAME", network)


def _interface_of(address: str) -> str | None:
    """The network interface that has a node's address; None for loopback, and where none has it.

    By itself gloo tells other workers the address of this machine's name, which on Debian and Ubuntu is 127.0.1.1.
    """
    if ip_address(address).is_loopback:
        return None
    import psutil  # Ray brings it

    found = psutil.net_if_addrs().items()
    return next((name for name, known in found if address in {one.address.partition("%")[0] for one in known}), None)


def quiet() -> None:
    """Silence the routine messages of Ray's loggers, in the driver and in every worker process."""
    for name, level in LOG_LEVELS.items():
        logging.getLogger(name).setLevel(level)
    # Batches lie in Ray's object store, which is read-only: they are copied before anything writes.
    warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
    # Of weights with dimensions of one element, whose strides may be anything: torch's DDP compares them all the same.
    warnings.filterwarnings("ignore", message="Grad strides do not match bucket view strides")


class Tries:
    """How often each piece of work was begun, by its name; an actor, which `count_tries` starts."""

    def __init__(self) -> None:
        self._begun = Counter[str]()

    def begin(self, name: str) -> int:
        """It is begun now -> how often it was, this time included."""
        self._begun[name] += 1
        return self._begun[name]


def count_tries() -> Any:
    """A handle of `Tries`, for `begun` in other processes; `ray.kill` it in the end."""
    # Where its machine is lost, it counts from zero again.
    return ray.remote(num_cpus=0, max_restarts=-1, max_task_retries=-1)(Tries).remote()


def begun(tries: Any, name: str) -> int:
    """In any process: the work of this name is begun now -> how often it was, 1 where the count is lost."""
    try:
        return int(ray.get(tries.begin.remote(name)))
    except RayError:
        return 1
