"""What is wrong with the environment, found before `ray.init`, which would look for minutes and not name the cause."""

import os
import re
import socket
import sys
import time

from ssl_ray.cluster.private import cluster_of_this_machine
from ssl_ray.errors import UserError

_SECONDS, _TRY_SECONDS = 10.0, 5.0
"""How long an address is tried, e.g. while a cluster starts, and how long one try may take."""

_HELLO = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes([0, 0, 0, 4, 0, 0, 0, 0, 0])
"""How a client of gRPC begins (RFC 9113, 3.4): a preface, an empty frame of type 4, SETTINGS. So does a server."""

_SOCKET_BYTES = 103 if sys.platform == "darwin" else 107
"""The longest name of a socket in the file system."""


def check_address(named: str) -> None:
    """Look whether a Ray answers at the address that RAY_ADDRESS names; `ray.init` alone takes 11 minutes to give up.

    Raises:
        UserError: within half a minute, for no address or one at which nothing answers as Ray does.
    """
    address = (cluster_of_this_machine() or named) if named == "auto" else named
    found = re.fullmatch(r"(?:ray://)?\[?([^/\s\]]+)\]?:(\d{1,5})", address)
    if not found:
        rule = "no Ray runs on this machine" if named == "auto" else "must be host:port, ray://host:port, auto or local"
        raise UserError(f"RAY_ADDRESS: {rule}, got {named!r}; without it a Ray is started on this machine")
    deadline = time.monotonic() + _SECONDS
    while (reason := _no_answer(found[1], int(found[2]))) and time.monotonic() < deadline:
        time.sleep(0.5)
    if reason:
        raise UserError(
            f"RAY_ADDRESS: no Ray answers at {address} ({reason}); without it a Ray is started on this machine"
        )


def _no_answer(host: str, port: int) -> str | None:
    """Why nothing there speaks gRPC; None where something does."""
    try:
        with socket.create_connection((host, port), _TRY_SECONDS) as link:
            if os.environ.get("RAY_USE_TLS", "0") in ("1", "true"):
                return None
            link.sendall(_HELLO)
            with link.makefile("rb") as answer:
                return None if answer.read(9)[3:4] == _HELLO[-6:-5] else "it is the port of something else"
    except (OSError, OverflowError) as error:
        return str(getattr(error, "strerror", None) or error)


def check_temporary_folder() -> None:
    """Look whether the name of the folder in which Ray will start leaves room for the names of its sockets.

    Raises:
        UserError: with the environment variable, its length and the longest there may be.
    """
    name = next((name for name in ("RAY_TMPDIR", "TMPDIR") if name in os.environ), None)
    below = f"/ray/session_2026-01-01_00-00-00_000000_{os.getpid()}/sockets/plasma_store"
    if name and (length := len(os.fsencode(os.environ[name]))) > (most := _SOCKET_BYTES - len(below)):
        raise UserError(
            f"{name}: has {length} bytes, and Ray's sockets below it leave room for {most}: set RAY_TMPDIR to a folder "
            f"with a shorter name, got {os.environ[name]}"
        )
