"""Networks by their kind, whose module is imported when one is built, and not before."""

from collections.abc import Sequence
from importlib import import_module
from typing import Any

from torch import nn

from ssl_ray.config.schema import Network
from ssl_ray.networks.protocol import Autoencoder, Encoder


def build_encoder(network: Network, patch_size: Sequence[int], channels: int = 1) -> Encoder:
    """From patches (B, channels, *patch_size) to tokens, alone."""
    return module_of(network).build_encoder(network, patch_size, channels)  # type: ignore[no-any-return]


def build_autoencoder(network: Network, patch_size: Sequence[int], channels: int = 1) -> Autoencoder:
    """The same encoder, and the network's decoder of its tokens to patches."""
    return module_of(network).build_autoencoder(network, patch_size, channels)  # type: ignore[no-any-return]


def build_segmentation(network: Network, patch_size: Sequence[int], channels: int, classes: int) -> nn.Module:
    """From patches to logits (B, classes, *patch_size)."""
    return module_of(network).build_segmentation(network, patch_size, channels, classes)  # type: ignore[no-any-return]


def module_of(network: Network) -> Any:
    """The module of a kind of network, with the builders that `protocol.py` asks for."""
    return import_module(f"ssl_ray.networks.{network.kind}.network")
