"""What a pretraining task is: what it draws, what the network is shown, its loss, what is validated and pictured.

A task's module has one function, `build_task(settings, network, patch_size, channels) -> Task`.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from torch import Tensor, nn

from ssl_ray.networks.protocol import Encoder, TokenDecoder


@dataclass(frozen=True)
class Validation:
    """What came of some validation patches.

    losses: means over the patches, float64: `loss`, by which weights are selected, and the same of a prediction that
        nothing was learned for, under a name that says which: `identity_loss` or `mean_loss`.
    rows: of the picture, by their names, each (B, C, X, Y, Z): the truth, what the network saw, what it made of it, and
        what else helps to judge it. NaN is left blank.
    """

    losses: dict[str, Tensor]
    rows: dict[str, Tensor]


class Objective(nn.Module):
    """What follows the last block, compiled as one.

    `network` is what is trained, checkpointed and exported: an encoder, or what has one under the name `encoder`.
    """

    network: nn.Module


class Task(nn.Module):
    """A network in self-supervised training. Patches are (B, C, X, Y, Z) float32; `views` of each are trained on."""

    views: int = 1

    def __init__(self, objective: Objective) -> None:
        super().__init__()
        self.objective = objective
        decoders = [module for module in self.network.modules() if isinstance(module, TokenDecoder)]
        decoding = [block for decoder in decoders for block in decoder.blocks]
        self.blocks = [*self.encoder.blocks, *decoding]  # with FSDP sharded one by one
        self.parts = [*self.encoder.parts, *decoding, objective]  # compiled one by one

    @property
    def network(self) -> nn.Module:
        """What is trained, checkpointed and exported."""
        return self.objective.network

    @property
    def encoder(self) -> Encoder:
        """What segmentation takes over."""
        encoder: Encoder = getattr(self.network, "encoder", self.network)
        return encoder

    def draw(self, seed: int, indices: NDArray[np.int64], view: int) -> Tensor:
        """On the host: all that is random about one view of the samples `indices` (B,), as a table (B, width), int64.

        Each row is a function of (seed, index, view) alone, and `width` of the settings.
        """
        raise NotImplementedError

    def see(self, clean: Tensor, tables: Sequence[Tensor]) -> Tensor:
        """On the device: what `forward` is given, from patches and a table a view. Part of a step's CUDA graph, as
        `forward` is: no shape depends on what was drawn, and the host waits for nothing.
        """
        raise NotImplementedError

    def forward(self, seen: Tensor, clean: Tensor) -> tuple[Tensor, Tensor]:
        """The loss that is reported and the one that is minimised, means over the patches."""
        raise NotImplementedError

    def validate(self, seen: Tensor, clean: Tensor) -> Validation:
        """The same for one view, without compiled parts; with FSDP all ranks must call it."""
        raise NotImplementedError
