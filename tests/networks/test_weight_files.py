"""Files of weights: ours come back bit for bit, those of others are read or refused, and none runs code."""

import json
import os
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from monai.networks.nets import UNETR, ViTAutoEnc
from safetensors.torch import save
from torch import Tensor

from ssl_ray.config.common import NetworkSettings
from ssl_ray.config.schema import Preparation
from ssl_ray.data.normalise import metadata
from ssl_ray.errors import UserError
from ssl_ray.networks.registry import build_autoencoder
from ssl_ray.networks.unetr.settings import Unetr
from ssl_ray.networks.weight_files import (
    ENTRY,
    describe,
    export,
    load_metadata,
    load_weights,
    prepared_otherwise,
    spelled,
)

TINY = Unetr(hidden_size=48, mlp_dim=96, num_heads=3, feature_size=4)
CUBE, LONG = (32, 32, 32), (48, 32, 32)

State = dict[str, Tensor]


def trained() -> ViTAutoEnc:
    """An autoencoder in which every parameter differs from what any initialisation gives."""
    torch.manual_seed(0)
    autoencoder = build_autoencoder(TINY, CUBE).eval()
    for parameter in autoencoder.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    return autoencoder


def test_exported_weights_load_with_the_tutorials_code(tmp_path: Path) -> None:
    """The notebook of Project MONAI, run as published on our file, fills the ViT of a plain MONAI UNETR."""
    autoencoder = trained()
    export(tmp_path / "weights.safetensors", autoencoder.state_dict(), {})
    model = UNETR(1, 14, CUBE, feature_size=4, hidden_size=48, mlp_dim=96, num_heads=3)
    pretrained_path = tmp_path / "weights.pt"

    vit_dict = torch.load(pretrained_path)
    vit_weights = vit_dict["state_dict"]
    model_dict = model.vit.state_dict()
    vit_weights = {k: v for k, v in vit_weights.items() if k in model_dict}
    model_dict.update(vit_weights)
    model.vit.load_state_dict(model_dict)

    ours = dict(autoencoder.named_parameters())
    assert all(torch.equal(value, ours[name]) for name, value in model.vit.named_parameters())


@pytest.mark.parametrize("ending", [".safetensors", ".pt"])
def test_exported_weights_come_back(tmp_path: Path, ending: str) -> None:
    """Both files hold every tensor bit for bit, under plain names, even when the state came from DDP."""
    state = trained().state_dict()
    path = tmp_path / "weights.safetensors"
    export(path, {f"module.{key}": value for key, value in state.items()}, describe(TINY, LONG) | {"step": "60"})
    loaded = load_weights(path.with_suffix(ending))
    assert loaded.keys() == state.keys()
    assert all(torch.equal(loaded[key], value) for key, value in state.items())
    build_autoencoder(TINY, CUBE).load_state_dict(loaded)
    expected = {"kind": "unetr", "hidden_size": "48", "mlp_dim": "96", "num_heads": "3"}
    expected |= {"patch_size": "[48, 32, 32]", "step": "60"}
    assert load_metadata(path.with_suffix(ending)) == (expected if ending == ".safetensors" else {})
    assert sorted(p.name for p in tmp_path.iterdir()) == ["weights.pt", "weights.safetensors"]


