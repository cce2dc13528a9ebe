"""Which module makes which kind of network: it is imported when a network is built, and not before."""

from collections.abc import Sequence
from importlib import import_module
from types import ModuleType

from torch import nn

from ssl_ray.config.schema import Network
from ssl_ray.networks.protocol import Autoencoder, Encoder

_MODULES = {
    "unetr": "ssl_ray.networks.unetr.network",
    "primus": "ssl_ray.networks.primus.network",
    "dynunet": "ssl_ray.networks.dynunet.network",
}


def build_encoder(network: Network, patch_size: Sequence[int], channels: int = 1) -> Encoder:
    """From patches (B, channels, *patch_size) to tokens, alone."""
    encoder: Encoder = _module(network).build_encoder(network, patch_size, channels)
    return encoder


def build_autoencoder(network: Network, patch_size: Sequence[int], channels: int = 1) -> Autoencoder:
    """The same encoder, and the network's decoder of its tokens to patches."""
    autoencoder: Autoencoder = _module(network).build_autoencoder(network, patch_size, channels)
    return autoencoder


def build_segmentation(network: Network, patch_size: Sequence[int], channels: int, classes: int) -> nn.Module:
    """From patches to logits (B, classes, *patch_size); a `Segmenter` where the network can be pretrained."""
    segmentation: nn.Module = _module(network).build_segmentation(network, patch_size, channels, classes)
    return segmentation


def _module(network: Network) -> ModuleType:
    return import_module(_MODULES[network.kind])
