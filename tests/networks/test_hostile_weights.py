"""Broken and hostile weights: refused in one line, or loaded right; no pickled code is run."""

import json
import pickle
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hostile import Attack, Build, Probe, Rows, check, made, other
from hostile_probe import NETWORK
from safetensors.torch import save

from ssl_ray.networks.registry import build_autoencoder
from ssl_ray.networks.weight_files import describe

ROWS = Rows("weights", ".pt")
ROWS.add_no_files()
ROWS.add_no_files("safetensors is", "a.safetensors")
NAN, INF = float("nan"), float("inf")


def tensors(spoil: Callable[[dict[str, torch.Tensor]], object] = lambda state: None, width: int = 48) -> Build:
    """A torch file of an autoencoder's weights, spoilt in place."""

    def build(path: Path) -> None:
        torch.manual_seed(0)
        network = NETWORK.model_copy(update={"hidden_size": width})
        state = build_autoencoder(network, (32, 32, 32)).state_dict()
        spoil(state)
        torch.save(state, path)

    return build


def saved(content: Any, **options: Any) -> Build:
    return made(lambda path: torch.save(content, path, **options))


def safetensors(header: Any, data: bytes = bytes(16), length: int | None = None) -> Build:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    content = struct.pack("<Q", len(text) if length is None else length) + text + data
    return other("a.safetensors", lambda path: path.write_bytes(content))


def slot(start: int, end: int, shape: Any = (4,), dtype: str = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}


def rezipped(path: Path) -> None:
    """A torch file whose one tensor is 256 MB of zeros, deflated."""
    torch.save({"a": torch.zeros(4)}, path.with_suffix(".plain"))
    with zipfile.ZipFile(path.with_suffix(".plain")) as source, zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as out:
        for info in source.infolist():
            with out.open(info.filename, "w") as stream:
                for _ in range(256 if info.filename.endswith("/data/0") else 0):
                    stream.write(bytes(2**20))
                if not info.filename.endswith("/data/0"):
                    stream.write(source.read(info.filename))


SLOT = json.dumps(slot(0, 16)).encode()
ENCODER = "not the weights of this ViT"
for name, build, rule, reader in (
    ("whole", tensors(), {"share": 1.0}, "transfer"),
    ("NaN weights", tensors(lambda state: state["norm.bias"].fill_(NAN)), "NaN or infinite weights", "transfer"),
    ("infinite weights", tensors(lambda state: state["norm.bias"].fill_(INF)), "NaN or infinite", "transfer"),
    ("missing key", tensors(lambda state: state.pop("blocks.3.norm1.weight")), "missing: blocks.3", "transfer"),
    ("another width", tensors(width=96), "of another shape: ", "transfer"),
    ("another architecture", saved(torch.nn.Linear(3, 3).state_dict()), ENCODER, "transfer"),
    ("pickled code", saved({"a": torch.ones(1), "b": Attack("owned")}), "which can run code", "weights"),
    ("pickled code, old format", saved(Attack("owned"), _use_new_zipfile_serialization=False), "run code", "weights"),
    ("bare pickle", lambda path: pickle.dumps(Attack("owned")), "", "weights"),
    ("whole network", saved(torch.nn.Linear(2, 2)), "which can run code", "weights"),
    ("list", saved([torch.ones(1)]), "expected a state dict", "weights"),
    ("number", saved(5), "expected a state dict", "weights"),
    ("empty dict", saved({}), "expected a state dict", "weights"),
    ("key with a line break", saved({"a\nb": torch.ones(1)}), ENCODER, "transfer"),
    ("deep dict", saved({"state_dict": {"state_dict": {"a": torch.ones(1)}}}), "expected a state dict", "weights"),
    ("expanded tensor", saved({"norm.weight": torch.ones(1).expand(10**6, 10**6)}), "dense", "transfer"),
    ("meta tensor", saved({"norm.weight": torch.empty(10**6, 10**6, device="meta")}), "dense", "transfer"),
    ("sparse tensor", saved({"norm.weight": torch.eye(3).to_sparse()}), "dense", "transfer"),
    ("huge sparse tensor", saved({"a": torch.sparse_coo_tensor(size=(10**9, 10**9))}), "", "transfer"),
    ("complex tensor", saved({"norm.weight": torch.ones(48, dtype=torch.complex64)}), "", "transfer"),
    ("deflated zeros", made(rezipped), "", "weights"),
    ("safetensors, absurd header", safetensors({}, length=2**63 - 1), "not a file of weights", "weights"),
    ("safetensors, header beyond the file", safetensors({}, length=10**6), "not a file of weights", "weights"),
    ("safetensors, header is no JSON", safetensors(b"\xff" * 20), "not a file of weights", "weights"),
    ("safetensors, header deep", safetensors(b"[" * 10**5), "not a file of weights", "weights"),
    ("safetensors, offsets overlap", safetensors({"a": slot(0, 16), "b": slot(0, 16)}), "not a file", "weights"),
    ("safetensors, offsets negative", safetensors({"a": slot(-16, 0)}), "not a file of weights", "weights"),
    ("safetensors, offsets beyond", safetensors({"a": slot(0, 2**40, (2**38,))}), "not a file of weights", "weights"),
    ("safetensors, shape overflows", safetensors({"a": slot(0, 16, (2**62, 2**62, 4))}), "not a file", "weights"),
    ("safetensors, shape is another", safetensors({"a": slot(0, 16, (5,))}), "not a file of weights", "weights"),
    ("safetensors, dtype unknown", safetensors({"a": slot(0, 16, (4,), "Q7")}), "not a file of weights", "weights"),
    ("safetensors, hole", safetensors({"a": slot(4, 16, (3,))}), "not a file of weights", "weights"),
    ("safetensors, no tensor", safetensors({}, b""), "expected a state dict", "weights"),
    ("safetensors, metadata is a list", safetensors({"__metadata__": [], "a": slot(0, 16)}), "", "weights"),
    ("safetensors, metadata broken", safetensors({}, length=2**63 - 1), "", "metadata"),
    ("safetensors, empty tensor", safetensors({"norm.weight": slot(0, 0, (0, 2**40))}, b""), ENCODER, "transfer"),
    ("safetensors, key twice", safetensors(b'{"a":%s,"a":%s}' % (SLOT, SLOT)), {"names": ["a"]}, "weights"),
    ("pytorch cut", lambda path: cut(path, tensors(), 0.5), "not a file of weights", "weights"),
    ("pytorch without its end", lambda path: cut(path, tensors(), 0.99), "not a file of weights", "weights"),
    ("safetensors cut", safetensors({"a": slot(0, 16)}, bytes(9)), "not a file of weights", "weights"),
    ("patch size a lie", lambda path: exported(path, {"patch_size": "[99, 99, 99]"}), "cannot be told", "transfer"),
    ("patch size absurd", lambda path: exported(path, {"patch_size": "9" * 10**5}), "cannot be told", "transfer"),
    ("heads another number", lambda path: exported(path, {"num_heads": "6"}), "num_heads 6", "transfer"),
):  # fmt: skip
    ROWS.add(name, build, rule, reader)