@pytest.mark.parametrize("culprit", ["torch.save", "os.replace"])
def test_failed_export_leaves_the_old_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, culprit: str) -> None:
    """A write that breaks off half-way neither harms the weights that were there nor leaves a part behind."""
    path = tmp_path / "weights.safetensors"
    export(path, {"a": torch.zeros(2)}, {})

    def break_off(_: Any, target: Any) -> None:
        if culprit == "torch.save":
            target.write(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(culprit, break_off)
    with pytest.raises(OSError, match="No space"):
        export(path, {"a": torch.ones(2)}, {})
    for name in ("weights.pt", "weights.safetensors"):
        assert torch.equal(load_weights(tmp_path / name)["a"], torch.zeros(2))
    assert len(list(tmp_path.iterdir())) == 2


def test_exported_files_are_small_and_shared(tmp_path: Path) -> None:
    """Views of a large tensor are written by themselves, and whoever may read new files may read these."""
    large = torch.rand(1000, 1000)
    state = {"a": large[:2, :2], "b": large[1:3, 1:3].T}
    export(tmp_path / "weights.safetensors", state, {})
    (tmp_path / "plain").touch()
    mode = (tmp_path / "plain").stat().st_mode
    for path in (tmp_path / "weights.pt", tmp_path / "weights.safetensors"):
        loaded = load_weights(path)
        assert all(torch.equal(loaded[key], value) for key, value in state.items())
        assert path.stat().st_size < 10_000
        assert path.stat().st_mode == mode


WRAPPED = [
    lambda s: s,
    lambda s: {"epoch": 3, "state_dict": s, "loss": 0.1, "model": {"kind": "unetr"}},
    *(lambda s, name=name: {name: s, "optimizer": {}} for name in ("model", "net", "model_state_dict")),
]


@pytest.mark.parametrize("wrap", WRAPPED)
@pytest.mark.parametrize("prefix", ["", "module."])
def test_torch_files_of_others_load(tmp_path: Path, wrap: Callable[[State], Any], prefix: str) -> None:
    """Plain state dicts, training checkpoints around one, and DDP's prefix all give plain names."""
    torch.save(wrap({prefix + "norm.weight": torch.ones(3), prefix + "norm.bias": torch.zeros(3)}), tmp_path / "a.pt")
    loaded = load_weights(tmp_path / "a.pt")
    assert list(loaded) == ["norm.weight", "norm.bias"]


def test_counts_of_batches_are_left_out(tmp_path: Path) -> None:
    """BatchNorm keeps integers beside its weights, in parts of a network that a transfer does not take."""
    norm = torch.nn.Sequential(torch.nn.BatchNorm3d(3))
    torch.save(norm.state_dict(), tmp_path / "a.pt")
    expected = norm.state_dict().keys() - {"0.num_batches_tracked"}
    assert load_weights(tmp_path / "a.pt").keys() == expected
    torch.save({"0.num_batches_tracked": torch.ones(1, dtype=torch.complex64)}, tmp_path / "a.pt")
    with pytest.raises(UserError, match="not a dense tensor of real numbers"):
        load_weights(tmp_path / "a.pt")


def test_scans_that_were_prepared_otherwise_are_told(tmp_path: Path) -> None:
    """Axes, spacing and intensities of what weights learned from; nothing of a file that does not say."""
    here = Preparation(spacing=2, hu_window=(-175, 250))
    there = Preparation(spacing=2, orientation="LPS", normalise="zscore", crop_foreground=False)
    for name, known, expected in (
        ("same", metadata(here), []),
        ("other", metadata(there), ["orientation was LPS there and is RAS here", "normalise was"]),
        ("silent", {}, []),
        ("odd", {"preparation": "{"}, []),
    ):
        export(tmp_path / f"{name}.safetensors", {"a": torch.ones(1)}, known)
        found = prepared_otherwise(tmp_path / f"{name}.safetensors", here)
        assert len(found) == len(expected)
        assert all(one.startswith(start) for one, start in zip(found, expected, strict=True))
        assert prepared_otherwise(tmp_path / f"{name}.pt", here) == []


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ({"teacher": {"a": torch.ones(1)}}, "'teacher' is not one"),
        ({"model": {"a": torch.ones(1)}, "net": {"a": torch.ones(1)}}, "'model' is not one"),
        ({"state_dict": {"a": torch.ones(1), "step": 3}}, "'step' is not one"),
        ({"state_dict": []}, "got list"),
        ({}, "got dict without tensors"),
        ({0: torch.ones(1)}, "0 is not one"),
        (torch.ones(3), "got Tensor"),
    ],
)
def test_torch_files_without_a_state_dict_are_refused(tmp_path: Path, content: Any, expected: str) -> None:
    """Anything but named tensors is refused with what was found instead."""
    torch.save(content, tmp_path / "a.pt")
    with pytest.raises(ValueError, match=r"a\.pt: expected a state dict") as error:
        load_weights(tmp_path / "a.pt")
    assert expected in str(error.value)


