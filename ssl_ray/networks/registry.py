"""Which module makes which kind of network: it is imported when a network is built, and not before."""

from collections.abc import Sequence
from importlib import import_module
from typing import Protocol, cast

from torch import nn

from ssl_ray.config.schema import Network
from ssl_ray.networks.protocol import Autoencoder, Encoder

_MODULES = {
    "unetr": "ssl_ray.networks.unetr.network",
}


class _Builders(Protocol):
    def build_encoder(self, network: Network, patch_size: Sequence[int], channels: int) -> Encoder: ...

    def build_autoencoder(self, network: Network, patch_size: Sequence[int], channels: int) -> Autoencoder: ...

    def build_segmentation(
        self, network: Network, patch_size: Sequence[int], channels: int, classes: int
    ) -> nn.Module: ...


def build_encoder(network: Network, patch_size: Sequence[int], channels: int = 1) -> Encoder:
    """From patches (B, channels, *patch_size) to tokens, alone."""
    return _builders(network).build_encoder(network, patch_size, channels)


def build_autoencoder(network: Network, patch_size: Sequence[int], channels: int = 1) -> Autoencoder:
    """The same encoder, and the network's decoder of its tokens to patches."""
    return _builders(network).build_autoencoder(network, patch_size, channels)


def build_segmentation(network: Network, patch_size: Sequence[int], channels: int, classes: int) -> nn.Module:
    """From patches to logits (B, classes, *patch_size); a `Segmenter` where the network can be pretrained."""
    return _builders(network).build_segmentation(network, patch_size, channels, classes)


def _builders(network: Network) -> _Builders:
    return cast(_Builders, import_module(_MODULES[network.kind]))
