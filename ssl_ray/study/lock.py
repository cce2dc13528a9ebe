"""At a time, one process works on a study: this file keeps a second one off, and tells which it is."""

import fcntl
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from ssl_ray.console import say
from ssl_ray.errors import UserError
from ssl_ray.storage.folders import Folders


@contextmanager
def only_one(folders: Folders) -> Iterator[None]:
    """Keep a second process on this machine, or on this shared disk, off the study.

    Raises:
        UserError: when another process is working on it, with its host and number, or nothing can be written there.
    """
    path = _lock(folders)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        lock = open(path, "a+", opener=_no_link)  # noqa: SIM115
    except OSError as error:
        raise UserError(f"output: {error.filename}: {error.strerror}") from error
    with lock as file:
        for last in (False, True):
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # released by the system even if the process is killed
                break
            except BlockingIOError as error:
                if last:
                    file.seek(0)
                    who = file.read().strip()
                    raise UserError(f"{folders.study}: another process works on this study: {who}") from error
                time.sleep(0.2)  # `holder` may have looked just now
            except OSError as error:  # e.g. Lustre that was mounted without `flock`
                say(
                    f"WARNING: {path}: cannot be locked here ({error.strerror}): nothing keeps a second process off "
                    "this study, so start none"
                )
                break
        file.truncate(0)
        file.write(f"{socket.gethostname()}, process {os.getpid()}")
        file.flush()
        yield


def holder(folders: Folders) -> tuple[str, float] | None:
    """Which process works on the study, as host and number, and since when (seconds since 1970); None: none does."""
    with suppress(FileNotFoundError), open(_lock(folders), opener=_no_link) as file:
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return file.read().strip(), os.fstat(file.fileno()).st_mtime
        except OSError:  # nothing can be locked here
            return None
    return None


def _no_link(path: str, flags: int) -> int:
    """Open the lock, and no file of this process's user that somebody's link of its name leads to."""
    return os.open(path, flags | os.O_NOFOLLOW | os.O_NONBLOCK, 0o666)


def _lock(folders: Folders) -> Path:
    return folders.study.parent / f".{folders.name}.lock"
