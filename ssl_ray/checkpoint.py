"""Training state <-> directory, with a digest that is verified on load."""

import hashlib
import json
import logging
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch


def save_state(folder: Path, state: Mapping[str, Any]) -> None:
    """Write `state` (tensors, numbers, strings and containers of them) to a directory.

    The manifest with the digest is written last and atomically: a directory without it is not a checkpoint.
    """
    folder.mkdir(parents=True, exist_ok=True)
    torch.save(dict(state), folder / "state.pt")
    manifest = folder / "manifest.json.tmp"
    manifest.write_text(json.dumps({"sha256": _digest(folder / "state.pt"), "step": state.get("step")}))
    os.replace(manifest, folder / "manifest.json")


def load_state(folder: Path) -> dict[str, Any]:
    """Read what `save_state` wrote.

    Raises:
        ValueError: when the checkpoint is torn, was changed, or holds anything but tensors and plain values.
    """
    try:
        manifest = json.loads((folder / "manifest.json").read_text())
        found = _digest(folder / "state.pt")
    except (OSError, ValueError) as error:
        raise ValueError(f"{folder}: not a whole checkpoint: {error}") from error
    if found != manifest.get("sha256"):
        raise ValueError(f"{folder}: state.pt does not match its digest: torn or changed after it was written")
    try:
        state: dict[str, Any] = torch.load(folder / "state.pt", map_location="cpu", weights_only=True)
    except Exception as error:
        raise ValueError(f"{folder}: state.pt cannot be loaded: {str(error).splitlines()[0]}") from error
    return state


def save_latest(folder: Path, state: Mapping[str, Any]) -> None:
    """`save_state` into `<folder>/<step>`; the checkpoint before it stays as a fallback, older ones go."""
    save_state(folder / f"{state['step']:08d}", state)
    for old in sorted(folder.iterdir())[:-2]:
        shutil.rmtree(old)


def load_latest(folder: Path) -> dict[str, Any] | None:
    """The newest whole checkpoint that `save_latest` left in a folder, or None."""
    for path in sorted(folder.iterdir(), reverse=True) if folder.is_dir() else []:
        try:
            return load_state(path)
        except ValueError as error:
            logging.getLogger(__name__).warning("%s; trying the one before", error)
    return None


def digest(*parts: Any) -> str:
    """Short digest of JSON-able values: names what a run depends on."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()[:16]


def _digest(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
