"""Training state <-> folder, with a digest that is verified on load."""

import hashlib
import json
import logging
import shutil
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any
from uuid import uuid4

import torch

from ssl_ray.storage.files import MANIFEST, UNIQUE, open_file, read_file, remove_stale, settle
from ssl_ray.storage.mirror import Mirror
from ssl_ray.text import shown


def save_state(folder: Path, state: Mapping[str, Any]) -> None:
    """Write tensors, numbers, strings and containers of them to a folder, which appears whole.

    A worker whose driver was killed goes on writing for some seconds, beside the worker that has taken its place. Both
    write the same state, each into a folder of its own that is then renamed.
    """
    scratch = folder.with_name(f".{folder.name}-{uuid4().hex}")
    scratch.mkdir(parents=True)
    try:
        torch.save(dict(state), scratch / "state.pt")
        manifest = {"sha256": _digest(scratch / "state.pt"), "step": state.get("step")}
        (scratch / MANIFEST).write_text(json.dumps(manifest))
        settle(scratch, folder)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def load_state(folder: Path) -> dict[str, Any]:
    """Read what `save_state` wrote; a ValueError where it is torn, was changed, or holds other kinds of things."""
    try:
        manifest = json.loads(read_file(folder / MANIFEST, most=2**16))
        if manifest.get("sha256") != _digest(folder / "state.pt"):
            raise ValueError("state.pt does not match its digest: torn or changed after it was written")
        state = torch.load(folder / "state.pt", map_location="cpu", weights_only=True)
        if not isinstance(state, dict):
            raise TypeError(f"state.pt must hold a dict, got {type(state).__name__}")
    except Exception as error:  # whatever a torn file makes of JSON, of torch's format and of what they hold
        raise ValueError(f"{folder}: checkpoint cannot be loaded: {shown(error)}") from error
    return state


def save_latest(folder: Path, state: Mapping[str, Any], mirror: Mirror, keep: int = 2) -> None:
    """Write a checkpoint to `<folder>/<step>` and remove old ones: the newest `keep` whole ones up to this one stay.

    After an OSError the ones before are still there.
    """
    path = folder / f"{state['step']:08d}"
    save_state(path, state)
    mirror.push(path)
    names = {old.name for old in folder.iterdir()} | mirror.names(folder)
    until = sorted((name for name in names if name.isdecimal() and int(name) <= state["step"]), key=int)
    whole = [name for name in until if mirror.kept(folder / name / MANIFEST).list()]
    for name in set(until) - set(whole[-keep:]):
        mirror.drop(folder / name)
    remove_stale(folder, rf"\..+{UNIQUE}(\.part)?", seconds=3600)


def saved_steps(folder: Path, mirror: Mirror) -> dict[int, Path]:
    """The checkpoints in a folder by step, ascending, whole or not."""
    return dict(sorted((int(name), folder / name) for name in mirror.names(folder) if name.isdecimal()))


def load_latest(folder: Path, key: str, mirror: Mirror) -> dict[str, Any] | None:
    """The newest checkpoint of `save_latest` that is whole and has the key, or None."""
    for path in reversed(saved_steps(folder, mirror).values()):
        mirror.pull(path)
        try:
            state = load_state(path)
            if state.get("key") != key:
                raise ValueError(f"{path}: belongs to another configuration ({state.get('key')}, not {key})")
            return state
        except ValueError as error:
            logging.getLogger(__name__).warning("%s; trying the one before", error)
    return None


def snapshot(value: Any) -> Any:
    """A copy of nested containers on the CPU that later training steps do not change."""
    if isinstance(value, torch.Tensor):
        return value.detach().to("cpu", copy=True)
    if isinstance(value, Mapping):
        return {key: snapshot(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(snapshot(item) for item in value)
    return value


class Saver:
    """Writes checkpoints in a thread of its own, one at a time and in order."""

    def __init__(self, folder: Path, mirror: Mirror, keep: int, first: Path) -> None:
        """`first` is a file that has to be in the mirror before each checkpoint; the rest as for `save_latest`."""
        self._folder, self._mirror, self._keep, self._first = folder, mirror, keep, first
        self._pool = ThreadPoolExecutor(1)
        self._pending: Future[None] | None = None

    def save(self, state: Mapping[str, Any]) -> None:
        """Begin to write a copy of `state`, once the checkpoint before is written; raises that one's OSError."""
        self.wait()
        self._pending = self._pool.submit(self._write, snapshot(state))

    def _write(self, state: Mapping[str, Any]) -> None:
        self._mirror.push(self._first)
        save_latest(self._folder, state, self._mirror, self._keep)

    def wait(self) -> None:
        """Return when the last checkpoint is written; raises its OSError."""
        if self._pending:
            self._pending.result()


def _digest(file: Path) -> str:
    with open_file(file) as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
