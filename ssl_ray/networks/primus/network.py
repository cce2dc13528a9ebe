"""Primus (Wald et al. 2025, arXiv:2503.01835): EVA-02's blocks on small tokens, and nothing but a light decoder beside.

Blocks and initialisation are EVA-02's (Fang et al. 2023, arXiv:2303.11331) with a third axis, a norm after the
attention and layer scale; their parameters have the names of `dynamic-network-architectures`. Left out is drop path: it
draws random numbers in training, and a training that goes on from a checkpoint must be the undisturbed one.
"""

import math
from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional

from ssl_ray.networks.primus.settings import Primus
from ssl_ray.networks.protocol import Autoencoder, Encoder

_LAYER_SCALE = 0.1


class _Encoder(Encoder):
    """Learned positions are added to the tokens, and rotary ones turn queries and keys in every block."""

    positions, beside = "pos_embed", ("decoder.",)
    turns: Tensor

    def __init__(self, network: Primus, patch_size: Sequence[int], channels: int) -> None:
        super().__init__()
        side, width = network.token, network.hidden_size
        x, y, z = (length // side for length in patch_size)
        self.settings, self.token, self.grid, self.hidden_size = network.model_dump(), side, (x, y, z), width
        self.patch_embedding = _initialised(nn.Conv3d(channels, width, side, side))
        self.pos_embed = nn.Parameter(nn.init.trunc_normal_(torch.empty(1, x * y * z, width), std=0.02))
        self.register_buffer("turns", rotation(self.grid, width // network.num_heads), persistent=False)
        self.blocks = nn.ModuleList(_Block(width, network.num_heads, depth) for depth in range(1, network.layers + 1))
        self.norm = nn.LayerNorm(width)

    def embed(self, x: Tensor) -> Tensor:
        tokens: Tensor = self.patch_embedding(x).flatten(2).transpose(1, 2)
        return tokens + self.pos_embed

    def encode(self, tokens: Tensor, places: Tensor | None = None) -> Tensor:
        turns = self.turns if places is None else self.turns[:, places].unsqueeze(2)  # (2, B, 1, n, width of a head)
        for block in self.blocks:
            tokens = block(tokens, turns)
        encoded: Tensor = self.norm(tokens)
        return encoded


class _Autoencoder(_Encoder, Autoencoder):
    def __init__(self, network: Primus, patch_size: Sequence[int], channels: int) -> None:
        super().__init__(network, patch_size, channels)
        self.decoder = _Decoder(network.token, network.hidden_size, channels)

    def decode(self, tokens: Tensor) -> Tensor:
        restored: Tensor = self.decoder(tokens.transpose(1, 2).unflatten(2, self.grid))
        return restored


class _Segmentation(nn.Module):
    def __init__(self, network: Primus, patch_size: Sequence[int], channels: int, classes: int) -> None:
        super().__init__()
        self.encoder = _Encoder(network, patch_size, channels)
        self.decoder = _Decoder(network.token, network.hidden_size, classes)

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.encoder.encode(self.encoder.embed(x))
        logits: Tensor = self.decoder(tokens.transpose(1, 2).unflatten(2, self.encoder.grid))
        return logits


build_encoder, build_autoencoder, build_segmentation = _Encoder, _Autoencoder, _Segmentation


class _Block(nn.Module):
    """Attention, and SwiGLU (Shazeer 2020, arXiv:2002.05202) with a norm; deeper blocks begin with smaller outputs."""

    def __init__(self, width: int, heads: int, depth: int) -> None:
        super().__init__()
        inner = width * 8 // 3
        self.heads, self.norm1, self.norm2 = heads, nn.LayerNorm(width), nn.LayerNorm(width)
        projections = {f"{name}_proj": nn.Linear(width, width, bias=name != "k") for name in "qkv"}
        self.attn = nn.ModuleDict({**projections, "norm": nn.LayerNorm(width), "proj": nn.Linear(width, width)})
        gates = {name: nn.Linear(width, inner) for name in ("fc1_g", "fc1_x")}
        self.mlp = nn.ModuleDict({**gates, "norm": nn.LayerNorm(inner), "fc2": nn.Linear(inner, width)})
        self.gamma_1, self.gamma_2 = (nn.Parameter(torch.full((width,), _LAYER_SCALE)) for _ in range(2))
        for name, layer in self.named_modules():
            if isinstance(layer, nn.Linear):
                scale = math.sqrt(2 * depth) if name in ("attn.proj", "mlp.fc2") else 1.0
                nn.init.trunc_normal_(layer.weight, std=0.02 / scale, a=-2 / scale, b=2 / scale)
                if layer.bias is not None:
                    nn.init.zeros_(layer.bias)

    def forward(self, tokens: Tensor, turns: Tensor) -> Tensor:
        x, attn, mlp = self.norm1(tokens), self.attn, self.mlp
        q, k, v = (attn[f"{name}_proj"](x).unflatten(2, (self.heads, -1)).transpose(1, 2) for name in "qkv")
        mixed = functional.scaled_dot_product_attention(turned(q, turns), turned(k, turns), v)  # (B, heads, n, width)
        tokens = tokens + self.gamma_1 * attn["proj"](attn["norm"](mixed.transpose(1, 2).flatten(2)))
        x = self.norm2(tokens)
        gated = functional.silu(mlp["fc1_g"](x)) * mlp["fc1_x"](x)
        tokens = tokens + self.gamma_2 * mlp["fc2"](mlp["norm"](gated))
        return tokens


def rotation(grid: Sequence[int], width: int) -> Tensor:
    """Rotary positions (Su et al. 2021, arXiv:2104.09864) along three axes: cosines and sines (2, N, width) of a grid.

    A third of the pairs of a head's numbers belong to each axis: pair j of b is turned by the token's place along the
    axis times 10000^(-j / b). What of a head's `width` is no multiple of six is not turned.
    """
    bands = width // 6
    places = torch.cartesian_prod(*(torch.arange(side) for side in grid)).float()  # (N, 3), z fastest
    angles = (places.unsqueeze(2) * 10_000.0 ** (-torch.arange(bands) / bands)).flatten(1)  # (N, 3 * bands)
    angles = functional.pad(angles, (0, width // 2 - 3 * bands)).repeat_interleave(2, dim=1)  # (N, width)
    return torch.stack([angles.cos(), angles.sin()])


def turned(x: Tensor, turns: Tensor) -> Tensor:
    """Queries or keys (B, heads, n, width), with every pair of numbers turned by the angle of its token."""
    across = torch.stack([-x[..., 1::2], x[..., ::2]], dim=-1).flatten(-2)
    return (x * turns[0] + across * turns[1]).to(x.dtype)


class _ChannelNorm(nn.LayerNorm):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.movedim(1, -1)).movedim(-1, 1)


class _Decoder(nn.Sequential):
    """From tokens to voxels: each transposed convolution doubles the grid, and channels shrink by one factor a step."""

    def __init__(self, token: int, width: int, channels: int) -> None:
        steps = token.bit_length() - 1
        shrink = (width / (2 * channels)) ** (1 / steps)
        between = [8 * max(1, math.floor(width / shrink**step / 8 + 0.5)) for step in range(1, steps)]
        layers: list[nn.Module] = []
        for before, after in pairwise([width, *between, channels]):
            grow = _initialised(nn.ConvTranspose3d(before, after, 2, 2))
            layers += [grow, _ChannelNorm(after, eps=1e-6), nn.GELU()]
        super().__init__(*layers[:-2])


def _initialised(convolution: nn.Conv3d | nn.ConvTranspose3d) -> nn.Module:
    assert convolution.bias is not None
    nn.init.kaiming_normal_(convolution.weight, a=0.01)
    nn.init.zeros_(convolution.bias)
    return convolution
