"""What is asked of a network: an encoder of tokens, an autoencoder around one, a network that segments with one.

A network's module has `build_encoder(settings, patch_size, channels) -> Encoder`; `build_autoencoder` of the same ->
`Autoencoder`, which holds the encoder under the same names; and `build_segmentation(settings, patch_size, channels,
classes)`, from (B, C, X, Y, Z) to logits (B, classes, X, Y, Z), background included, with an `Encoder` as `encoder`. A
network that is never pretrained has the last alone, and no encoder.

A file of pretrained weights has the encoder's names as they are (an autoencoder's) or behind `encoder.` (of a task that
builds a network of its own around the encoder); `transfer` takes either.
"""

import re
from collections.abc import Mapping

from torch import Tensor, nn


class Encoder(nn.Module):
    """From patches to tokens, in the steps between which a task can drop tokens or look at them.

    settings: what it was built with, as in the metadata of weights; shapes do not show all of it.
    token: side of a token in voxels.
    grid: numbers of tokens along the sides of the patches that it is built for. Tokens are in its C order, z fastest.
    hidden_size: width of a token.
    blocks: the transformer blocks; with FSDP each is sharded by itself.
    positions: name of the parameter with absolute positions, (1, N, hidden_size); no other name ends with it.
    beside: what the names of an autoencoder's other parameters begin with.
    idle: names of parameters that no loss reaches, which other releases have or lack.
    """

    settings: Mapping[str, object]
    token: int
    grid: tuple[int, int, int]
    hidden_size: int
    patch_embedding: nn.Module
    blocks: nn.ModuleList
    norm: nn.Module
    positions: str
    beside: tuple[str, ...]
    idle: re.Pattern[str] = re.compile(r"(?!)")

    @property
    def parts(self) -> list[nn.Module]:
        """The modules that `embed` and `encode` call; `torch.compile` takes them one by one."""
        return [self.patch_embedding, *self.blocks, self.norm]

    def embed(self, x: Tensor) -> Tensor:
        """(B, C, X, Y, Z) -> (B, N, hidden_size), absolute positions added where the network has them."""
        raise NotImplementedError

    def encode(self, tokens: Tensor, places: Tensor | None = None) -> Tensor:
        """(B, n, hidden_size) -> the same, through all blocks and the final norm.

        `places` (B, n) int64: which tokens of the grid these are, for positions that blocks look up; None: all, n = N.
        """
        raise NotImplementedError


class Autoencoder(Encoder):
    """An encoder and the network's own decoder of its tokens, to voxels."""

    def decode(self, tokens: Tensor) -> Tensor:
        """What `encode` returned, (B, N, hidden_size) -> (B, C, X, Y, Z)."""
        raise NotImplementedError
