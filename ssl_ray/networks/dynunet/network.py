"""MONAI's DynUNet: nnU-Net's (Isensee et al. 2021), or with residual blocks (Isensee et al. 2024, arXiv:2404.09556)."""

from collections.abc import Sequence
from typing import Any

from monai.networks import nets
from torch import nn

from ssl_ray.networks.dynunet.settings import DynUnet


def build_segmentation(network: DynUnet, patch_size: Sequence[int], channels: int, classes: int) -> nn.Module:
    """(B, channels, X, Y, Z) -> logits (B, classes, X, Y, Z), of patches of any size that the levels divide.

    In training with deep supervision (B, levels, classes, X, Y, Z), the highest level first, all on the grid of voxels.
    """
    unet: nn.Module = nets.DynUNet(**monai_options(network, patch_size, channels, classes))
    # MONAI registers its blocks twice: a file of weights would have their tensors twice, which safetensors refuses.
    for name in ("input_block", "downsamples", "bottleneck", "upsamples", "deep_supervision_heads"):
        if hasattr(unet, name):
            delattr(unet, name)
    return unet


MONAI_CLASS = "DynUNet"


def monai_options(network: DynUnet, patch_size: Sequence[int], channels: int, classes: int) -> dict[str, Any]:
    """What MONAI's class is built with."""
    levels = len(network.filters)
    return {
        "spatial_dims": 3,
        "in_channels": channels,
        "out_channels": classes,
        "kernel_size": [3] * levels,
        "strides": [1] + [2] * (levels - 1),
        "upsample_kernel_size": [2] * (levels - 1),
        "filters": network.filters,
        "res_block": network.residual,
        "deep_supervision": network.deep_supervision,
        "deep_supr_num": max(1, levels - 3),
    }
