"""ViTAutoEnc and UNETR, and faster ways to compute them.

Both hold the same ViT under the same names, so that `weights.transfer` between them is a copy.
"""

import math
from collections.abc import Sequence

from monai.networks.blocks.selfattention import SABlock
from monai.networks.nets import UNETR, ViTAutoEnc
from torch import Tensor, nn

from ssl_ray.config.schema import VIT_LAYERS, VIT_PATCH, Network
from ssl_ray.networks.transfer import IDLE


def build_autoencoder(network: Network, patch_size: Sequence[int]) -> ViTAutoEnc:
    """The network that restores corrupted patches: a ViT and two transposed convolutions.

    It takes (batch, 1, *patch_size) and returns the restored patches of the same shape, and the tokens
    (batch, tokens, hidden_size) after each block. The settings are those of the tutorial vit_unetr_ssl of Project
    MONAI. Parameters that no loss reaches are frozen, so that DDP need not search for unused ones.

    Args:
        network: the width of the ViT.
        patch_size: voxels, each side a multiple of `VIT_PATCH`.
    """
    autoencoder = ViTAutoEnc(
        in_channels=1,
        img_size=tuple(patch_size),
        patch_size=(VIT_PATCH,) * 3,
        out_channels=1,
        deconv_chns=16,
        hidden_size=network.hidden_size,
        mlp_dim=network.mlp_dim,
        num_layers=VIT_LAYERS,
        num_heads=network.num_heads,
        proj_type="conv",
    )
    _freeze_idle(autoencoder)
    return autoencoder


def build_unetr(network: Network, patch_size: Sequence[int], classes: int) -> UNETR:
    """The segmentation network (Hatamizadeh et al., UNETR, WACV 2022).

    It takes (batch, 1, *patch_size) and returns logits (batch, classes, *patch_size). The settings are those of the
    tutorial vit_unetr_ssl of Project MONAI; idle parameters are frozen as in `build_autoencoder`.

    Args:
        network: the widths of the ViT and of the convolutional decoder.
        patch_size: voxels, each side a multiple of `VIT_PATCH`.
        classes: output channels, background included.
    """
    unetr = UNETR(
        in_channels=1,
        out_channels=classes,
        img_size=tuple(patch_size),
        feature_size=network.feature_size,
        hidden_size=network.hidden_size,
        mlp_dim=network.mlp_dim,
        num_heads=network.num_heads,
        proj_type="conv",
        norm_name="instance",
        conv_block=True,
        res_block=True,
        dropout_rate=0.0,
    )
    _freeze_idle(unetr.vit)
    return unetr


def use_fast_attention(module: nn.Module) -> None:
    """Switch every self-attention block in `module` to torch's fused kernel, in place; the results are the same.

    The builders do not: on a CPU under bfloat16 autocast the fused kernel takes up to twice the time of MONAI's two
    matrix products, and in float32 both take about the same. Meant for networks without dropout, as the builders' are:
    MONAI 1.6 has the kernel drop attention weights in evaluation too.
    """
    for block in module.modules():
        if isinstance(block, SABlock):
            block.use_flash_attention = True
            block.__class__ = _FastAttention


def use_patch_products(module: nn.Module) -> None:
    """Compute convolutions whose kernel is their stride as what they are, matrix products, in place.

    In the builders' networks those are the patch embedding and all transposed convolutions, none of them padded.
    Parameters and their names stay, and the results are the same to rounding. In bfloat16 it takes half the time on a
    CPU, in float32 up to 1.5 times.
    """
    for layer in module.modules():
        if isinstance(layer, nn.Conv3d | nn.ConvTranspose3d) and layer.kernel_size == layer.stride != (1, 1, 1):
            layer.__class__ = _PatchConv if isinstance(layer, nn.Conv3d) else _PatchConvTranspose


class _FastAttention(SABlock):
    # MONAI takes q, k and v out of one tensor by index; backward then fills and adds three tensors of its size.
    def forward(self, x: Tensor, attn_mask: Tensor | None = None) -> Tensor:
        q, k, v = [part.unflatten(2, (self.num_heads, -1)).transpose(1, 2) for part in self.qkv(x).chunk(3, dim=2)]
        x = nn.functional.scaled_dot_product_attention(q, k, v, attn_mask, scale=self.scale)  # (B, heads, tokens, d)
        mixed: Tensor = self.out_proj(x.transpose(1, 2).flatten(2))
        return mixed


class _PatchConv(nn.Conv3d):
    def forward(self, x: Tensor) -> Tensor:
        (p, q, r), (batch, channels, *sides) = self.kernel_size, x.shape
        grid = [side // width for side, width in zip(sides, self.kernel_size, strict=True)]
        patches = x.view(batch, channels, grid[0], p, grid[1], q, grid[2], r).permute(0, 2, 4, 6, 1, 3, 5, 7)
        patches = patches.reshape(batch, math.prod(grid), channels * p * q * r)
        tokens = nn.functional.linear(patches, self.weight.flatten(1), self.bias)
        return tokens.transpose(1, 2).reshape(batch, -1, *grid)


class _PatchConvTranspose(nn.ConvTranspose3d):
    def forward(self, x: Tensor, output_size: list[int] | None = None) -> Tensor:
        (p, q, r), (batch, _, *grid) = self.kernel_size, x.shape
        bias = None if self.bias is None else self.bias.repeat_interleave(p * q * r)
        voxels = nn.functional.linear(x.flatten(2).transpose(1, 2), self.weight.flatten(1).T, bias)
        voxels = voxels.view(batch, *grid, self.out_channels, p, q, r).permute(0, 4, 1, 5, 2, 6, 3, 7)
        return voxels.reshape(batch, self.out_channels, grid[0] * p, grid[1] * q, grid[2] * r)


def _freeze_idle(vit: nn.Module) -> None:
    for name, parameter in vit.named_parameters():
        if IDLE.fullmatch(name):
            parameter.requires_grad_(False)
