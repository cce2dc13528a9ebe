"""Prediction of whole volumes against MONAI's own sliding window."""

import pytest
import torch
from monai.inferers import sliding_window_inference
from torch import Tensor, nn

from ssl_ray.evaluate.sliding_window import predict


class Counting(nn.Module):
    """A convolution that keeps what it was called with."""

    def __init__(self, classes: int, kernel: int = 3) -> None:
        super().__init__()
        self.conv = nn.Conv3d(1, classes, kernel, padding=kernel // 2)
        self.dropout = nn.Dropout(0.9)
        self.batches: list[int] = []
        self.dtypes: set[torch.dtype] = set()

    def forward(self, windows: Tensor) -> Tensor:
        logits: Tensor = self.dropout(self.conv(windows))
        self.batches.append(len(windows))
        self.dtypes.add(logits.dtype)
        return logits


@pytest.fixture
def model() -> Counting:
    torch.manual_seed(0)
    return Counting(classes=5)


@pytest.mark.parametrize("shape", [(40, 33, 37), (20, 16, 40), (7, 9, 5)])
def test_prediction_is_monais_sliding_window(model: Counting, shape: tuple[int, int, int]) -> None:
    """Volumes larger, partly smaller and smaller than the patch get the labels of MONAI's own inference."""
    image = torch.rand(shape)
    labels = predict(model, image, (16, 16, 16), sliding_window_batch=3, overlap=0.25)
    model.eval()
    with torch.no_grad():
        logits = sliding_window_inference(image[None, None], (16, 16, 16), 3, model, overlap=0.25)
    assert labels.dtype == torch.uint8
    assert torch.equal(labels, logits[0].argmax(0).to(torch.uint8))


def test_prediction_of_a_voxelwise_model_needs_no_windows() -> None:
    """A 1x1x1 convolution gives the same labels in windows as on the whole volume."""
    torch.manual_seed(1)
    model = Counting(classes=4, kernel=1).eval()
    image = torch.rand(21, 18, 30)
    labels = predict(model, image, (16, 16, 16), sliding_window_batch=2, overlap=0.5)
    with torch.no_grad():
        assert torch.equal(labels.long(), model(image[None, None])[0].argmax(0))


def test_prediction_repeats_itself_and_leaves_the_mode(model: Counting) -> None:
    """Dropout is off in prediction, and a model in training mode is in training mode afterwards."""
    image = torch.rand(20, 20, 20)
    first, second = (predict(model.train(), image, (16,) * 3, sliding_window_batch=4, overlap=0.25) for _ in range(2))
    assert torch.equal(first, second)
    assert model.training


def test_window_batch_and_autocast_reach_the_model(model: Counting) -> None:
    """No forward pass sees more windows than asked for, and autocast decides their dtype."""
    image = torch.rand(40, 33, 37)
    for dtype in (torch.float32, torch.bfloat16):
        model.batches.clear()
        model.dtypes.clear()
        predict(model, image, (16, 16, 16), sliding_window_batch=3, overlap=0.25, dtype=dtype)
        assert max(model.batches) == 3
        assert model.dtypes == {dtype}
