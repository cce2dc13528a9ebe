"""Segments a whole volume with a network that sees patches."""

from collections.abc import Sequence

import torch
from monai.inferers import sliding_window_inference
from torch import Tensor, nn


def predict(
    model: nn.Module,
    image: Tensor,
    patch_size: Sequence[int],
    classes: int,
    *,
    sliding_window_batch: int,
    overlap: float,
    autocast: torch.dtype | None = None,
) -> Tensor:
    """Segment one volume with MONAI's sliding window: mean of the logits of overlapping windows, then argmax.

    The model computes `sliding_window_batch` windows at a time on its own device. Their logits are added up on the
    image's device and take about 4 * (classes + 1) bytes a voxel there: leave the image on the CPU where that is too
    much for the GPU. The model predicts in eval mode and is left in the mode that it came in.

    Args:
        model: (B, 1, *patch_size) float32 -> (B, classes, *patch_size) logits.
        image: (X, Y, Z) float32 in 0..1; padded with 0 by MONAI where it is smaller than the patch.
        patch_size: voxels.
        classes: organs + background, at most 256.
        sliding_window_batch: windows in one forward pass.
        overlap: of neighbouring windows, as a share of the patch side, 0 <= overlap < 1.
        autocast: dtype of mixed precision, e.g. `torch.bfloat16`; None computes in the model's own dtype.

    Returns:
        (X, Y, Z) uint8 on the image's device.

    Raises:
        ValueError: when the model predicts another number of classes than the cohort has.
    """
    device = next(model.parameters()).device

    def logits(windows: Tensor) -> Tensor:
        with torch.autocast(device.type, dtype=autocast, enabled=autocast is not None):
            output: Tensor = model(windows)
        if output.shape[1] != classes:
            raise ValueError(f"the model predicts {output.shape[1]} classes, but the cohort has {classes}")
        return output

    training = model.training
    model.eval()
    try:
        with torch.inference_mode():
            volume = sliding_window_inference(
                image[None, None],
                tuple(patch_size),
                sliding_window_batch,
                logits,
                overlap=overlap,
                sw_device=device,
                device=image.device,
            )
    finally:
        model.train(training)
    # Plane by plane, as the int64 indices of a whole volume would add 8 bytes a voxel. `max` takes a third of the time
    # that `argmax` takes on a CPU.
    return torch.stack([plane.max(0).indices.to(torch.uint8) for plane in volume[0].unbind(1)])
