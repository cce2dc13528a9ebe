"""Joins the Ray cluster that a study runs on: the one that is there, or one started on this machine."""

import logging
import os
import re
import secrets
import signal
import threading
import time
from contextlib import nullcontext, suppress
from pathlib import Path
from typing import Any
from uuid import uuid4

import ray
from ray.exceptions import RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

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


def check_resources(key: str, what: str, count: int, cpus: float, gpus: float) -> None:
    """Refuse a cluster in which `what`, e.g. "2 workers", `count` of so many CPUs and GPUs each, do not find room.

    Ray itself would wait without end. Each needs all of its own on one node.
    """
    there, share = ray.cluster_resources(), {"CPU": cpus, "GPU": gpus}
    for name, needed in share.items():
        if there.get(name, 0.0) < count * needed:
            raise UserError(f"{key}: {what} need {count * needed:g} {name}s, the cluster has {there.get(name, 0.0):g}")
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    fit = [min(node.get(name, 0.0) / needed for name, needed in share.items() if needed) + 1e-9 for node in nodes]
    if (room := sum(map(int, fit))) < count:
        each = " and ".join(f"{needed:g} {name}s" for name, needed in share.items() if needed)
        has = "; ".join(f"{node.get('CPU', 0):g} CPUs, {node.get('GPU', 0):g} GPUs" for node in nodes)
        raise UserError(f"{key}: {what} need {each} on one node, each; there is room for {room} (nodes: {has})")


def check_shared(**folders: Path) -> None:
    """Refuse a local folder, by its key, that on some node is another one: what is written there nobody would find.

    A node that has not answered within a minute is not waited for.
    """
    nodes = {node["NodeID"]: node["NodeManagerAddress"] for node in ray.nodes() if node["Alive"]}
    if len(nodes) < 2:
        return
    marks = {key: folder / f".ssl_ray-{uuid4().hex}" for key, folder in folders.items()}

    def unseen() -> list[str]:
        for _ in range(20):  # a file system on a network may show a new file late
            if not (found := [key for key, mark in marks.items() if not mark.exists()]):
                break
            time.sleep(0.5)
        return found

    try:
        for mark in marks.values():
            mark.touch()
        there = {name: NodeAffinitySchedulingStrategy(name, soft=False) for name in nodes}
        look = ray.remote(num_cpus=0)(unseen)
        asked = {look.options(scheduling_strategy=there[name]).remote(): nodes[name] for name in nodes}
        for answer in ray.wait([*asked], num_returns=len(asked), timeout=60)[0]:
            with suppress(RayError):  # of a node that has died meanwhile
                for key in ray.get(answer):
                    rule = "must be on a disk that all nodes share, or in an object store"
                    raise UserError(f"{key}: {folders[key]} is another folder on the node {asked[answer]}; {rule}")
    finally:
        for mark in marks.values():
            mark.unlink(missing_ok=True)


def tell_if_passing(what: str, path: str | Path) -> None:
    """Warn of a relative path of output in a submitted job, whose working directory is a copy that Ray removes."""
    if "RAY_JOB_CONFIG_JSON_ENV_VAR" in os.environ and not Path(path).is_absolute():
        say(
            f"WARNING: in a submitted job {what} {str(path)!r} lies in Ray's copy of the working directory, which does "
            "not last; give an absolute one, e.g. /shared/output"
        )


def first_error(text: str) -> str | None:
    """The cause in Ray's chain of tracebacks, `ValueError: ...`: its first error that is not one of Ray's wrappers."""
    named = re.search(r"^(?!ray\.)[\w.]*(?:Error|Exception)\b(?!.*ray::).*: .*$", text, re.MULTILINE)
    return named.group().strip() if named else None
