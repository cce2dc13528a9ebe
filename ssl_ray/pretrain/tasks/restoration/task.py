"""The autoencoder in training: corrupted views and their clean patches in, losses out."""

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

from ssl_ray.config.schema import Network
from ssl_ray.networks.protocol import Autoencoder
from ssl_ray.networks.registry import build_autoencoder
from ssl_ray.pretrain.tasks.protocol import Task
from ssl_ray.pretrain.tasks.restoration.corruption import corrupt, draw, draws_of
from ssl_ray.pretrain.tasks.restoration.settings import Contrastive, Restoration


def build_task(settings: Restoration, network: Network, patch_size: Sequence[int], channels: int) -> Task:
    """Restoration by the network's own autoencoder."""
    return RestorationTask(settings, build_autoencoder(network, patch_size, channels), patch_size)


class RestorationTask(Task):
    """L1 between patches and their restorations, and with two views a contrastive loss between these."""

    objective: "_Objective"

    def __init__(self, settings: Restoration, network: Autoencoder, patch_size: Sequence[int]) -> None:
        super().__init__(network, _Objective(network, settings.contrastive))
        self.corruption, self.patch_size = settings.corruption, patch_size
        self.views = 2 if settings.contrastive.enabled else 1

    def draw(self, seed: int, indices: NDArray[np.int64], view: int) -> Tensor:
        """Boxes, noise and shuffling of each sample, see `corruption.Draws`."""
        return draw(self.corruption, self.patch_size, seed, indices, view).table

    def see(self, clean: Tensor, tables: Sequence[Tensor]) -> Tensor:
        """Corrupted views, those of the first table before those of the second: (views * B, C, X, Y, Z)."""
        return torch.cat([corrupt(clean, draws_of(self.corruption, table)) for table in tables])

    def forward(self, seen: Tensor, clean: Tensor) -> tuple[Tensor, Tensor]:
        """Mean L1 of the first view, and what is minimised."""
        losses = self.objective(self.encoder.encode(self.encoder.embed(seen)), clean)
        return losses[0], losses[-1]

    def validate(self, seen: Tensor, clean: Tensor) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Beside the L1 that of predicting the corrupted patch itself."""
        restored = self.objective.restore(self.encoder.encode(self.encoder.embed(seen)))
        losses = {
            "loss": (restored - clean).abs().mean(dtype=torch.float64),
            "identity_loss": (seen - clean).abs().mean(dtype=torch.float64),
        }
        return losses, {"ground truth": clean, "corrupted": seen, "restored": restored}


class _Objective(nn.Module):
    def __init__(self, network: Autoencoder, contrastive: Contrastive) -> None:
        super().__init__()
        self.network, self.contrastive = network, contrastive

    def forward(self, tokens: Tensor, clean: Tensor) -> tuple[Tensor, ...]:
        restored = self.restore(tokens)
        loss = (restored[: len(clean)] - clean).abs().mean()
        if not self.contrastive.enabled:
            return (loss,)
        first, second = restored.flatten(1).chunk(2)
        return loss, loss + contrastive_loss(first, second, self.contrastive.temperature) * loss

    def restore(self, tokens: Tensor) -> Tensor:
        return self.network.decode(tokens).float()


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
