"""Networks by their kind, whose module is imported when one is built, and not before."""

from collections.abc import Sequence
from importlib import import_module
from typing import Any

from torch import nn

from ssl_ray.config.schema import Network
from ssl_ray.networks.protocol import Autoencoder, Encoder


def build_encoder(network: Network, patch_size: Sequence[int], channels: int = 1) -> Encoder:
    """From patches (B, channels, *patch_size) to tokens, alone."""
    return _module(network).build_encoder(network, patch_size, channels)  # type: ignore[no-any-return]


def build_autoencoder(network: Network, patch_size: Sequence[int], channels: int = 1) -> Autoencoder:
    """The same encoder, and the network's decoder of its tokens to patches."""
    return _module(network).build_autoencoder(network, patch_size, channels)  # type: ignore[no-any-return]


def build_segmentation(network: Network, patch_size: Sequence[int], channels: int, classes: int) -> nn.Module:
    """From patches to logits (B, classes, *patch_size)."""
    return _module(network).build_segmentation(network, patch_size, channels, classes)  # type: ignore[no-any-return]


def monai_segmentation(
    network: Network, patch_size: Sequence[int], channels: int, classes: int
) -> tuple[str, dict[str, Any]] | None:
    """The class of `monai.networks.nets` that is the same network to segment with, and its arguments; None: of none."""
    module = _module(network)
    name = getattr(module, "MONAI_CLASS", None)
    return (name, module.monai_options(network, patch_size, channels, classes)) if name else None


def _module(network: Network) -> Any:
    return import_module(f"ssl_ray.networks.{network.kind}.network")
