"""Files of weights, and the strict transfer of an autoencoder's encoder into a UNETR.

Both networks hold the same ViT under the same names, so that a transfer is a copy; what can go wrong is that nothing
matches and nobody is told. Here a transfer is complete, or it is refused with the reason. The driver reads metadata of
weights before it needs any network: MONAI takes seconds to import and is not here.
"""

import math
import os
import pickle
import re
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save
from torch import Tensor, nn

from ssl_ray.config.schema import VIT_PATCH, Network
from ssl_ray.storage.files import appearing, open_file
from ssl_ray.text import BREAKS, shown

if TYPE_CHECKING:
    from monai.networks.nets import UNETR

_DECODER = ("conv3d_transpose.", "conv3d_transpose_1.")
_DTYPES = {
    *(torch.float16, torch.bfloat16, torch.float32, torch.float64),
    *(torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64),
}
_POSITIONS = "patch_embedding.position_embeddings"
IDLE = re.compile(r"patch_embedding\.cls_token|blocks\.\d+\.(norm_cross_attn|cross_attn)\..+")
"""Parameters of the ViT that no loss ever reached: MONAI 0.8 had a class token that was not used, 1.4 and 1.5
cross-attention, 1.6 its norm alone."""


@dataclass(frozen=True)
class Transfer:
    """What a transfer did to the ViT of a UNETR; keys as in `unetr.vit.state_dict()`."""

    loaded: tuple[str, ...]
    """Copied as they stood."""
    interpolated: tuple[str, ...]
    """Resampled to another grid of tokens: the position embeddings or nothing."""
    missing: tuple[str, ...]
    """Not in the checkpoint, and idle: no loss reaches them, so that they keep their values."""
    unexpected: tuple[str, ...]
    """In the checkpoint alone, and idle in the MONAI that wrote it. The autoencoder's decoder is not counted."""
    share: float
    """Share of the ViT's parameters, by elements, that came from the checkpoint; idle ones can keep it below 1."""

    def summary(self) -> dict[str, Any]:
        """The report for a JSON artifact, with the many loaded keys as their number."""
        return {
            "share": self.share,
            "loaded": len(self.loaded),
            "interpolated": list(self.interpolated),
            "missing": list(self.missing),
            "unexpected": list(self.unexpected),
        }


def transfer(
    weights: Mapping[str, Tensor], unetr: "UNETR", source: str, metadata: Mapping[str, str] | None = None
) -> Transfer:
    """Copy the encoder of a ViTAutoEnc into `unetr.vit`, in place: the whole of it, or nothing.

    Every parameter that the tokens depend on must be there with the shape that it has here. The one exception are
    position embeddings of another grid of tokens: they are interpolated trilinearly (as MAE and timm do in 2D).
    State dicts of MONAI 0.8 to 1.6 have the same names and meaning but for idle parameters, which may differ.

    Args:
        weights: state dict of a ViTAutoEnc with `proj_type="conv"`, from `load_weights`.
        unetr: the network to change.
        source: the file's name, for messages.
        metadata: what `load_metadata` read; without `patch_size`, a grid that does not fit is taken as cubic.

    Raises:
        ValueError: NaN or infinite weights, encoder keys missing, unexpected or of another shape, another number of
            heads, or a grid of tokens that cannot be told.
    """
    metadata = metadata or {}
    wanted: dict[str, Tensor] = unetr.vit.state_dict()
    encoder = {key: value for key, value in weights.items() if not key.startswith(_DECODER)}
    diverged = [key for key, value in weights.items() if not torch.isfinite(value).all()]
    if diverged:
        raise ValueError(f"{source}: {_first(diverged)}: NaN or infinite weights; the pretraining has diverged")

    missing = [key for key in wanted if key not in encoder]
    unexpected = [key for key in encoder if key not in wanted]
    complaints = {
        "missing": [key for key in missing if not IDLE.fullmatch(key)],
        "unexpected": [key for key in unexpected if not IDLE.fullmatch(key)],
        "of another shape": [
            f"{key} is {tuple(encoder[key].shape)}, expected {tuple(value.shape)}"
            for key, value in wanted.items()
            if key in encoder and not _fits(key, encoder[key], value)
        ],
    }
    if any(complaints.values()):
        listed = "; ".join(f"{name}: {_first(keys)}" for name, keys in complaints.items() if keys)
        raise ValueError(f"{source}: not the weights of this ViT; likely cause: {_cause(encoder, wanted)}; {listed}")
    # The shapes do not depend on the number of heads: only the metadata can show that the tokens would be different.
    heads = str(unetr.vit.blocks[0].attn.num_heads)
    if metadata.get("num_heads", heads) != heads:
        raise ValueError(f"{source}: trained with num_heads {metadata['num_heads']}, but this network has {heads}")

    values = {key: encoder[key] for key in wanted if key in encoder}
    interpolated: tuple[str, ...] = ()
    grid = _source_grid(values[_POSITIONS].shape[1], unetr.feat_size, metadata, source)
    if grid != unetr.feat_size:
        values[_POSITIONS] = _resample(values[_POSITIONS], grid, unetr.feat_size)
        interpolated = (_POSITIONS,)
    unetr.vit.load_state_dict(values, strict=False)
    return Transfer(
        loaded=tuple(key for key in values if key not in interpolated),
        interpolated=interpolated,
        missing=tuple(missing),
        unexpected=tuple(unexpected),
        share=sum(wanted[key].numel() for key in values) / sum(value.numel() for value in wanted.values()),
    )