WINDOW = {"spacing": [1, 1, 1], "normalise": {"kind": "window", "hu_window": [-100, 100]}}
MODEL = {
    **{"format": 1, "patch_size": [16, 16, 16], "preparation": WINDOW, "preparation_version": 4, "organs": ["liver"]},
    **{"inference": {"overlap": 0.25, "batch": 1, "precision": "float32"}, "surface_tolerance": 1.0},
    **{"versions": {}, "lineage": {}, "scores": {}},
}
PRETRAINED = {
    **{"kind": "primus", "hidden_size": "6", "num_heads": "1"},
    **{"patch_size": "[16, 16, 16]", "preparation": json.dumps(WINDOW)},
}
BOMB = f"[&x0 [{'1,' * 10}]" + "".join(f",&x{n} [{f'*x{n - 1},' * 10}]" for n in range(1, 9)) + "]"


def promising(name: str, told: dict[str, Any]) -> Build:
    """A file of one number whose metadata promise something else."""
    content = save({"a": torch.zeros(1)}, {"ssl_ray": json.dumps(told)})
    return other(name, lambda path: path.write_bytes(content))


def model(**changes: Any) -> Build:
    return promising("m.safetensors", MODEL | changes)


def encoder(**changes: str) -> Build:
    return promising("best.safetensors", PRETRAINED | changes)


def wide(width: int, kind: str = "unetr") -> dict[str, Any]:
    return {"kind": kind, "hidden_size": width, "num_heads": 1} | ({"mlp_dim": width} if kind == "unetr" else {})


for name, build, rule, reader in (
    ("model of 3 GB", model(network=wide(3000)), "not the weights of", "model"),
    ("model beyond 64 bits", model(network=wide(10**30)), "not the weights of", "model"),
    ("model of many layers", model(network=wide(6, "primus") | {"layers": 10**8}), "equal to 1000", "model"),
    ("model of a huge patch", model(network=wide(6), patch_size=[1600] * 3), "at most 268,435,456 voxels", "model"),
    ("encoder of 3 GB", encoder(hidden_size="3000"), "not the weights of", "embedder"),
    ("encoder of a huge patch", encoder(patch_size="[1600, 1600, 1600]"), "at most 268,435,456 voxels", "embedder"),
    ("encoder of a patch below zero", encoder(patch_size="[-16, 16, 16]"), "greater than 0", "embedder"),
    ("encoder of shared lists", encoder(hidden_size=BOMB), "do not say which encoder", "embedder"),
    ("encoder of deep lists", encoder(hidden_size="[" * 10**5), "do not say which encoder", "embedder"),
):  # fmt: skip
    ROWS.add(name, build, rule, reader)


def cut(path: Path, build: Build, share: float) -> bytes:
    build(path)
    content = path.read_bytes()
    return content[: round(len(content) * share)]


def exported(path: Path, metadata: dict[str, str]) -> Path:
    state = {key: value.contiguous() for key, value in build_autoencoder(NETWORK, (32, 32, 32)).state_dict().items()}
    content = save(state, describe(NETWORK, (32, 32, 32)) | metadata)
    other("a.safetensors", lambda path: path.write_bytes(content))(path)
    return path.with_name("a.safetensors")


@pytest.mark.parametrize("name", ROWS)
def test_hostile_weights_are_refused_or_right(name: str, probe: Probe, tmp_path: Path) -> None:
    """One line that names file and rule, or the weights; no code is run, nothing is inflated beyond the file."""
    check(ROWS[name], probe, tmp_path)
