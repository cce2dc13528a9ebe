"""Segments a whole volume with a network that sees patches."""

from collections.abc import Sequence

import torch
from monai.inferers import sliding_window_inference
from torch import Tensor, nn

from ssl_ray.training.precision import autocast


def predict(
    model: nn.Module,
    image: Tensor,
    patch_size: Sequence[int],
    *,
    sliding_window_batch: int,
    overlap: float,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Segment one volume with MONAI's sliding window: mean of the logits of overlapping windows, then argmax.

    The model computes `sliding_window_batch` windows at a time on its own device. Their logits are added up on the
    image's device and take about 4 * (classes + 1) bytes a voxel there: leave the image on the CPU where that is too
    much for the GPU. The model predicts in eval mode and is left in the mode that it came in, unless it raises.

    Args:
        model: (B, 1, *patch_size) float32 -> (B, classes, *patch_size) logits, for at most 256 classes.
        image: (X, Y, Z) float32 in 0..1; padded with 0 by MONAI where it is smaller than the patch.
        patch_size: voxels.
        sliding_window_batch: windows in one forward pass.
        overlap: of neighbouring windows, as a share of the patch side, 0 <= overlap < 1.
        dtype: that the model computes in.

    Returns:
        (X, Y, Z) uint8 on the image's device.
    """
    device, training = next(model.parameters()).device, model.training
    model.eval()
    with torch.inference_mode(), autocast(device, dtype):
        volume = sliding_window_inference(
            image[None, None],
            tuple(patch_size),
            sliding_window_batch,
            model,
            overlap=overlap,
            sw_device=device,
            device=image.device,
        )
    model.train(training)
    # Plane by plane, as the int64 indices of a whole volume would add 8 bytes a voxel. `max` takes a third of the time
    # that `argmax` takes on a CPU.
    return torch.stack([plane.max(0).indices.to(torch.uint8) for plane in volume[0].unbind(1)])