def describe(network: Network, patch_size: Sequence[int]) -> dict[str, str]:
    """Metadata for `export`: what `transfer` must know of an autoencoder and cannot see in its weights."""
    widths = network.model_dump(include={"hidden_size", "mlp_dim", "num_heads"})
    return {name: str(value) for name, value in widths.items()} | {"patch_size": str(list(patch_size))}


def export(path: Path, autoencoder_state: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write pretrained weights twice: for `load_weights`, and for the notebooks of Project MONAI.

    `path` gets the weights as safetensors with the metadata; the file beside it that ends with `.pt` is a torch file
    with `{"state_dict": ...}`, which the tutorial's code loads as it stands. Both appear complete or not at all, the
    safetensors last.

    Args:
        path: ends with `.safetensors`.
        autoencoder_state: `state_dict()` of a ViTAutoEnc, or of DDP around it.
        metadata: at least that of `describe`.

    Raises:
        ValueError: another ending, or a state that is not one of tensors.
    """
    if path.suffix != ".safetensors":
        raise ValueError(f"{path}: the name of exported weights must end with .safetensors")
    # Copies, because tensors that share memory are refused by safetensors and saved as a whole by torch.
    state = {
        key: value.detach().to("cpu", copy=True, memory_format=torch.contiguous_format)
        for key, value in _plain(autoencoder_state, str(path)).items()
    }
    with appearing(path.with_suffix(".pt")) as part, part.open("wb") as file:
        torch.save({"state_dict": state}, file)
    with appearing(path) as part:
        part.write_bytes(save(state, dict(metadata)))  # save_file would make it readable for the owner alone


def load_weights(path: Path) -> dict[str, Tensor]:
    """Read a state dict on the CPU, out of a safetensors file or a torch file; no pickled code is ever run.

    Accepts a plain state dict or `{"state_dict": ...}`, with or without the prefix of DDP.

    Raises:
        ValueError: an unreadable file, or one that holds anything else than named tensors.
    """
    try:
        with open_file(path) as file:
            _check_uncompressed(file)
        content: object = (
            load_file(path)
            if path.suffix == ".safetensors"
            else torch.load(path, map_location="cpu", weights_only=True)
        )
    except OSError as error:
        raise ValueError(f"{path}: cannot read the weights: {error.strerror or error}") from error
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"{path}: holds Python objects, which can run code when they are read, or is damaged: save the state dict "
            f"of the network alone"
        ) from error
    except Exception as error:  # which one a damaged file makes the readers raise depends on the byte
        reason = " ".join(str(error).split())[:200]
        raise ValueError(f"{path}: not a file of weights, or a damaged one: {reason}") from error
    if isinstance(content, dict) and "state_dict" in content:
        content = content["state_dict"]
    return _plain(content, str(path))


def load_metadata(path: Path) -> dict[str, str]:
    """The metadata in a safetensors file, each value as one short line; empty for a torch file, which has none.

    Raises:
        ValueError: for a file that `load_weights` would refuse as well.
    """
    if path.suffix != ".safetensors":
        return {}
    try:
        open_file(path).close()
        with safe_open(path, "pt") as file:
            return {name: shown(value) for name, value in (file.metadata() or {}).items()}
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{path}: cannot read the metadata: {shown(error)}") from error


def _fits(key: str, value: Tensor, wanted: Tensor) -> bool:
    if key == _POSITIONS:  # (1, tokens, hidden): the grid may differ
        return value.ndim == 3 and value.shape[::2] == wanted.shape[::2]
    return value.shape == wanted.shape


def _first(items: Sequence[str]) -> str:
    more = f" and {len(items) - 3} more" if len(items) > 3 else ""
    return ", ".join(items[:3]) + more


def _cause(encoder: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> str:
    for name, key in (("hidden_size", "norm.weight"), ("mlp_dim", "blocks.0.mlp.linear1.bias")):
        if key in encoder and encoder[key].shape != wanted[key].shape:
            return f"{name} is {encoder[key].numel()} there and {wanted[key].numel()} here"
    if "patch_embedding.patch_embeddings.1.weight" in encoder:
        return 'it was trained with proj_type="perceptron", not "conv"'
    if not encoder.keys() & wanted.keys():
        return "these are the weights of another kind of network"
    return "the file is incomplete, or the ViT there has other layers, a bias in qkv or another token size"


def _source_grid(
    tokens: int, target: tuple[int, int, int], metadata: Mapping[str, str], source: str
) -> tuple[int, ...]:
    """The grid of tokens that position embeddings belong to."""
    if "patch_size" in metadata:
        grid = tuple(int(side) // VIT_PATCH for side in re.findall(r"\d{1,6}", metadata["patch_size"]))
        if len(grid) != 3 or math.prod(grid) != tokens:
            raise ValueError(
                f"{source}: patch_size in the metadata does not explain {tokens} tokens, got {metadata['patch_size']!r}"
            )
        return grid
    side = round(tokens ** (1 / 3))
    grids = {grid for grid in (target, (side,) * 3) if math.prod(grid) == tokens}
    if len(grids) != 1:
        raise ValueError(
            f"{source}: the grid of its {tokens} tokens cannot be told, and this network has "
            f"{' x '.join(map(str, target))}: use a safetensors file with patch_size in its metadata"
        )
    return grids.pop()


def _resample(positions: Tensor, grid: Sequence[int], target: Sequence[int]) -> Tensor:
    """Position embeddings (1, tokens, hidden) on another grid of tokens that covers the same patch."""
    volume = positions.float().transpose(1, 2).reshape(1, -1, *grid)
    return nn.functional.interpolate(volume, tuple(target), mode="trilinear").flatten(2).transpose(1, 2)


def _check_uncompressed(file: BinaryIO) -> None:
    """Refuse a zip that promises more than the file holds: torch writes none, and would allocate what is promised."""
    if zipfile.is_zipfile(file):
        promised = sum(record.file_size for record in zipfile.ZipFile(file).infolist())
        if promised > os.fstat(file.fileno()).st_size:
            raise ValueError(f"its records promise {promised} bytes, more than it has")


def _is_name(key: object) -> bool:
    return isinstance(key, str) and len(key) < 1000 and not BREAKS.search(key)


def _plain(state: object, source: str) -> dict[str, Tensor]:
    """The state dict without DDP's prefix."""
    if not isinstance(state, Mapping) or not state:
        raise ValueError(f"{source}: expected a state dict, got {type(state).__name__} without tensors")
    strange = [key for key, value in state.items() if not (_is_name(key) and isinstance(value, Tensor))]
    if strange:
        name = shown(repr(strange[0]), 80)
        raise ValueError(f"{source}: expected a state dict of named tensors, but {name} is not one")
    odd = [
        key
        for key, value in state.items()
        if value.layout != torch.strided
        or value.is_nested
        or value.is_meta
        or value.dtype not in _DTYPES
        # One number that is told to stand for a million million of them.
        or value.numel() * value.element_size() > value.untyped_storage().nbytes()
    ]
    if odd:
        raise ValueError(f"{source}: {shown(odd[0], 80)}: not a dense tensor of real numbers")
    prefix = "module." if all(key.startswith("module.") for key in state) else ""
    return {key.removeprefix(prefix): value for key, value in state.items()}
