"""What tests of tracking see from outside: a real MLflow server, a connection that breaks, words for the user."""

import contextlib
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import urllib.request
from pathlib import Path

import pytest
import runs


class Said:
    """What the user was told so far."""

    def __init__(self, capsys: pytest.CaptureFixture[str]) -> None:
        self._capsys, self._text = capsys, ""

    def count(self, text: str) -> int:
        self._text += self._capsys.readouterr().out
        return self._text.count(text)


class Server:
    """A real `mlflow server` with SQLite on loopback, to be killed and started again."""

    def __init__(self, folder: Path) -> None:
        with socket.create_server(("127.0.0.1", 0)) as free:
            self.port = free.getsockname()[1]
        self.uri, self._folder = f"http://127.0.0.1:{self.port}", folder
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(self.port)]
        command += ["--workers", "1", "--backend-store-uri", f"sqlite:///{self._folder / 'mlflow.db'}"]
        command += ["--artifacts-destination", str(self._folder / "artifacts")]
        log = (self._folder / "server.log").open("ab")
        # Without the eight processes in which MLflow's server would run jobs of its own.
        quick = {**os.environ, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
        self._process = subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True, env=quick)
        runs.wait_for(self.answers, "mlflow server", 120)

    def answers(self) -> bool:
        with contextlib.suppress(OSError):
            return bool(urllib.request.urlopen(f"{self.uri}/health", timeout=5).status == 200)
        return False

    def freeze(self) -> None:
        """Connections are accepted, and nobody answers."""
        assert self._process
        os.killpg(self._process.pid, signal.SIGSTOP)

    def kill(self) -> None:
        assert self._process
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()


class Proxy:
    """Forwards to a server; the answers to the next requests of a kind are kept back and the connection is cut."""

    def __init__(self, port: int) -> None:
        self._target, self._listener = port, socket.create_server(("127.0.0.1", 0))
        self.uri = f"http://127.0.0.1:{self._listener.getsockname()[1]}"
        self.cut, self.times, self.done = re.compile(rb"(?!)"), 0, 0
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        while True:
            client, _ = self._listener.accept()
            server = socket.create_connection(("127.0.0.1", self._target))
            request = [b""]
            for forward in (self._requests, self._answers):
                threading.Thread(target=forward, args=(client, server, request), daemon=True).start()

    def _requests(self, client: socket.socket, server: socket.socket, request: list[bytes]) -> None:
        with contextlib.suppress(OSError):
            while data := client.recv(1 << 16):
                if line := re.match(rb"(?:GET|POST|PUT|PATCH) \S+", data):
                    request[0] = line.group()
                server.sendall(data)
        _close(server, client)

    def _answers(self, client: socket.socket, server: socket.socket, request: list[bytes]) -> None:
        with contextlib.suppress(OSError):
            while data := server.recv(1 << 16):
                if self.times and self.cut.search(request[0]):
                    self.times -= 1
                    self.done += 1
                    break
                client.sendall(data)
        _close(server, client)


def _close(*sockets: socket.socket) -> None:
    for one in sockets:
        with contextlib.suppress(OSError):
            one.shutdown(socket.SHUT_RDWR)
        one.close()
