"""What is asked of a network: an encoder of tokens, an autoencoder around one, a network that segments with one.

A network's module has three builders: `build_encoder(settings, patch_size, channels) -> Encoder`,
`build_autoencoder(settings, patch_size, channels) -> Autoencoder`, which holds the encoder under the same names, and
`build_segmentation(settings, patch_size, channels, classes) -> Segmenter`. One that is never pretrained has the last
alone, and returns any module from (B, C, X, Y, Z) to logits (B, classes, X, Y, Z), background included.

A file of pretrained weights has the encoder's names as they are (an autoencoder's) or behind `encoder.` (of a task that
builds a network of its own around the encoder); `transfer` takes either.
"""

import re
from collections.abc import Mapping, Sequence

from torch import Tensor, nn


class Encoder(nn.Module):
    """From patches to tokens, in the steps between which a task can drop tokens or look at them.

    token: sides of a token in voxels. The tokens of a patch are in C order of their grid, z fastest.
    hidden_size: width of a token.
    blocks: the transformer blocks; with FSDP each is sharded by itself.
    positions: name of the parameter with absolute positions, (1, N, hidden_size); no other name ends with it.
    beside: what the names of an autoencoder's other parameters begin with.
    idle: names of parameters that no loss reaches, which other releases have or lack.
    """

    token: tuple[int, int, int]
    hidden_size: int
    blocks: nn.ModuleList
    positions: str
    beside: tuple[str, ...]
    idle: re.Pattern[str] = re.compile(r"(?!)")

    @property
    def settings(self) -> Mapping[str, object]:
        """What it was built with, by the names in the settings and the metadata of weights; shapes do not show all."""
        raise NotImplementedError

    @property
    def parts(self) -> list[nn.Module]:
        """The modules that `embed` and `encode` call; `torch.compile` takes them one by one."""
        raise NotImplementedError

    def grid(self, patch_size: Sequence[int]) -> tuple[int, int, int]:
        """Numbers of tokens along the sides of a patch (X, Y, Z)."""
        x, y, z = (side // length for side, length in zip(patch_size, self.token, strict=True))
        return x, y, z

    def embed(self, x: Tensor) -> Tensor:
        """(B, C, X, Y, Z) -> (B, N, hidden_size), absolute positions added where the network has them."""
        raise NotImplementedError

    def encode(self, tokens: Tensor, places: Tensor | None = None) -> Tensor:
        """(B, n, hidden_size) -> the same, through all blocks and the final norm.

        `places` (B, n) int64: which tokens of the grid these are, for positions that blocks look up; None: all, n = N.
        """
        raise NotImplementedError

    def build_decoder(
        self, patch_size: Sequence[int], hidden_size: int, mlp_dim: int, num_heads: int, layers: int
    ) -> "TokenDecoder":
        """Blocks of this network's kind, of a width of their own; weights that no loss reaches are frozen."""
        raise NotImplementedError


class TokenDecoder(nn.Module):
    """Transformer blocks over all tokens of a patch, with positions and a final norm: (B, N, hidden_size) -> same."""

    blocks: nn.ModuleList


class Autoencoder(Encoder):
    """An encoder and the network's own decoder of its tokens, to voxels."""

    def decode(self, tokens: Tensor, patch_size: Sequence[int]) -> Tensor:
        """What `encode` returned, (B, N, hidden_size) -> (B, C, X, Y, Z)."""
        raise NotImplementedError


class Segmenter(nn.Module):
    """A segmentation network around an encoder: (B, C, X, Y, Z) -> logits (B, classes, X, Y, Z).

    feat_size: numbers of tokens along the sides of the patches that it is built for (MONAI's name).
    """

    encoder: Encoder
    feat_size: tuple[int, int, int]
