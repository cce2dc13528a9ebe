"""The networks of the recipe: a ViT, ViTAutoEnc, which restores with it, and UNETR, which segments.

All hold the same ViT under the same names, so that `transfer.py` copies weights from one to the other. The settings are
those of the tutorial vit_unetr_ssl of Project MONAI. Idle parameters are frozen, so that DDP need not search for them.
"""

import re
from collections.abc import Sequence
from typing import Any

from monai.networks.nets import UNETR, ViT, ViTAutoEnc
from torch import Tensor, nn

from ssl_ray.networks.protocol import Autoencoder, Encoder
from ssl_ray.networks.unetr.settings import VIT_LAYERS, VIT_PATCH, Unetr


class _Tokens(Encoder):
    """How MONAI's ViTs, which differ in what follows the tokens, are taken step by step.

    idle: in MONAI 0.8 an unused class token, in 1.4 and 1.5 the cross-attention, in 1.6 only its norm.
    """

    token = VIT_PATCH
    positions = "patch_embedding.position_embeddings"
    beside = "conv3d_transpose.", "conv3d_transpose_1."
    idle = re.compile(r"patch_embedding\.cls_token|blocks\.\d+\.(norm_cross_attn|cross_attn)\..+")

    def embed(self, x: Tensor) -> Tensor:
        tokens: Tensor = self.patch_embedding(x)
        return tokens

    def encode(self, tokens: Tensor, places: Tensor | None = None) -> Tensor:
        for block in self.blocks:  # positions are in the tokens since `embed`
            tokens = block(tokens)
        encoded: Tensor = self.norm(tokens)
        return encoded


class VitEncoder(ViT, _Tokens):
    """The ViT of a UNETR by itself."""


class VitAutoencoder(ViTAutoEnc, _Tokens, Autoencoder):
    """MONAI's ViTAutoEnc; `forward` is its own, and gives what `embed`, `encode` and `decode` give together."""

    conv3d_transpose: nn.Module
    conv3d_transpose_1: nn.Module

    def decode(self, tokens: Tensor) -> Tensor:
        """Two transposed convolutions."""
        volumes = tokens.transpose(1, 2).reshape(len(tokens), -1, *self.grid)
        decoded: Tensor = self.conv3d_transpose_1(self.conv3d_transpose(volumes))
        return decoded


class Segmentation(UNETR):
    """MONAI's UNETR (Hatamizadeh et al., WACV 2022); its ViT can be taken step by step."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.vit.__class__ = VitEncoder  # nothing is computed, drawn or named otherwise

    @property
    def encoder(self) -> VitEncoder:
        """The ViT under MONAI's name for it."""
        vit: VitEncoder = self.vit
        return vit


def build_encoder(network: Unetr, patch_size: Sequence[int], channels: int) -> VitEncoder:
    """The ViT alone."""
    encoder = VitEncoder(**_vit(network, patch_size, channels), patch_size=(VIT_PATCH,) * 3, num_layers=VIT_LAYERS)
    _make_ready(encoder, network, patch_size)
    return encoder


def build_autoencoder(network: Unetr, patch_size: Sequence[int], channels: int) -> VitAutoencoder:
    """A ViT and two transposed convolutions."""
    options = {"patch_size": (VIT_PATCH,) * 3, "out_channels": channels, "deconv_chns": 16, "num_layers": VIT_LAYERS}
    autoencoder = VitAutoencoder(**_vit(network, patch_size, channels), **options)
    _make_ready(autoencoder, network, patch_size)
    return autoencoder


def build_segmentation(network: Unetr, patch_size: Sequence[int], channels: int, classes: int) -> Segmentation:
    """A ViT and a convolutional decoder of the tokens after blocks 3, 6, 9 and 12."""
    unetr = Segmentation(**monai_options(network, patch_size, channels, classes))
    _make_ready(unetr.encoder, network, patch_size)
    return unetr


MONAI_CLASS = "UNETR"


def monai_options(network: Unetr, patch_size: Sequence[int], channels: int, classes: int) -> dict[str, Any]:
    """What MONAI's class is built with."""
    return {
        **_vit(network, patch_size, channels),
        "out_channels": classes,
        "feature_size": network.feature_size,
        "norm_name": "instance",
        "conv_block": True,
        "res_block": True,
        "dropout_rate": 0.0,
    }


def _vit(network: Unetr, patch_size: Sequence[int], channels: int) -> dict[str, Any]:
    """What all networks say of the ViT."""
    widths = network.model_dump(include={"hidden_size", "mlp_dim", "num_heads"})
    return {"in_channels": channels, "img_size": tuple(patch_size), "proj_type": "conv", **widths}


def _make_ready(vit: Encoder, network: Unetr, patch_size: Sequence[int]) -> None:
    """Tell it what an `Encoder` tells, and freeze idle parameters."""
    x, y, z = (side // VIT_PATCH for side in patch_size)
    vit.grid, vit.hidden_size = (x, y, z), network.hidden_size
    vit.settings = network.model_dump(exclude=set(network.segmentation_only))
    for name, parameter in vit.named_parameters():
        if vit.idle.fullmatch(name):
            parameter.requires_grad_(False)
