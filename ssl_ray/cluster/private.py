"""Names of Ray with `_private` or `_internal` in them, and paths in it, which Ray does not promise to keep.

Each entry says what happens when a version of Ray no longer has it.
"""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partialmethod
from pathlib import Path
from typing import Any

import ray

LOG_LEVELS = {
    # Routine messages; warnings and errors are still shown.
    "ray.data._internal.execution.streaming_executor": logging.WARNING,
    "ray.data._internal.progress": logging.ERROR,
    "ray.train": logging.WARNING,
    "ray.tune": logging.WARNING,
    # This module names its logger by its file, and prints every report.
    str(Path(ray.__file__).parent / "train/v2/_internal/execution/context.py"): logging.WARNING,
    # Warns at every start that token authentication is on, which it is by default.
    "ray._private.authentication.authentication_token_setup": logging.ERROR,
    # Warns every second that a cluster without a dashboard has no state API, and at the end that it could not stop.
    "ray.train.v2._internal.execution.controller.placement_group_cleaner": logging.ERROR,
    "ray.train.v2._internal.callbacks.placement_group_callback": logging.CRITICAL,
}
"""Least level that is printed, by name of the logger. Where Ray renames one, its messages are printed again."""

_HARMLESS = "'PreemptionWatcher' "
"""In a line of Ray Train's controller, once a training: its watcher of nodes could not be started again if the handles
of the workers were lost, with which it would have nothing to watch (ray#53727)."""


def leave_out_harmless_lines() -> None:
    """Have this driver print all that workers print but for that line, which is written by C++, past any logger.

    Call it before `ray.init`, whose own handler prints what is left. Where the name is gone, the line is printed again.
    """
    try:
        from ray._private.ray_logging import global_worker_stdstream_dispatcher as printed
    except ImportError:
        return

    def leave_out(batch: dict[str, Any]) -> None:
        batch["lines"] = [line for line in batch["lines"] if not (_HARMLESS in line and "max_restarts > 0" in line)]

    printed.remove_handler(__name__)
    printed.add_handler(__name__, leave_out)


def leave_out_actors(trainer: Any) -> None:
    """Have a TorchTrainer start no actor that does nothing: each costs one and a half seconds of a core.

    One hands out the datasets that a trainer is given, and ours are opened by the workers. Another one looks up in the
    dashboard's list of actors whether it has to clean up after Ray Train's controller, and cannot without a dashboard.
    Where a name is gone, they start again.
    """
    from ray._private import worker

    node = getattr(worker, "_global_node", None)  # None for a client of another machine's Ray
    spare = ["DatasetsCallback"]
    if node and not getattr(node, "webui_url", True):
        spare.append("PlacementGroupCleanerCallback")
    if made := getattr(trainer, "_create_default_callbacks", None):
        trainer._create_default_callbacks = lambda: [one for one in made() if type(one).__name__ not in spare]


@contextmanager
def for_this_machine_alone() -> Iterator[None]:
    """Within, a Ray that is started listens on loopback alone, and its dashboard's agent on any port that is free.

    By itself it does the first on macOS and Windows, and on Linux listens on all of the machine's addresses: its nodes
    know each other by one of them, which a laptop changes while it trains. The agent's port is the same for all: where
    another Ray has it, this one tries for four seconds before it goes on without. Where ENABLE_RAY_CLUSTER is gone, Ray
    listens as by itself; where RayParams is, this raises AttributeError, and `ray.init` TypeError for its parameter.
    """
    from ray._private import parameter, ray_constants

    reachable, made = getattr(ray_constants, "ENABLE_RAY_CLUSTER", True), parameter.RayParams.__init__
    ray_constants.ENABLE_RAY_CLUSTER = False
    parameter.RayParams.__init__ = partialmethod(made, dashboard_agent_listen_port=0)
    try:
        yield
    finally:
        ray_constants.ENABLE_RAY_CLUSTER = reachable
        parameter.RayParams.__init__ = made


def cluster_of_this_machine() -> str | None:
    """`host:port` of the cluster that RAY_ADDRESS=auto means, or None.

    Where the name is gone, this raises ImportError or AttributeError: say `host:port` instead of `auto`.
    """
    from ray._private import services

    try:
        return str(services.canonicalize_bootstrap_address("auto"))
    except ConnectionError:
        return None


def answers(address: str, seconds: float) -> bool:
    """Whether a server of gRPC, as Ray is one, answers at `host:port` within so many seconds.

    Where the name is gone, this raises ImportError.
    """
    import grpc
    from ray._private.grpc_utils import init_grpc_channel  # with TLS where RAY_USE_TLS says so

    with init_grpc_channel(address, [("grpc.enable_http_proxy", 0)]) as channel:
        try:
            grpc.channel_ready_future(channel).result(seconds)
        except grpc.FutureTimeoutError:
            return False
    return True
