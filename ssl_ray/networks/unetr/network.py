"""The networks of the recipe: a ViT, ViTAutoEnc, which restores with it, and UNETR, which segments.

All hold the same ViT under the same names, so that `transfer.py` copies weights from one to the other.
"""

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from monai.networks.blocks.transformerblock import TransformerBlock
from monai.networks.nets import UNETR, ViT, ViTAutoEnc
from torch import Tensor, nn

from ssl_ray.networks.protocol import Autoencoder, Encoder, Segmenter, TokenDecoder
from ssl_ray.networks.unetr.settings import VIT_LAYERS, VIT_PATCH, Unetr


class _Tokens(Encoder):
    """How MONAI's ViTs, which differ in what follows the tokens, are taken step by step.

    idle: in MONAI 0.8 an unused class token, in 1.4 and 1.5 the cross-attention, in 1.6 only its norm.
    """

    token = VIT_PATCH, VIT_PATCH, VIT_PATCH
    positions = "patch_embedding.position_embeddings"
    beside = "conv3d_transpose.", "conv3d_transpose_1."
    idle = re.compile(r"patch_embedding\.cls_token|blocks\.\d+\.(norm_cross_attn|cross_attn)\..+")
    patch_embedding: nn.Module
    norm: nn.LayerNorm

    @property
    def hidden_size(self) -> int:  # type: ignore[override]
        return self.norm.normalized_shape[0]

    @property
    def settings(self) -> Mapping[str, object]:
        first = self.blocks[0]
        sides = {"mlp_dim": first.mlp.linear1.out_features, "num_heads": first.attn.num_heads}
        return {"kind": "unetr", "hidden_size": self.hidden_size, **sides}

    @property
    def parts(self) -> list[nn.Module]:
        return [self.patch_embedding, *self.blocks, self.norm]

    def embed(self, x: Tensor) -> Tensor:
        tokens: Tensor = self.patch_embedding(x)
        return tokens

    def encode(self, tokens: Tensor, places: Tensor | None = None) -> Tensor:
        for block in self.blocks:  # positions are in the tokens since `embed`
            tokens = block(tokens)
        encoded: Tensor = self.norm(tokens)
        return encoded

    def build_decoder(
        self, patch_size: Sequence[int], hidden_size: int, mlp_dim: int, num_heads: int, layers: int
    ) -> TokenDecoder:
        return _Blocks(math.prod(self.grid(patch_size)), hidden_size, mlp_dim, num_heads, layers)


class VitEncoder(ViT, _Tokens):
    """The ViT of a UNETR by itself."""


class VitAutoencoder(ViTAutoEnc, _Tokens, Autoencoder):
    """MONAI's ViTAutoEnc; `forward` is its own, and gives what `embed`, `encode` and `decode` give together."""

    def decode(self, tokens: Tensor, patch_size: Sequence[int]) -> Tensor:
        """Two transposed convolutions."""
        volumes = tokens.transpose(1, 2).reshape(len(tokens), -1, *self.grid(patch_size))
        decoded: Tensor = self.conv3d_transpose_1(self.conv3d_transpose(volumes))
        return decoded


class Segmentation(UNETR, Segmenter):
    """MONAI's UNETR; its ViT can be taken step by step."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.vit.__class__ = VitEncoder  # nothing is computed, drawn or named otherwise

    @property
    def encoder(self) -> VitEncoder:  # type: ignore[override]
        """The ViT under MONAI's name for it."""
        vit: VitEncoder = self.vit
        return vit


class _Blocks(TokenDecoder):
    """With learned positions, as the ViT has them."""

    def __init__(self, tokens: int, hidden_size: int, mlp_dim: int, num_heads: int, layers: int) -> None:
        super().__init__()
        self.positions = nn.Parameter(nn.init.trunc_normal_(torch.empty(1, tokens, hidden_size), std=0.02))
        self.blocks = nn.ModuleList(TransformerBlock(hidden_size, mlp_dim, num_heads) for _ in range(layers))
        self.norm = nn.LayerNorm(hidden_size)
        _freeze_idle(self)

    def forward(self, tokens: Tensor) -> Tensor:
        tokens = tokens + self.positions
        for block in self.blocks:
            tokens = block(tokens)
        decoded: Tensor = self.norm(tokens)
        return decoded


def build_encoder(network: Unetr, patch_size: Sequence[int], channels: int) -> VitEncoder:
    """The ViT alone, its idle parameters frozen as in `build_autoencoder`."""
    encoder = VitEncoder(**_vit(network, patch_size, channels), patch_size=(VIT_PATCH,) * 3, num_layers=VIT_LAYERS)
    _freeze_idle(encoder)
    return encoder


def build_autoencoder(network: Unetr, patch_size: Sequence[int], channels: int) -> VitAutoencoder:
    """The network that restores corrupted patches: a ViT and two transposed convolutions.

    It takes (batch, channels, *patch_size) and returns the restored patches of the same shape, and the tokens
    (batch, tokens, hidden_size) after each block. The settings are those of the tutorial vit_unetr_ssl of Project
    MONAI. Idle parameters are frozen, so that DDP need not search for unused ones. Each side of the patch is a multiple
    of `VIT_PATCH` voxels.
    """
    autoencoder = VitAutoencoder(
        **_vit(network, patch_size, channels),
        patch_size=(VIT_PATCH,) * 3,
        out_channels=channels,
        deconv_chns=16,
        num_layers=VIT_LAYERS,
    )
    _freeze_idle(autoencoder)
    return autoencoder


def build_segmentation(network: Unetr, patch_size: Sequence[int], channels: int, classes: int) -> Segmentation:
    """The segmentation network (Hatamizadeh et al., UNETR, WACV 2022).

    It takes (batch, channels, *patch_size) and returns logits (batch, classes, *patch_size), background included. The
    settings are those of the tutorial vit_unetr_ssl of Project MONAI; idle parameters are frozen as in
    `build_autoencoder`.
    """
    unetr = Segmentation(
        **_vit(network, patch_size, channels),
        out_channels=classes,
        feature_size=network.feature_size,
        norm_name="instance",
        conv_block=True,
        res_block=True,
        dropout_rate=0.0,
    )
    _freeze_idle(unetr.vit)
    return unetr


def _vit(network: Unetr, patch_size: Sequence[int], channels: int) -> dict[str, Any]:
    """What all networks say of the ViT."""
    widths = network.model_dump(include={"hidden_size", "mlp_dim", "num_heads"})
    return {"in_channels": channels, "img_size": tuple(patch_size), "proj_type": "conv", **widths}


def _freeze_idle(vit: nn.Module) -> None:
    for name, parameter in vit.named_parameters():
        if _Tokens.idle.fullmatch(name):
            parameter.requires_grad_(False)
