"""Faster ways to compute the same networks: parameters, their names and the results to rounding stay.

Which of them is faster depends on the device, so the networks' builders use none, and each learner chooses.
"""

import math
from functools import cache
from pathlib import Path

import torch
from einops import rearrange
from monai.networks.blocks.selfattention import SABlock
from torch import Tensor, nn
from torch.backends import mkl, mkldnn

_CPUS, _ZEN_5 = Path("/proc/cpuinfo"), 26
"""Where Linux says which processors there are, and AMD's number of a family of them."""


def place(network: nn.Module, device: torch.device) -> None:
    """Move a segmentation network to a device, in place, where it is then computed in the fastest way known."""
    # The convolutional decoder is most of a step, and 1.1 to 1.25 times as fast in this memory layout.
    network.to(device, memory_format=torch.channels_last_3d)  # type: ignore[call-overload]
    if device.type == "cuda":
        use_fast_attention(network)
    use_onednn(network)


@cache
def mkl_is_narrow() -> bool:
    """Whether MKL, in which torch multiplies matrices of float32, uses half of this CPU, and oneDNN all of it.

    MKL takes instructions of 512 bits on Intel's processors alone. AMD's have units of that width since Zen 5.
    """
    if not (mkl.is_available() and mkldnn.is_available() and torch.backends.cpu.get_cpu_capability() == "AVX512"):
        return False
    lines = _CPUS.read_text().splitlines() if _CPUS.is_file() else []
    facts = {name.strip(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
    return facts.get("vendor_id") == "AuthenticAMD" and int(facts["cpu family"]) >= _ZEN_5


def use_onednn(module: nn.Module) -> None:
    """Compute linear layers by oneDNN where that is faster: on a CPU where `mkl_is_narrow`, in float32; in place.

    It multiplies at 250 GFLOP/s a core there, MKL at 107, and a step of the recipe's ViTAutoEnc takes 0.6 of the time.
    """
    for layer in module.modules():
        if type(layer) is nn.Linear:
            layer.__class__ = _Linear


def use_fast_attention(module: nn.Module) -> None:
    """Switch every self-attention block in `module` to torch's fused kernel, in place.

    Meant for GPUs: on a CPU under bfloat16 autocast the fused kernel takes up to twice the time of MONAI's two matrix
    products, and in float32 both take about the same. Meant for networks without dropout, as the builders' are:
    MONAI 1.6 has the kernel drop attention weights in evaluation too.
    """
    for block in module.modules():
        if isinstance(block, SABlock):
            block.__class__ = _FastAttention


def use_patch_products(module: nn.Module) -> None:
    """Compute convolutions whose stride is their kernel as the matrix products that they are, in place.

    In the builders' networks these are the patch embedding and all transposed convolutions, none of them padded. On a
    CPU this takes half the time in bfloat16, and in float32 up to 1.5 times the time where MKL multiplies, and less
    where oneDNN does.
    """
    for layer in module.modules():
        if isinstance(layer, nn.Conv3d | nn.ConvTranspose3d) and layer.kernel_size == layer.stride != (1, 1, 1):
            layer.__class__ = _PatchConv if isinstance(layer, nn.Conv3d) else _PatchConvTranspose


def _product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    # Under autocast torch takes oneDNN itself, and its compiler knows no tensors in oneDNN's own layout.
    other = torch.compiler.is_compiling() or x.device.type != "cpu" or torch.is_autocast_enabled("cpu")
    if other or not mkl_is_narrow():
        return nn.functional.linear(x, weight, bias)
    return nn.functional.linear(x.to_mkldnn(), weight, bias).to_dense()


class _Linear(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return _product(x, self.weight, self.bias)


class _FastAttention(SABlock):
    # MONAI indexes q, k and v out of one tensor, so that backward fills and adds three tensors of its size.
    def forward(self, x: Tensor, attn_mask: Tensor | None = None) -> Tensor:
        q, k, v = [part.unflatten(2, (self.num_heads, -1)).transpose(1, 2) for part in self.qkv(x).chunk(3, dim=2)]
        x = nn.functional.scaled_dot_product_attention(q, k, v, attn_mask, scale=self.scale)  # (B, heads, tokens, d)
        mixed: Tensor = self.out_proj(x.transpose(1, 2).flatten(2))
        return mixed


class _PatchConv(nn.Conv3d):
    def forward(self, x: Tensor) -> Tensor:
        p, q, r = self.kernel_size
        patches = rearrange(x, "b c (x p) (y q) (z r) -> b (x y z) (c p q r)", p=p, q=q, r=r)
        tokens = _product(patches, self.weight.flatten(1), self.bias)
        return tokens.transpose(1, 2).reshape(len(x), -1, x.shape[2] // p, x.shape[3] // q, x.shape[4] // r)


class _PatchConvTranspose(nn.ConvTranspose3d):
    def forward(self, x: Tensor, output_size: list[int] | None = None) -> Tensor:
        sides = dict(zip("xyzpqr", (*x.shape[2:], *self.kernel_size), strict=True))
        bias = None if self.bias is None else self.bias.repeat_interleave(math.prod(self.kernel_size))
        voxels = _product(x.flatten(2).transpose(1, 2), self.weight.flatten(1).T, bias)
        whole: Tensor = rearrange(voxels, "b (x y z) (c p q r) -> b c (x p) (y q) (z r)", **sides)
        return whole
