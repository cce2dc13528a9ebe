"""One process at a time on one study."""

import fcntl
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager

from ssl_ray.errors import UserError
from ssl_ray.storage.folders import Folders


@contextmanager
def only_one(folders: Folders) -> Iterator[None]:
    """Keep a second process on this machine, or on this shared disk, off the study.

    Raises:
        UserError: when another process is working on it, with its host and number.
    """
    path = folders.study.parent / f".{folders.name}.lock"
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # released by the system even if the process is killed
        except BlockingIOError as error:
            file.seek(0)
            raise UserError(f"{folders.study}: another process works on this study: {file.read().strip()}") from error
        file.truncate(0)
        file.write(f"{socket.gethostname()}, process {os.getpid()}")
        file.flush()
        yield
