"""Floating-point operations of the networks, counted by torch on tensors without content.

The count is of the plain network's own matrix products and convolutions, a multiply-add as two operations. A faster way
to compute them would be counted wrongly: on a GPU, fused attention computes some of them twice, which is no work that a
utilisation (MFU) may claim, and on a CPU torch does not see it at all.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from ssl_ray.config.schema import Network
from ssl_ray.networks.unetr import build_autoencoder, build_unetr


@dataclass(frozen=True)
class Flops:
    """Floating-point operations of one view: of the forward pass, and of `training`, which is forward and backward.

    Training is less than three times the forward pass, as no gradient of the input is computed.
    """

    forward: int
    training: int


@lru_cache(maxsize=8)
def autoencoder_flops(network: Network, patch_size: tuple[int, ...]) -> Flops:
    """Of `build_autoencoder`: 40.1 GFLOP forward for ViT-B on 96³."""
    return _count(lambda: build_autoencoder(network, patch_size), patch_size)


@lru_cache(maxsize=8)
def unetr_flops(network: Network, patch_size: tuple[int, ...], classes: int) -> Flops:
    """Of `build_unetr`: 146 GFLOP forward for ViT-B and feature size 16 on 96³."""
    return _count(lambda: build_unetr(network, patch_size, classes), patch_size)


def _count(build: Callable[[], nn.Module], patch_size: tuple[int, ...]) -> Flops:
    """One step on a view (1, 1, *patch_size): no memory, and about half a second."""
    with torch.device("meta"):
        network = build()
        with FlopCounterMode(display=False) as forward:
            output = network(torch.empty(1, 1, *patch_size))
        restored = output[0] if isinstance(output, tuple) else output  # ViTAutoEnc returns its tokens too
        with FlopCounterMode(display=False) as backward:
            restored.sum().backward()
    return Flops(forward.get_total_flops(), forward.get_total_flops() + backward.get_total_flops())
