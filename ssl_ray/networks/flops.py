"""Floating-point operations of the networks, and what devices can do: the two sides of a utilisation (MFU)."""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

from ssl_ray.config.schema import VIT_LAYERS, VIT_PATCH, Network


@dataclass(frozen=True)
class Flops:
    """Floating-point operations of one view: matrix products and convolutions, a multiply-add counts as two."""

    forward: float
    training: float
    """Forward and backward; less than three times `forward`, as no gradient of the input is needed."""


def autoencoder_flops(network: Network, patch_size: Sequence[int]) -> Flops:
    """Of `networks.build_autoencoder`: 40.1 GFLOP forward for ViT-B on 96³."""
    hidden, kernel = network.hidden_size, 4  # each of the two transposed convolutions makes a voxel 4³
    tokens = math.prod(side // VIT_PATCH for side in patch_size)
    embedding = 2 * tokens * VIT_PATCH**3 * hidden
    block = 2 * tokens * hidden * (4 * hidden + 2 * network.mlp_dim) + 4 * tokens**2 * hidden
    decoder = 2 * tokens * hidden * 16 * kernel**3 + 2 * tokens * kernel**3 * 16 * kernel**3
    forward = embedding + VIT_LAYERS * block + decoder
    return Flops(float(forward), float(3 * forward - embedding))


@lru_cache(maxsize=8)
def unetr_flops(network: Network, patch_size: tuple[int, ...], classes: int) -> Flops:
    """Of `networks.build_unetr`: 146 GFLOP forward for ViT-B, feature size 16, on 96³.

    Counted, not derived, on tensors without content: it takes no memory and about a second.
    """
    import torch  # the command line names the devices without loading it
    from torch.utils.flop_counter import FlopCounterMode

    from ssl_ray.networks.unetr import build_unetr

    with torch.device("meta"):
        unetr = build_unetr(network, patch_size, classes)
        with FlopCounterMode(display=False) as forward:
            logits = unetr(torch.zeros(1, 1, *patch_size))
        with FlopCounterMode(display=False) as backward:
            logits.mean().backward()
    return Flops(float(forward.get_total_flops()), float(forward.get_total_flops() + backward.get_total_flops()))


@dataclass(frozen=True)
class Device:
    """A kind of GPU: peak of dense products in FLOP/s by the vendor's data sheet; None where it has no bfloat16."""

    name: str
    bfloat16: float | None
    float32: float

    def dtype(self, precision: str) -> str:
        """What `precision` means on it, as `precision.resolve` tells of a device that is there."""
        return "float32" if precision == "float32" or self.bfloat16 is None else "bfloat16"

    def peak(self, dtype: str) -> float:
        """FLOP/s in float32 or bfloat16."""
        return self.float32 if dtype == "float32" or self.bfloat16 is None else self.bfloat16


_T = 1e12
DEVICES = {
    "a10": Device("A10", 125 * _T, 31.2 * _T),
    "a10g": Device("A10G", 70 * _T, 31.5 * _T),
    "a40": Device("A40", 149.7 * _T, 37.4 * _T),
    "a100": Device("A100", 312 * _T, 19.5 * _T),
    "b200": Device("B200", 2250 * _T, 75 * _T),
    "h100": Device("H100 SXM", 989 * _T, 67 * _T),
    "h100-pcie": Device("H100 PCIe", 756 * _T, 51 * _T),
    "h200": Device("H200", 989 * _T, 67 * _T),
    "l4": Device("L4", 121 * _T, 30.3 * _T),
    "l40s": Device("L40S", 362 * _T, 91.6 * _T),
    "t4": Device("T4", None, 8.1 * _T),
    "v100": Device("V100", None, 15.7 * _T),
}
"""By the name that `--gpu` takes. float32 is that of the ordinary units: TF32 is not switched on."""


def known_device(name: str) -> Device | None:
    """The device of a name as `torch.cuda.get_device_name` gives it; None for one that is not in `DEVICES`."""
    words = re.split(r"[\s_-]+", name.lower())
    for key in sorted(DEVICES, key=len, reverse=True):
        if all(part in words for part in key.split("-")):
            return DEVICES[key]
    return None
