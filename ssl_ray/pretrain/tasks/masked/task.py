"""The masked autoencoder in training: the encoder of the tokens that are seen, a light decoder of all, the loss."""

import math
from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from einops import rearrange
from numpy.typing import NDArray
from torch import Tensor, nn

from ssl_ray.config.schema import Network
from ssl_ray.networks.protocol import Encoder
from ssl_ray.networks.registry import build_encoder
from ssl_ray.pretrain.tasks.masked.settings import Masked
from ssl_ray.pretrain.tasks.protocol import Task
from ssl_ray.random import words_of


def build_task(settings: Masked, network: Network, patch_size: Sequence[int], channels: int) -> Task:
    """The network's encoder, and a decoder that fine-tuning leaves."""
    return MaskedTask(settings, MaskedAutoencoder(build_encoder(network, patch_size, channels), settings, channels))


class MaskedAutoencoder(nn.Module):
    """An encoder of some tokens, and a decoder of all N. P is the number of voxels of a token, all channels counted."""

    def __init__(self, encoder: Encoder, settings: Masked, channels: int) -> None:
        super().__init__()
        width = settings.decoder_size
        self.encoder = encoder
        self.narrow = nn.Linear(encoder.hidden_size, width)
        self.dropped = nn.Parameter(nn.init.trunc_normal_(torch.empty(1, 1, width), std=0.02))
        places = torch.empty(1, math.prod(encoder.grid), width)
        self.places = nn.Parameter(nn.init.trunc_normal_(places, std=0.02))
        options: Any = {"dropout": 0, "activation": "gelu", "batch_first": True, "norm_first": True, "bias": False}
        block = partial(nn.TransformerEncoderLayer, width, width // 32, 4 * width, **options)
        self.decoder = nn.ModuleList(block() for _ in range(settings.decoder_layers))
        self.voxels = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, channels * encoder.token**3))

    def forward(self, patches: Tensor, places: Tensor) -> Tensor:
        """Patches (B, C, X, Y, Z), of which the tokens at `places` (B, n) are seen -> (B, N, width)."""
        tokens = self.encoder.embed(patches)  # (B, N, hidden)
        seen = tokens.gather(1, places[..., None].expand(-1, -1, tokens.shape[2]))  # (B, n, hidden)
        seen = self.narrow(self.encoder.encode(seen, places))  # (B, n, width)
        everywhere = self.dropped.to(seen.dtype).expand(len(seen), tokens.shape[1], -1)
        decoded = everywhere.scatter(1, places[..., None].expand_as(seen), seen) + self.places
        for block in self.decoder:
            decoded = block(decoded)
        return decoded

    def predict(self, decoded: Tensor) -> Tensor:
        """(B, N, width) -> voxels (B, N, P), float32."""
        voxels: Tensor = self.voxels(decoded)
        return voxels.float()


class MaskedTask(Task):
    """L1 or L2 on the voxels of dropped tokens."""

    network: MaskedAutoencoder
    objective: "_Objective"

    def __init__(self, settings: Masked, network: MaskedAutoencoder) -> None:
        kept = settings.kept(math.prod(network.encoder.grid))
        super().__init__(network, _Objective(network, settings, kept), [*network.decoder])

    def draw(self, seed: int, indices: NDArray[np.int64], view: int) -> Tensor:
        """The places of all N tokens in random order, those to be seen at the front: (B, N)."""
        words = words_of(seed, indices, view, math.prod(self.encoder.grid))
        return torch.from_numpy(words.argsort(axis=1, kind="stable"))

    def see(self, clean: Tensor, tables: Sequence[Tensor]) -> Tensor:
        """That order; the network takes its tokens out of the clean patch."""
        return tables[0]

    def forward(self, seen: Tensor, clean: Tensor) -> tuple[Tensor, Tensor]:
        """The mean over dropped tokens, reported and minimised."""
        loss: Tensor = self.objective(self.network(clean, seen[:, : self.objective.kept]), seen, clean)
        return loss, loss

    def validate(self, seen: Tensor, clean: Tensor) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Beside the loss that of predicting the mean of what is seen, by channel; of normalised tokens that is 0."""
        task, encoder = self.objective, self.encoder
        voxels = tokens_of(clean, encoder.token)  # (B, N, P)
        mean, scale = task.units(voxels)
        targets = (voxels - mean) / scale
        made = self.network.predict(self.network(clean, seen[:, : task.kept]))
        places = seen[:, : task.kept, None].expand(-1, -1, voxels.shape[2])
        channels = targets.gather(1, places).unflatten(2, (clean.shape[1], -1))  # (B, n, C, P / C)
        guess = channels.mean(dim=(1, 3)).repeat_interleave(channels.shape[3], 1)[:, None].expand_as(targets)
        losses = {
            name: task.loss(values, targets, seen).mean(dtype=torch.float64)
            for name, values in (("loss", made), ("mean_loss", guess))
        }
        made = made * scale + mean
        dropped = torch.ones_like(voxels, dtype=torch.bool).scatter(1, places, False)
        rows = {"ground truth": voxels, "seen": torch.where(dropped, torch.nan, voxels), "made": made}
        rows["made, seen put back"] = torch.where(dropped, made, voxels)
        return losses, {name: patches_of(row, encoder.grid, encoder.token) for name, row in rows.items()}


class _Objective(nn.Module):
    def __init__(self, network: MaskedAutoencoder, settings: Masked, kept: int) -> None:
        super().__init__()
        self.network, self.settings, self.kept = network, settings, kept

    def forward(self, decoded: Tensor, order: Tensor, clean: Tensor) -> Tensor:
        """(B, N, width), places (B, N), patches -> mean loss."""
        voxels = tokens_of(clean, self.network.encoder.token)
        mean, scale = self.units(voxels)
        return self.loss(self.network.predict(decoded), (voxels - mean) / scale, order).mean()

    def units(self, voxels: Tensor) -> tuple[Tensor | float, Tensor | float]:
        """The values that are 0, and 1 more than that, for the loss: of each token (B, N, 1), or of all."""
        if not self.settings.normalise:
            return 0.0, 1.0
        return voxels.mean(dim=2, keepdim=True), (voxels.var(dim=2, keepdim=True) + 1e-6).sqrt()

    def loss(self, made: Tensor, targets: Tensor, order: Tensor) -> Tensor:
        """(B, N, P), twice -> mean over the voxels of each dropped token, (B, N - n)."""
        error = made - targets
        error = error.abs() if self.settings.loss == "l1" else error.square()
        return error.mean(dim=2).gather(1, order[:, self.kept :])


def tokens_of(patches: Tensor, token: int) -> Tensor:
    """(B, C, X, Y, Z) -> (B, N, P): the voxels of a token in C order, channel by channel."""
    return rearrange(patches, "b c (x p) (y q) (z r) -> b (x y z) (c p q r)", p=token, q=token, r=token)


def patches_of(voxels: Tensor, grid: Sequence[int], token: int) -> Tensor:
    """The inverse of `tokens_of`."""
    sides = dict(zip("xyzpqr", (*grid, *[token] * 3), strict=True))
    return rearrange(voxels, "b (x y z) (c p q r) -> b c (x p) (y q) (z r)", **sides)
