"""What a pretraining task is: what it draws, what the network is shown, its loss, what is validated and pictured.

A task's module has one function, `build_task(settings, network, patch_size, channels) -> Task`.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor, nn

from ssl_ray.networks.protocol import Encoder


class Task(nn.Module):
    """A network in self-supervised training. Patches are (B, C, X, Y, Z) float32; `views` of each are trained on.

    network: what is trained, checkpointed and exported.
    encoder: what segmentation takes over: the network itself, or its `encoder`.
    blocks: the encoder's and a decoder's, which FSDP shards one by one.
    parts: the modules that a forward pass calls, compiled one by one; `objective` is what follows the last block.
    """

    views: int = 1

    def __init__(self, network: nn.Module, objective: nn.Module, decoding: Sequence[nn.Module] = ()) -> None:
        super().__init__()
        self.network, self.objective = network, objective
        encoder: Any = getattr(network, "encoder", network)
        self.encoder: Encoder = encoder
        self.blocks = [*self.encoder.blocks, *decoding]
        self.parts = [*self.encoder.parts, *decoding, objective]

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

    def tokens(self, patches: Tensor) -> Tensor:
        """What the encoder makes of all of a patch, (B, N, hidden_size); with FSDP all ranks must call it."""
        return self.encoder.encode(self.encoder.embed(patches))

    def validate(self, seen: Tensor, clean: Tensor) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Losses of one view, and rows of a picture; without compiled parts, and with FSDP all ranks must call it.

        Losses are means over the patches, float64: `loss`, by which weights are selected, and the same of a prediction
        that nothing was learned for, `identity_loss` or `mean_loss`. Rows are (B, C, X, Y, Z): the truth, what the
        network saw, what it made of it, and what else helps to judge it. NaN is drawn in blue.
        """
        raise NotImplementedError
