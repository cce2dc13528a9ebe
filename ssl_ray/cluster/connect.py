"""The Ray cluster that a study runs on: the one that is there, or one started on this machine."""

import logging
import os
import re
import signal
import threading
import warnings
from pathlib import Path
from typing import Any

import ray

from ssl_ray.config.schema import Finetune, LocalCluster, Pretrain
from ssl_ray.training import malloc as memory

_LEVELS = {
    # Routine messages; from warnings on they stay audible.
    "ray.data._internal.execution.streaming_executor": logging.WARNING,
    "ray.data._internal.progress": logging.ERROR,
    "ray.train": logging.WARNING,
    "ray.tune": logging.WARNING,
    # Warns at every start that token authentication is on, which it is by default.
    "ray._private.authentication.authentication_token_setup": logging.ERROR,
    # Warns every second that a cluster without a dashboard has no state API, and at the end that it could not stop.
    "ray.train.v2._internal.execution.controller.placement_group_cleaner": logging.ERROR,
    "ray.train.v2._internal.callbacks.placement_group_callback": logging.CRITICAL,
}


def connect(settings: LocalCluster) -> None:
    """Connect to the cluster in RAY_ADDRESS, which `ray job submit` sets, or start one on this machine."""
    os.environ.setdefault("RAY_AIR_NEW_OUTPUT", "0")  # the new one prints a table even when told to be quiet
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    os.environ.setdefault("TUNE_DISABLE_SIGINT_HANDLER", "1")  # else Ctrl-C looks like success
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # patients' data are near: nothing is sent out unasked
    quiet()
    if not ray.is_initialized():
        options: dict[str, Any] = {"log_to_driver": True, "logging_level": logging.WARNING}
        if not os.environ.get("RAY_ADDRESS"):
            options |= {
                "address": "local",
                "num_cpus": settings.cpus,  # None: Ray counts them, and knows of containers
                "object_store_memory": int(settings.object_store_gigabytes * 2**30),
                "include_dashboard": False,
            }
        ray.init(runtime_env=runtime_env(), **options)
    if threading.current_thread() is threading.main_thread():
        # `ray job stop`, as Ctrl-C. After `ray.init`, whose own handler aborts the process.
        signal.signal(signal.SIGTERM, signal.default_int_handler)


def first_error(text: str) -> str | None:
    """What began a remote error, in one line: its text is a chain of tracebacks, of which the first error that is not
    Ray's wrapping is the cause; None where there is none.
    """
    named = re.search(r"^(?!ray\.)[\w.]*(?:Error|Exception)\b(?!.*ray::).*: .*$", text, re.MULTILINE)
    return named.group().strip() if named else None


def runtime_env() -> dict[str, Any]:
    """How Ray's worker processes are to start: with quiet loggers, and keeping the memory that they free."""
    return {"worker_process_setup_hook": quiet, "env_vars": memory.environment()}


def quiet() -> None:
    """Tame Ray's loggers; runs in the driver and at the start of every worker process."""
    for name, level in _LEVELS.items():
        logging.getLogger(name).setLevel(level)
    # Ray Train names this one logger, which prints every report, by its file.
    context = Path(ray.__file__).parent / "train/v2/_internal/execution/context.py"
    logging.getLogger(str(context)).setLevel(logging.WARNING)
    # Batches lie in Ray's object store, read-only, and are copied to where they are used.
    warnings.filterwarnings("ignore", message="The given NumPy array is not writable")


def check_pretraining(config: Pretrain) -> None:
    """Refuse a cluster that cannot hold the training workers.

    Raises:
        ValueError: with what is needed and what there is.
    """
    cpus, gpus = _resources()
    workers = config.worker_range[0]
    needed = workers * config.cpus_per_worker
    if cpus < needed:
        raise ValueError(
            f"pretrain.workers: {workers} workers with {config.cpus_per_worker:g} CPUs each need {needed:g} CPUs, the "
            f"cluster has {cpus:g}"
        )
    if config.gpu and gpus < workers:
        raise ValueError(f"pretrain.gpu: {workers} workers need a GPU each, the cluster has {gpus:g}")


def check_finetuning(config: Finetune) -> None:
    """Refuse a cluster that cannot hold a single trial.

    Raises:
        ValueError: with what is needed and what there is.
    """
    cpus, gpus = _resources()
    if cpus < config.cpus_per_trial:
        raise ValueError(f"finetune.cpus_per_trial: {config.cpus_per_trial:g} asked for, the cluster has {cpus:g}")
    if gpus < config.gpus_per_trial:
        raise ValueError(f"finetune.gpus_per_trial: {config.gpus_per_trial:g} asked for, the cluster has {gpus:g}")


def _resources() -> tuple[float, float]:
    resources = ray.cluster_resources()
    return resources.get("CPU", 0.0), resources.get("GPU", 0.0)
