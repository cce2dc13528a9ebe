"""Files of weights: reading those of others safely, and writing ours.

A file of weights may come from anywhere. Reading it runs no pickled code and takes no more memory than the file is
long. The driver reads metadata before it needs any network: MONAI takes seconds to import and is not here.
"""

import json
import os
import pickle
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save
from torch import Tensor

from ssl_ray.config.schema import Network, Preparation
from ssl_ray.errors import UserError
from ssl_ray.storage.files import appearing, open_file, write_file
from ssl_ray.text import shown

ENTRY = "ssl_ray"
"""The entry of a safetensors file that holds our metadata, as JSON."""

_STATES = ("state_dict", "model_state_dict", "network_state_dict", "model", "network", "net", "network_weights")
"""Under which names training programs keep the state dict beside others; the last one is nnU-Net's."""


def describe(network: Network, patch_size: Sequence[int]) -> dict[str, str]:
    """Metadata for `export`: what `transfer` must know of an autoencoder and cannot see in its weights."""
    read = network.model_dump(mode="json", exclude=set(network.segmentation_only))
    return {name: spelled(value) for name, value in read.items()} | {"patch_size": spelled(list(patch_size))}


def spelled(value: Any) -> str:
    """A setting as metadata have it: a string as it is, anything else as JSON."""
    return value if isinstance(value, str) else json.dumps(value)


def export(path: Path, autoencoder_state: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write pretrained weights twice: for `load_weights`, and for the notebooks of Project MONAI.

    `path` gets the weights as safetensors with the metadata. The file beside it with the ending `.pt` is a torch file
    of `{"state_dict": ...}`, which the tutorial's code loads unchanged. Both appear complete or not at all, the
    safetensors last. The state may be that of DDP around the autoencoder; the metadata has at least that of `describe`.
    """
    # Copies, because safetensors refuses tensors that share memory, and torch would save all of that memory.
    state = {
        key: value.detach().to("cpu", copy=True, memory_format=torch.contiguous_format)
        for key, value in _plain(autoencoder_state, str(path)).items()
    }
    with appearing(path.with_suffix(".pt")) as part, part.open("wb") as file:
        torch.save({"state_dict": state}, file)
    # Safetensors writes several entries in no fixed order, and two equal trainings would leave files of other bytes.
    entry = {ENTRY: json.dumps(dict(metadata), sort_keys=True)}
    write_file(path, save(state, entry))  # `save_file` would let only the owner read it


def load_weights(path: Path) -> dict[str, Tensor]:
    """Read a state dict, or one under a usual name like `"model"`, on the CPU, and remove DDP's prefix.

    No pickled code is ever run. A file that cannot be read, or holds anything but named dense tensors of real numbers
    and the counts of batches that BatchNorm keeps, which are left out, is a UserError.
    """
    try:
        with open_file(path) as file:  # torch would allocate what a zip promises; those that it writes promise no more
            promised = sum(one.file_size for one in zipfile.ZipFile(file).infolist()) if zipfile.is_zipfile(file) else 0
            if promised > os.fstat(file.fileno()).st_size:
                raise ValueError(f"its records promise {promised} bytes, more than it has")
        safe = path.suffix == ".safetensors"
        content: object = load_file(path) if safe else torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise UserError(f"{path}: cannot read the weights: {error.strerror or error}") from error
    except pickle.UnpicklingError as error:
        raise UserError(
            f"{path}: holds Python objects, which can run code when they are read, or is damaged: save the state dict "
            f"of the network alone"
        ) from error
    except Exception as error:  # which exception a damaged file raises depends on the damaged byte
        raise UserError(f"{path}: not a file of weights, or a damaged one: {shown(error, 200)}") from error
    if isinstance(content, dict):
        nested = [content[name] for name in _STATES if isinstance(content.get(name), Mapping)]
        content = content.get("state_dict", nested[0] if len(nested) == 1 else content)
    return _plain(content, str(path))


def load_metadata(path: Path) -> dict[str, str]:
    """The metadata in a safetensors file, each value as one short line; empty for a torch file, which has none.

    What a segmentation model says of its network lies among them, as of an autoencoder.
    """
    if path.suffix != ".safetensors":
        return {}
    found = read_entry(path)
    if isinstance(network := found.get("network"), dict):
        found |= network
    return {shown(name): shown(spelled(value)) for name, value in found.items()}


def read_entry(path: Path) -> dict[str, Any]:
    """The metadata in a safetensors file: our own as they were written, and whatever else is there as strings."""
    try:
        open_file(path).close()
        with safe_open(path, "pt") as file:
            found: dict[str, Any] = file.metadata() or {}
        return found | dict(json.loads(found.pop(ENTRY, "{}")))
    except (OSError, SafetensorError, ValueError, TypeError, RecursionError) as error:
        raise UserError(f"{path}: cannot read the metadata, is it a safetensors file? {shown(error)}") from error


def prepared_otherwise(path: Path, preparation: Preparation) -> list[str]:
    """What differs between the scans that weights learned from and those they are to see; nothing where none is told.

    Compared is what changes the look of a patch: axes, spacing, intensities.
    """
    told = read_entry(path).get("preparation") if path.suffix == ".safetensors" else None
    try:
        there = json.loads(told) if isinstance(told, str) else told
    except ValueError:
        return []
    if not isinstance(there, dict):
        return []
    here = preparation.model_dump(mode="json", include={"orientation", "spacing", "normalise"})
    differing = [key for key in here if there.get(key, here[key]) != here[key]]
    return [f"{key} was {shown(spelled(there[key]))} there and is {spelled(here[key])} here" for key in differing]


def _plain(state: object, source: str) -> dict[str, Tensor]:
    """The state dict without DDP's prefix, and without BatchNorm's counts."""
    if isinstance(state, Mapping):
        state = {key: value for key, value in state.items() if not _is_count(key, value)}
    if not isinstance(state, Mapping) or not state:
        raise UserError(f"{source}: expected a state dict, got {type(state).__name__} without tensors")
    for key, value in state.items():
        if not (isinstance(key, str) and isinstance(value, Tensor)):
            name = shown(repr(key), 80)
            raise UserError(f"{source}: expected a state dict of named tensors, but {name} is not one")
        # A copy into our weights would drop an imaginary part without a word.
        plain = value.layout == torch.strided and value.is_floating_point() and not (value.is_meta or value.is_nested)
        # With stride 0 a tensor of one stored number has as many elements as it likes.
        if not plain or value.numel() * value.element_size() > value.untyped_storage().nbytes():
            raise UserError(f"{source}: {shown(key, 80)}: not a dense tensor of real numbers")
    prefix = "module." if all(key.startswith("module.") for key in state) else ""
    return {key.removeprefix(prefix): value for key, value in state.items()}


def _is_count(key: object, value: object) -> bool:
    named = isinstance(key, str) and key.rpartition(".")[2] == "num_batches_tracked"
    return named and isinstance(value, Tensor) and value.dtype == torch.int64
