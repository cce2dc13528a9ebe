"""MLflow's own server, on loopback, for as long as somebody looks."""

import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
import webbrowser
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from ssl_ray.console import say
from ssl_ray.errors import UserError
from ssl_ray.text import shown, without_password
from ssl_ray.tracking.tracker import Tracker

_SECONDS = 90
"""In which the server has to answer; making the tables of a new version takes a while."""
PORT = 5000


def look(tracker: Tracker, artifacts: Path, port: int | None, browser: bool) -> None:
    """Print where the tracker's trials are compared, and open it; where there is no server, be one until Ctrl-C."""

    def show(server: str) -> None:
        say(f"MLflow:  {tracker.link(server)}")
        if browser:
            webbrowser.open(tracker.link(server))

    if tracker.uri.startswith("http"):
        show(without_password(tracker.uri))
        return
    with suppress(KeyboardInterrupt), serving(tracker.uri, artifacts, port) as (server, process):
        show(server)
        say("Ctrl-C ends it. It has no password: whoever can log in to this machine can use it, too")
        process.wait()
        raise UserError(f"MLflow's server at {server} has ended")


@contextmanager
def serving(uri: str, artifacts: Path, port: int | None = None) -> Iterator[tuple[str, "subprocess.Popen[bytes]"]]:
    """MLflow's server over a database of runs -> its address, once it answers, and its process; it ends with the block.

    `port`: by default 5000, or any other where that is taken.

    Raises:
        UserError: where the port is taken, or the server ends at once, with its last line.
    """
    port = _free(port)
    command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port), "--workers", "1"]
    command += ["--artifacts-destination", str(artifacts)]
    # The URI may have a password, and everybody on the machine can read a command line.
    environment = {**os.environ, "MLFLOW_BACKEND_STORE_URI": uri}
    # Without the processes in which MLflow's server would run jobs of its own.
    environment["MLFLOW_SERVER_ENABLE_JOB_EXECUTION"] = "false"
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True, env=environment)
        try:
            server = f"http://127.0.0.1:{port}"
            deadline = time.monotonic() + _SECONDS
            while not _answers(server):
                if process.poll() is not None or time.monotonic() > deadline:
                    log.seek(0)
                    lines = log.read().decode(errors="replace").split("\n")
                    last = next((line for line in reversed(lines) if line.strip()), "")
                    raise UserError(f"MLflow's server does not answer at {server}: {shown(last)}")
                time.sleep(0.2)
            yield server, process
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGTERM)
            process.wait()


def _free(port: int | None) -> int:
    """A port on loopback that nobody listens on: this one, or without one 5000 or any other."""
    for one in (port,) if port else (PORT, 0):
        with suppress(OSError), socket.create_server(("127.0.0.1", one)) as found:
            return int(found.getsockname()[1])
    raise UserError(f"--port: {port} is taken")


def _answers(server: str) -> bool:
    with suppress(OSError), urllib.request.urlopen(f"{server}/health", timeout=5) as answer:
        return bool(answer.status == 200)
    return False
