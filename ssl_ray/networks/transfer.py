"""The strict transfer of an encoder into another network: it is complete, or refused with the reason."""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ssl_ray.errors import UserError
from ssl_ray.networks.protocol import Encoder
from ssl_ray.networks.weight_files import spelled
from ssl_ray.text import shown


@dataclass(frozen=True)
class Transfer:
    """What a transfer did to an encoder; keys as in its state dict.

    loaded: number of parameters that were copied unchanged.
    interpolated: the position embeddings where they were resampled to another grid of tokens, or nothing.
    missing: idle parameters that the checkpoint does not have; they keep their values, which no loss reaches.
    unexpected: idle parameters that only the checkpoint has. The autoencoder's decoder is not counted.
    share: share of the encoder's numbers that came from the checkpoint; only missing parameters keep it below 1.
    prefix: what the encoder's keys began with in the checkpoint, e.g. `vit.` in a UNETR's; mostly nothing.
    """

    loaded: int
    interpolated: tuple[str, ...]
    missing: tuple[str, ...]
    unexpected: tuple[str, ...]
    share: float
    prefix: str


def transfer(
    weights: Mapping[str, Tensor], network: nn.Module, source: str, metadata: Mapping[str, str] | None = None
) -> Transfer:
    """Copy a pretrained encoder into `network`, or its `encoder`, in place: the whole of it, or nothing.

    Every parameter that the tokens depend on must be there, in the shape that it has here. The one exception are
    position embeddings of another grid of tokens: they are interpolated trilinearly (as MAE and timm do in 2D).
    State dicts of MONAI 0.8 to 1.6 have the same names and meaning, but for idle parameters, which may differ. The
    encoder may be a part of a larger network, all its keys with one prefix, such as `model.`; the other parts are
    left out. Without `patch_size` in the metadata, a grid of tokens that does not fit is taken as cubic.

    A UserError names the `source`, and what does not match: a network without encoder, NaN or infinite weights, keys
    that are missing, unexpected or of another shape, several encoders, other settings, an unknown grid of tokens.
    """
    metadata, vit = metadata or {}, network if isinstance(network, Encoder) else getattr(network, "encoder", None)
    if not isinstance(vit, Encoder):
        raise UserError(f"{source}: a {type(network).__name__} has no encoder that weights could be taken into")
    wanted = {key: value for key, value in vit.state_dict().items() if not key.startswith(vit.beside)}
    prefix = _prefix(weights, vit.positions, source)
    inside = {key.removeprefix(prefix): value for key, value in weights.items() if key.startswith(prefix)}
    encoder = {key: value for key, value in inside.items() if not key.startswith(vit.beside)}
    diverged = [key for key, value in weights.items() if not torch.isfinite(value).all()]
    if diverged:
        raise UserError(f"{source}: {_first(diverged)}: NaN or infinite weights; the pretraining has diverged")
    # The metadata explain a mismatch best. The number of heads shows in no shape: only they can tell it.
    for name, here in vit.settings.items():
        if metadata.get(name, spelled(here)) != spelled(here):
            raise UserError(f"{source}: trained with {name} {metadata[name]}, but this network has {spelled(here)}")

    missing = [key for key in wanted if key not in encoder]
    unexpected = [key for key in encoder if key not in wanted]
    complaints = {
        "missing": [key for key in missing if not vit.idle.fullmatch(key)],
        "unexpected": [key for key in unexpected if not vit.idle.fullmatch(key)],
        "of another shape": [
            f"{key} is {tuple(encoder[key].shape)}, expected {tuple(value.shape)}"
            for key, value in wanted.items()
            if key in encoder and not _fits(key == vit.positions, encoder[key], value)
        ],
    }
    if any(complaints.values()):
        listed = "; ".join(f"{name}: {_first(keys)}" for name, keys in complaints.items() if keys)
        raise UserError(f"{source}: not the weights of this ViT: {listed}")
    values = {key: encoder[key] for key in wanted if key in encoder}
    given = _source_grid(values[vit.positions].shape[1], vit, metadata, source)
    resampled = given != vit.grid
    if resampled:  # (1, tokens, hidden), to another grid that covers the same patch
        volume = values[vit.positions].float().transpose(1, 2).reshape(1, -1, *given)
        volume = nn.functional.interpolate(volume, vit.grid, mode="trilinear")
        values[vit.positions] = volume.flatten(2).transpose(1, 2)
    vit.load_state_dict(values, strict=False)
    return Transfer(
        loaded=len(values) - resampled,
        interpolated=(vit.positions,) if resampled else (),
        missing=tuple(missing),
        unexpected=tuple(unexpected),
        share=sum(wanted[key].numel() for key in values) / sum(value.numel() for value in wanted.values()),
        prefix=prefix,
    )


@torch.no_grad()
def permute(encoder: Encoder, seed: int) -> None:
    """Shuffle an encoder within each tensor, in place: what it learned is gone, not how its numbers scatter."""
    random = torch.Generator().manual_seed(seed)
    for weight in encoder.parameters():
        weight.copy_(weight.flatten()[torch.randperm(weight.numel(), generator=random)].view_as(weight))


def _prefix(weights: Mapping[str, Tensor], positions: str, source: str) -> str:
    """What the keys of the encoder begin with: its position embeddings, under a name of their own, show it."""
    found = [key.removesuffix(positions) for key in weights if f".{key}".endswith(f".{positions}")]
    if len(found) > 1:
        names = _first([repr(one) for one in found])
        raise UserError(f"{source}: holds {len(found)} encoders, under {names}: save the one to start from")
    return found[0] if found else ""


def _fits(positions: bool, value: Tensor, wanted: Tensor) -> bool:
    if positions:  # (1, tokens, hidden): the grid may differ
        return value.ndim == 3 and value.shape[::2] == wanted.shape[::2]
    return value.shape == wanted.shape


def _first(items: Sequence[str]) -> str:
    """The first three, which may be keys out of a foreign file."""
    more = f" and {len(items) - 3} more" if len(items) > 3 else ""
    return ", ".join(shown(item, 200) for item in items[:3]) + more


def _source_grid(tokens: int, vit: Encoder, metadata: Mapping[str, str], source: str) -> tuple[int, ...]:
    """The grid of tokens that position embeddings belong to."""
    if given := metadata.get("patch_size"):
        grids = {tuple(int(side) // vit.token for side in re.findall(r"\d{1,6}", given))}
    else:
        grids = {vit.grid, (round(tokens ** (1 / 3)),) * 3}
    possible = [grid for grid in grids if len(grid) == 3 and math.prod(grid) == tokens]
    if len(possible) != 1:
        raise UserError(
            f"{source}: the grid of its {tokens} tokens cannot be told, and this network has "
            f"{' x '.join(map(str, vit.grid))}: use a safetensors file with patch_size in its metadata, got {given!r}"
        )
    return possible[0]
