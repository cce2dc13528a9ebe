"""Training state comes back as it was, or not at all."""

import os
from pathlib import Path
from typing import Any

import pytest
import torch

from ssl_ray.config.depends import digest
from ssl_ray.storage.mirror import Mirror
from ssl_ray.training.checkpoint import load_latest, load_state, save_latest, save_state


def state(step: int = 3) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(step)
    return {"step": step, "model": {"weight": torch.randn(4, 5, generator=generator)}, "best": 0.25, "key": "k"}


def latest(folder: Path) -> Any:
    return load_latest(folder, "k", Mirror(folder))


def test_what_is_saved_comes_back(tmp_path: Path) -> None:
    """Tensors bit by bit, numbers and strings as they are."""
    save_state(tmp_path / "one", state())
    found = load_state(tmp_path / "one")
    assert torch.equal(found["model"]["weight"], state()["model"]["weight"])
    assert {name: found[name] for name in ("step", "best", "key")} == {"step": 3, "best": 0.25, "key": "k"}


@pytest.mark.parametrize("name", ["state.pt", "manifest.json"])
def test_a_torn_checkpoint_is_refused_by_name(tmp_path: Path, name: str) -> None:
    """Cut, changed or missing files are an error that names the checkpoint."""
    save_state(tmp_path, state())
    file = tmp_path / name
    content = file.read_bytes()
    for broken in (content[:-7], content[:-1] + bytes([content[-1] ^ 1]), b""):
        file.write_bytes(broken)
        if name == "manifest.json" and broken == content[:-1] + bytes([content[-1] ^ 1]):
            continue  # a changed brace is not JSON any more; covered by the cut
        with pytest.raises(ValueError, match=str(tmp_path)):
            load_state(tmp_path)
    file.unlink()
    with pytest.raises(ValueError, match=str(tmp_path)):
        load_state(tmp_path)


class Payload:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.path),)


def test_pickled_code_is_not_run(tmp_path: Path) -> None:
    """A checkpoint with code in it is refused, and the code does not run."""
    save_state(tmp_path / "evil", {"step": 1, "model": Payload(tmp_path / "owned")})
    with pytest.raises(ValueError, match="cannot be loaded"):
        load_state(tmp_path / "evil")
    assert not (tmp_path / "owned").exists()


def test_the_newest_whole_checkpoint_is_used(tmp_path: Path) -> None:
    """Two are kept; when the newest is torn, the one before it is found."""
    assert latest(tmp_path) is None
    for step in (1, 2, 30):
        save_latest(tmp_path, state(step), Mirror(tmp_path))
    assert len(list(tmp_path.iterdir())) == 2
    assert latest(tmp_path)["step"] == 30
    (tmp_path / "00000030" / "state.pt").write_bytes(b"torn")
    assert latest(tmp_path)["step"] == 2


def test_a_step_of_nine_digits_is_newer_than_one_of_eight(tmp_path: Path) -> None:
    """Checkpoints are in the order of their steps, not of their names; what is not a step is left alone."""
    (tmp_path / "notes").mkdir()
    steps = (99_999_990, 99_999_999, 100_000_000, 100_000_010)
    for number, step in enumerate(steps):
        save_latest(tmp_path, {"step": step, "key": "k"}, Mirror(tmp_path))
        assert latest(tmp_path)["step"] == step
        kept = {int(path.name) for path in tmp_path.iterdir() if path.name != "notes"}
        assert kept == set(steps[max(0, number - 1) : number + 1])


def test_digests_tell_values_apart_and_not_their_order() -> None:
    """Equal settings have equal digests, whatever order their keys came in."""
    assert digest({"a": 1, "b": 2}) == digest({"b": 2, "a": 1})
    assert digest({"a": 1}) != digest({"a": 2})
    assert digest([1, 2]) != digest([2, 1])


def test_a_torn_checkpoint_is_replaced(tmp_path):
    """A step that is trained again after a fault replaces what was left of it."""
    save_latest(tmp_path, state(1), Mirror(tmp_path))
    for name in ("state.pt", "manifest.json"):
        (tmp_path / "00000001" / name).write_bytes(b"torn")
        save_latest(tmp_path, state(1), Mirror(tmp_path))
        assert torch.equal(latest(tmp_path)["model"]["weight"], state(1)["model"]["weight"])
        assert [path.name for path in tmp_path.iterdir()] == ["00000001"]
