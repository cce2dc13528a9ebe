"""Broken and hostile training states: refused in one line, or loaded right; no pickled code is run."""

import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hostile import Attack, Build, Probe, Rows, check

from ssl_ray.training.checkpoint import save_state

ROWS = Rows("state", "")


def state(spoil: Callable[[Path], object], content: dict[str, Any] | None = None) -> Build:
    def build(path: Path) -> None:
        save_state(path, content or {"step": 3, "model": {"weight": torch.ones(4)}})
        spoil(path)

    return build


def manifest(text: str | bytes) -> Build:
    content = text.encode() if isinstance(text, str) else text
    return state(lambda path: (path / "manifest.json").write_bytes(content))


def resealed(content: Any) -> Build:
    """Another content, whose digest in the manifest is right."""

    def spoil(path: Path) -> None:
        torch.save(content, path / "state.pt")
        save_digest(path)

    return state(spoil)


def save_digest(path: Path) -> None:
    found = hashlib.sha256((path / "state.pt").read_bytes()).hexdigest()
    (path / "manifest.json").write_text(json.dumps({"sha256": found, "step": 3}))


def replaced(name: str, make: Callable[[Path], object]) -> Build:
    def spoil(path: Path) -> None:
        (path / name).unlink()
        make(path / name)

    return state(spoil)


for name, build, rule in (
    ("whole", state(lambda path: None), {"names": ["model", "step"]}),
    ("digest wrong", manifest('{"sha256": "00", "step": 3}'), "does not match its digest"),
    ("digest missing", manifest('{"step": 3}'), "does not match its digest"),
    ("digest a number", manifest('{"sha256": 5}'), ""), ("digest a list", manifest('{"sha256": [[]]}'), ""),
    ("manifest missing", state(lambda path: (path / "manifest.json").unlink()), ""),
    ("manifest empty", manifest(""), ""), ("manifest no JSON", manifest("{"), ""),
    ("manifest a list", manifest("[]"), ""), ("manifest a number", manifest("5"), ""),
    ("manifest null", manifest("null"), ""), ("manifest text", manifest('"sha256"'), ""),
    ("manifest no UTF-8", manifest(b"\xff\xfe{"), ""), ("manifest deep", manifest("[" * 10**5), ""),
    ("manifest of 5,000 digits", manifest('{"sha256": ' + "9" * 5000 + "}"), ""),
    ("manifest a FIFO", replaced("manifest.json", os.mkfifo), ""),
    ("manifest a folder", replaced("manifest.json", os.mkdir), ""),
    ("state missing", state(lambda path: (path / "state.pt").unlink()), ""),
    ("state a FIFO", replaced("state.pt", os.mkfifo), ""),
    ("state a folder", replaced("state.pt", os.mkdir), ""),
    ("state without end", replaced("state.pt", lambda path: path.symlink_to("/dev/zero")), ""),
    ("state cut", state(lambda path: os.truncate(path / "state.pt", 300)), "does not match its digest"),
    ("state is pickled code", resealed({"step": Attack("owned")}), "cannot be loaded"),
    ("state is a list", resealed([1, 2]), ""), ("state is a number", resealed(5), ""),
    ("state is a file", lambda path: b"checkpoint", ""), ("state is nowhere", lambda path: None, ""),
):  # fmt: skip
    ROWS.add(name, build, rule)


@pytest.mark.parametrize("name", ROWS)
def test_hostile_state_is_refused_or_right(name: str, probe: Probe, tmp_path: Path) -> None:
    """One line that names folder and rule, or the state; no code is run."""
    check(ROWS[name], probe, tmp_path)
