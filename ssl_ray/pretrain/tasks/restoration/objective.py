"""The autoencoder in training: corrupted views and their clean patches in, losses out."""

from collections.abc import Sequence

import torch
from monai.networks.nets import ViTAutoEnc
from torch import Tensor, nn
from torch.nn import functional

from ssl_ray.config.schema import VIT_PATCH, Contrastive


class Restoration(nn.Module):
    """L1 between patches and their restorations, and with two views a contrastive loss between these.

    It computes what `ViTAutoEnc.forward` does, in parts that can be compiled one by one: all blocks share one graph.
    """

    def __init__(self, network: ViTAutoEnc, contrastive: Contrastive) -> None:
        super().__init__()
        self.embedding, self.blocks = network.patch_embedding, network.blocks
        self.objective = _Objective(network, contrastive)

    def forward(self, corrupted: Tensor, clean: Tensor) -> tuple[Tensor, Tensor]:
        """(views * B, C, X, Y, Z) and (B, C, X, Y, Z) -> mean L1 of the first view, and what is minimised."""
        losses = self.objective(self._tokens(corrupted), clean)
        return losses[0], losses[-1]

    def restore(self, corrupted: Tensor) -> Tensor:
        """(B, C, X, Y, Z) -> the same, float32."""
        restored: Tensor = self.objective.restore(self._tokens(corrupted), corrupted.shape[2:])
        return restored

    def _tokens(self, corrupted: Tensor) -> Tensor:
        tokens: Tensor = self.embedding(corrupted)
        for block in self.blocks:
            tokens = block(tokens)
        return tokens


class _Objective(nn.Module):
    """What follows the last block: the decoder and the losses."""

    def __init__(self, network: ViTAutoEnc, contrastive: Contrastive) -> None:
        super().__init__()
        self.norm, self.contrastive = network.norm, contrastive
        self.up, self.up_1 = network.conv3d_transpose, network.conv3d_transpose_1

    def forward(self, tokens: Tensor, clean: Tensor) -> tuple[Tensor, ...]:
        restored = self.restore(tokens, clean.shape[2:])
        loss = (restored[: len(clean)] - clean).abs().mean()
        if not self.contrastive.enabled:
            return (loss,)
        first, second = restored.flatten(1).chunk(2)
        return loss, loss + contrastive_loss(first, second, self.contrastive.temperature) * loss

    def restore(self, tokens: Tensor, side: Sequence[int]) -> Tensor:
        grid = [length // VIT_PATCH for length in side]
        volumes = self.norm(tokens).transpose(1, 2).reshape(len(tokens), -1, *grid)
        restored: Tensor = self.up_1(self.up(volumes)).float()
        return restored


def contrastive_loss(first: Tensor, second: Tensor, temperature: float) -> Tensor:
    """NT-Xent (Chen et al. 2020, arXiv:2002.05709) between the restorations of two views, both (B, D).

    The same number as MONAI's `ContrastiveLoss`, which broadcasts to (2 B, 2 B, D): on flattened 96³ restorations that
    is 0.9 GB an intermediate result at B = 8, and 58 GB at B = 64. Negatives come from this batch only, also in a group
    of workers, as in the published script.
    """
    with torch.autocast(first.device.type, enabled=False):  # bfloat16 rounds a cosine by up to 0.002, a logit by 0.04
        units = functional.normalize(torch.cat([first, second]).float(), dim=1)  # (2 B, D)
        logits = (units @ units.T / temperature).fill_diagonal_(-torch.inf)
        partner = torch.arange(len(logits), device=logits.device).roll(len(first))
        return functional.cross_entropy(logits, partner)
