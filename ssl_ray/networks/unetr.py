"""The two networks of the recipe: ViTAutoEnc, which is pretrained, and UNETR, which segments.

Both hold the same ViT under the same names, so that `transfer.py` copies weights from one to the other.
"""

import re
from collections.abc import Sequence
from typing import Any

from monai.networks.nets import UNETR, ViTAutoEnc
from torch import nn

from ssl_ray.config.schema import VIT_LAYERS, VIT_PATCH, Network

IDLE = re.compile(r"patch_embedding\.cls_token|blocks\.\d+\.(norm_cross_attn|cross_attn)\..+")
"""Names of the ViT's idle parameters, those that no loss reaches: in MONAI 0.8 an unused class token, in 1.4 and 1.5
the cross-attention, in 1.6 only its norm."""


def build_autoencoder(network: Network, patch_size: Sequence[int]) -> ViTAutoEnc:
    """The network that restores corrupted patches: a ViT and two transposed convolutions.

    It takes (batch, 1, *patch_size) and returns the restored patches of the same shape, and the tokens
    (batch, tokens, hidden_size) after each block. The settings are those of the tutorial vit_unetr_ssl of Project
    MONAI. Idle parameters are frozen, so that DDP need not search for unused ones. Each side of the patch is a multiple
    of `VIT_PATCH` voxels.
    """
    autoencoder = ViTAutoEnc(
        **_vit(network, patch_size), patch_size=(VIT_PATCH,) * 3, out_channels=1, deconv_chns=16, num_layers=VIT_LAYERS
    )
    _freeze_idle(autoencoder)
    return autoencoder


def build_unetr(network: Network, patch_size: Sequence[int], classes: int) -> UNETR:
    """The segmentation network (Hatamizadeh et al., UNETR, WACV 2022).

    It takes (batch, 1, *patch_size) and returns logits (batch, classes, *patch_size), background included. The settings
    are those of the tutorial vit_unetr_ssl of Project MONAI; idle parameters are frozen as in `build_autoencoder`.
    """
    unetr = UNETR(
        **_vit(network, patch_size),
        out_channels=classes,
        feature_size=network.feature_size,
        norm_name="instance",
        conv_block=True,
        res_block=True,
        dropout_rate=0.0,
    )
    _freeze_idle(unetr.vit)
    return unetr


def _vit(network: Network, patch_size: Sequence[int]) -> dict[str, Any]:
    """What both networks say of the ViT."""
    widths = network.model_dump(include={"hidden_size", "mlp_dim", "num_heads"})
    return {"in_channels": 1, "img_size": tuple(patch_size), "proj_type": "conv", **widths}


def _freeze_idle(vit: nn.Module) -> None:
    for name, parameter in vit.named_parameters():
        if IDLE.fullmatch(name):
            parameter.requires_grad_(False)
