"""What a trial trains: the network, its optimizer, one step of them, and the prediction of a volume."""

from collections.abc import Sequence
from pathlib import Path

import torch
from monai.losses import DiceCELoss
from torch import Tensor, nn

from ssl_ray.config.schema import Finetune, Network, SegmentationLoss
from ssl_ray.evaluate.sliding_window import predict
from ssl_ray.networks.faster import place
from ssl_ray.networks.protocol import Encoder
from ssl_ray.networks.registry import build_segmentation
from ssl_ray.networks.transfer import permute, transfer
from ssl_ray.networks.weight_files import load_metadata, load_weights
from ssl_ray.training.gpu import StepGraph, record
from ssl_ray.training.optimizer import build_optimizer, first_gradient, take_step
from ssl_ray.training.precision import autocast, resolve


class SegmentationLearner:
    """A network with its optimizer: takes steps and predicts volumes."""

    def __init__(
        self,
        config: Finetune,
        network: Network,
        device: torch.device,
        seed: int,
        weights: Path | None = None,
        permuted: bool = False,
    ) -> None:
        """Build the network by `seed`, with the encoder out of the file `weights` where one is given.

        `permuted`: shuffled within each of its tensors, as a control. The decoder does not depend on whether one is
        given. A UserError where the weights do not match the network.
        """
        self.config, self.device = config, device
        torch.manual_seed(seed)
        channels, classes = config.preparation.channels, config.cohort.classes
        self.network = build_segmentation(network, config.patch_size, channels, classes)
        if weights:
            transfer(load_weights(weights), self.network, str(weights), load_metadata(weights))
        encoder: Encoder | None = getattr(self.network, "encoder", None)
        if permuted and encoder:
            permute(encoder, seed)
        place(self.network, device)
        self.dtype = precision_of(config, network, device)
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)  # a process may have trained another trial before
        scales = layer_scales(encoder, config.encoder.layer_decay) if encoder else {}
        self._encoder = [weight for weight in scales if weight.requires_grad]
        self.optimizer = build_optimizer(config.optimizer, self.network.parameters(), scales)
        self.graphs = device.type == "cuda"
        self._graph: StepGraph | None = None
        self._go = torch.ones((), dtype=torch.bool, device=device)
        self.thaw(0)
        # Only the objective is compiled. Prediction calls the network itself, because its windows have other shapes.
        self.objective = _Objective(self.network, config.loss, device, self.dtype)
        if config.compile:
            self.objective.compile(dynamic=False)

    def thaw(self, step: int) -> None:
        """Train the encoder in step `step`, or not yet; Adam begins with it when it is first trained."""
        freeze = self.config.encoder.freeze
        trains = step >= freeze if isinstance(freeze, int) else freeze == "none"
        if any(weight.requires_grad != trains for weight in self._encoder):
            self._graph = None  # it is of a step that trains other weights
            for weight in self._encoder:
                weight.requires_grad_(trains)

    def step(self, images: Tensor, labels: Tensor, lr: float) -> tuple[Tensor, Tensor]:
        """One optimizer step on images (B, C, X, Y, Z) and labels (B, 1, X, Y, Z); on a GPU, one CUDA graph.

        Returns:
            The loss and the gradient norm, both on the device. If either is not finite, the returned norm is not, and
            the weights are those before the step.
        """
        images = images.to(self.device, non_blocking=True)
        if self.graphs and self._graph is None:
            self._graph = record(self._step, self.optimizer, self._go, images, [labels])
            self.graphs = self._graph is not None
        if self._graph:
            return self._graph(images, [labels], lr)
        return self._step(images, [labels.to(self.device, non_blocking=True)], lr)

    def predict(self, image: Tensor, levels: int = 1) -> Tensor:
        """Segment a volume (C, X, Y, Z), whose `levels` the network sees as 1: (X, Y, Z) uint8, on the device."""
        return predict(
            self.network,
            image.to(self.device),
            self.config.patch_size,
            sliding_window_batch=self.config.sliding_window_batch,
            overlap=self.config.sliding_window_overlap,
            dtype=self.dtype,
            levels=levels,
        )

    def _step(self, images: Tensor, labels: Sequence[Tensor], lr: float | Tensor) -> tuple[Tensor, Tensor]:
        loss: Tensor = self.objective(images, *labels)
        loss.backward(first_gradient(loss, self._go))
        return loss.detach(), take_step(self.optimizer, self.config.optimizer, lr)


def layer_scales(encoder: Encoder, decay: float) -> dict[nn.Parameter, float]:
    """Learning rate of each weight of an encoder, in multiples of the decoder's: `decay` ** layers above it.

    As for BEiT (Bao et al., ICLR 2022) and in MAE's `lr_decay.py`: none above the final norm, one above the last block,
    and the embedding counts as a layer below the first.
    """
    scales = dict.fromkeys(encoder.parameters(), decay ** (len(encoder.blocks) + 1))
    for below, block in enumerate([encoder.norm, *reversed(encoder.blocks)]):
        scales |= dict.fromkeys(block.parameters(), decay**below)
    return scales


def precision_of(config: Finetune, network: Network, device: torch.device) -> torch.dtype:
    """What a step computes in on a device."""
    if config.precision == "auto" and config.patch_size[0] <= network.thin:
        # Some convolutions are then two voxels deep. Their bfloat16 weight gradients, as oneDNN 3.12 (torch 2.13)
        # computes them on a CPU, come out of memory that it never wrote: other numbers every time, inf and nan among
        # them. On a GPU neither, so that a CPU may go on with the trial.
        return torch.float32
    return resolve(config.precision, device)


class _Objective(nn.Module):
    def __init__(self, network: nn.Module, loss: SegmentationLoss, device: torch.device, dtype: torch.dtype) -> None:
        super().__init__()
        self.network, self.device, self.dtype = network, device, dtype
        self.criterion = DiceCELoss(
            to_onehot_y=True, softmax=True, include_background=loss.include_background, batch=loss.batch
        )

    def forward(self, images: Tensor, labels: Tensor) -> Tensor:
        with autocast(self.device, self.dtype):
            logits = self.network(images)
        # Deep supervision: each level half as heavy as the one above it. (MONAI's loss cannot be in a CUDA graph.)
        levels = [logits] if logits.ndim == images.ndim else logits.unbind(1)  # (B, levels, classes, X, Y, Z)
        losses = [self.criterion(level.float(), labels) / 2**depth for depth, level in enumerate(levels)]
        return torch.stack(losses).sum()
