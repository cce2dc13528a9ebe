"""Joins the Ray cluster that a study runs on: the one that is there, or one started on this machine."""

import logging
import os
import re
import secrets
import signal
import threading
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import ray

from ssl_ray.cluster.private import (
    answers,
    cluster_of_this_machine,
    for_this_machine_alone,
    leave_out_harmless_lines,
)
from ssl_ray.cluster.worker import quiet, runtime_env
from ssl_ray.config.schema import LocalCluster
from ssl_ray.console import say
from ssl_ray.errors import UserError
from ssl_ray.storage.object_store import default_scratch
from ssl_ray.text import count_of

_SECONDS = 10.0
"""How long an address is tried, e.g. while a cluster starts."""
_SOCKET, _LONGEST_SOCKET = "/ray/session_2026-01-31_12-00-00_123456_4194304/sockets/plasma_store", 103
"""A socket of Ray's in a folder, and the bytes that the path of one may have on every system."""


def connect(settings: LocalCluster) -> None:
    """Connect to the cluster in RAY_ADDRESS, which `ray job submit` sets, or start one on this machine.

    A UserError names the environment variable where no Ray answers at that address, or where none starts, e.g. in a
    folder whose name is too long for its sockets.
    """
    os.environ.setdefault("RAY_AIR_NEW_OUTPUT", "0")  # Ray's new progress output prints a table even with verbose=0
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    os.environ.setdefault("TUNE_DISABLE_SIGINT_HANDLER", "1")  # with Tune's handler `fit` returns after Ctrl-C
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # next to patients' data nothing is sent out unasked
    quiet()
    leave_out_harmless_lines()
    if not ray.is_initialized():
        options: dict[str, Any] = {"log_to_driver": True, "logging_level": logging.WARNING}
        named = os.environ.get("RAY_ADDRESS") or "local"
        if named != "local":
            check_address(named)
        else:
            say("starting Ray on this machine")
            # Processes that Ray starts ahead do not have the environment that ours ask for, and nobody gets them.
            os.environ.setdefault("RAY_prestart_worker_first_driver", "0")
            os.environ.setdefault("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "0")  # this machine is nobody's to take back
            _lead_to_this_package()
            options |= {
                "address": "local",
                "num_cpus": settings.cpus,  # None: Ray counts them, and respects a container's limit
                "object_store_memory": int(settings.object_store_gigabytes * 2**30),
                "include_dashboard": False,
            }
        try:
            if named == "local":
                _keep_from_other_users()
            with for_this_machine_alone() if named == "local" else nullcontext():
                ray.init(runtime_env=runtime_env(), **options)
        except OSError as error:
            raise UserError(f"Ray neither starts nor is joined: {error} (see RAY_ADDRESS, RAY_TMPDIR)") from error
    if threading.current_thread() is threading.main_thread():
        # `ray job stop` sends SIGTERM, which is to end the study as Ctrl-C does. This comes after `ray.init`, because
        # Ray's own handler aborts the process.
        signal.signal(signal.SIGTERM, signal.default_int_handler)


def _keep_from_other_users() -> None:
    """Have nobody else on this machine look into the Ray that is started from now on, or run anything in it.

    By itself, Ray writes its token, and voxels that do not fit into its memory, into files that everybody can read, in
    a folder that everybody can change. Processes inherit this one's token, which no file has.
    """
    if "RAY_AUTH_TOKEN_PATH" not in os.environ:
        os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))
    folder = default_scratch()
    if "RAY_TMPDIR" not in os.environ and len(os.fsencode(f"{folder}{_SOCKET}")) <= _LONGEST_SOCKET:
        os.environ["RAY_TMPDIR"] = str(folder)


def _lead_to_this_package() -> None:
    """Have processes that are started from now on import this checkout of `ssl_ray`, where another one is installed.

    A worker of Ray imports `set_up_worker` before it has the driver's paths.
    """
    root = Path(__file__).parents[2]
    if root.name not in ("site-packages", "dist-packages"):  # every interpreter finds those, after its own library
        paths = [str(root), *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))]
        os.environ["PYTHONPATH"] = os.pathsep.join(dict.fromkeys(paths))


def check_address(named: str) -> None:
    """A UserError unless Ray answers at what RAY_ADDRESS names; `ray.init` alone takes 11 minutes to give up."""
    if named.startswith("ray://"):
        rule = "Ray's client drives no training; submit a job with `ray job submit`, or say host:port on a node"
        raise UserError(f"RAY_ADDRESS: {named!r}: {rule}")
    address = (cluster_of_this_machine() or named) if named == "auto" else named
    found = re.fullmatch(r"([^/\s]+:\d{1,5})", address)
    if not found or not answers(found[1], _SECONDS):
        raise UserError(
            f"RAY_ADDRESS: no Ray answers at {address!r}; must be host:port, auto or local (without it a Ray is "
            "started on this machine)"
        )


def hardware() -> str:
    """What the cluster has, e.g. `2 nodes, 32 CPUs, 2 GPUs (H100), 240 GB`."""
    found = ray.cluster_resources()
    nodes = sum(node["Alive"] for node in ray.nodes())
    kinds = ", ".join(key.partition(":")[2] for key in found if key.startswith("accelerator_type:"))
    gpus = f"{found['GPU']:g} GPUs ({kinds}), " if "GPU" in found else ""
    return f"{count_of(nodes, 'node')}, {found.get('CPU', 0):g} CPUs, {gpus}{found.get('memory', 0) / 1e9:.0f} GB"


def check_resources(key: str, what: str, cpus: float, gpus: float) -> None:
    """Refuse a cluster that is too small for `what`, e.g. "2 workers", where Ray itself would wait without end."""
    there = ray.cluster_resources()
    for name, needed in (("CPU", cpus), ("GPU", gpus)):
        if there.get(name, 0.0) < needed:
            raise UserError(f"{key}: {what} need {needed:g} {name}s, the cluster has {there.get(name, 0.0):g}")


def first_error(text: str) -> str | None:
    """The cause in Ray's chain of tracebacks, `ValueError: ...`: its first error that is not one of Ray's wrappers."""
    named = re.search(r"^(?!ray\.)[\w.]*(?:Error|Exception)\b(?!.*ray::).*: .*$", text, re.MULTILINE)
    return named.group().strip() if named else None