class Attack:
    """Pickles to a call that makes a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.folder),)


@pytest.mark.parametrize("zipped", [True, False])
def test_pickled_code_does_not_run(tmp_path: Path, zipped: bool) -> None:
    """A checkpoint that runs code when unpickled is refused before it does."""
    path, folder = tmp_path / "a.pt", tmp_path / "owned"
    content = {"state_dict": {"a": torch.ones(1)}, "b": Attack(folder)}
    torch.save(content, path, _use_new_zipfile_serialization=zipped)
    with pytest.raises(ValueError, match="Python objects, which can run code"):
        load_weights(path)
    assert not folder.exists()
    torch.load(path, weights_only=False)
    assert folder.exists(), "the attack itself must work, or this test shows nothing"


@pytest.mark.parametrize("ending", [".safetensors", ".pt"])
def test_damaged_files_are_refused(tmp_path: Path, ending: str) -> None:
    """Missing, empty, cut and foreign files give a ValueError that names the file."""
    whole = tmp_path / "whole.safetensors"
    export(whole, {"a": torch.ones(300)}, {})
    data = whole.with_suffix(ending).read_bytes()
    path = tmp_path / f"broken{ending}"
    with pytest.raises(ValueError, match=rf"broken\{ending}: cannot read the weights: No such file"):
        load_weights(path)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for content in (b"", data[:1], data[:9], data[: len(data) // 2], data[:-1], b"<html>404</html>", b"\x80" * 64):
            path.write_bytes(content)
            with pytest.raises(ValueError, match=rf"broken\{ending}: "):
                load_weights(path)


def test_equal_trainings_write_equal_bytes(tmp_path: Path) -> None:
    """Both files; safetensors alone would write the entries of its metadata in another order every time."""
    state, facts = trained().state_dict(), {f"fact {number}": str(number) for number in range(20)}
    for attempt in ("a", "b"):
        (tmp_path / attempt).mkdir()
        export(tmp_path / attempt / "best.safetensors", state, facts)
    for name in ("best.safetensors", "best.pt"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    assert load_metadata(tmp_path / "a" / "best.safetensors") == facts


def test_metadata_of_others_are_read(tmp_path: Path) -> None:
    """Plain entries, as files from before and those of others have them; what is not ours in our entry is refused."""
    path = tmp_path / "other.safetensors"
    path.write_bytes(save({"a": torch.zeros(1)}, {"patch_size": "[16, 16, 16]"}))
    assert load_metadata(path) == {"patch_size": "[16, 16, 16]"}
    for broken in ("{", "[1]", "null", "[" * 100_000):
        path.write_bytes(save({"a": torch.zeros(1)}, {"ssl_ray": broken}))
        with pytest.raises(UserError, match="cannot read the metadata"):
            load_metadata(path)


class Wide(NetworkSettings):
    """A network of somebody else's, whose settings are no plain numbers."""

    kind: str = "wide"
    widths: tuple[int, ...] = (32, 64)
    mlp: int | None = None
    rotary: bool = True


def test_settings_of_any_type_come_back(tmp_path: Path) -> None:
    """As strings or JSON, from a pretraining's file and from a trial's, which has the whole section."""
    ours = {"kind": "wide", "widths": "[32, 64]", "mlp": "null", "rotary": "true"}
    export(tmp_path / "made.safetensors", trained().state_dict(), describe(Wide(), CUBE))  # type: ignore[arg-type]
    assert load_metadata(tmp_path / "made.safetensors") == ours | {"patch_size": "[32, 32, 32]"}
    entry = {ENTRY: json.dumps({"network": Wide().model_dump(mode="json")})}
    (tmp_path / "trial.safetensors").write_bytes(save(trained().state_dict(), entry))
    found = load_metadata(tmp_path / "trial.safetensors")
    assert ours.items() <= found.items()
    assert all(found[name] == spelled(value) for name, value in Wide().model_dump().items())
