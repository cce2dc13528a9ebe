"""Prediction of whole volumes against MONAI's own sliding window."""

from typing import Any

import pytest
import torch
from monai.inferers import sliding_window_inference
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

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


def monais(model: nn.Module, image: Tensor, patch: tuple[int, ...], batch: int, overlap: float) -> Tensor:
    """Argmax of MONAI's sums over the whole volume."""
    with torch.no_grad():
        logits = sliding_window_inference(image[None, None], patch, batch, model.eval(), overlap=overlap)
    labels: Tensor = logits[0].argmax(0).to(torch.uint8)
    return labels


@pytest.mark.parametrize("shape", [(40, 33, 37), (20, 16, 40), (21, 45, 19), (7, 9, 5), (16, 16, 16), (50, 12, 7)])
@pytest.mark.parametrize(("patch", "batch", "overlap"), [((16, 16, 16), 3, 0.25), ((8, 16, 12), 4, 0.6)])
def test_prediction_is_monais_sliding_window(
    model: Counting, shape: tuple[int, ...], patch: tuple[int, ...], batch: int, overlap: float
) -> None:
    """Volumes larger, partly smaller and smaller than the patch, long on any axis, get MONAI's labels."""
    image = torch.rand(shape)
    labels = predict(model, image[None], patch, sliding_window_batch=batch, overlap=overlap)
    assert labels.dtype == torch.uint8
    assert torch.equal(labels, monais(model, image, patch, batch, overlap))


def test_all_channels_reach_the_model() -> None:
    """Two channels, partly smaller than the patch, get the labels of MONAI's sliding window."""
    torch.manual_seed(5)
    image, model = torch.rand(2, 12, 33, 20), nn.Conv3d(2, 5, 3, padding=1)
    with torch.no_grad():
        logits = sliding_window_inference(image[None], (16, 16, 16), 3, model, overlap=0.25)
    labels = predict(model, image, (16, 16, 16), sliding_window_batch=3, overlap=0.25)
    assert torch.equal(labels, logits[0].argmax(0).to(torch.uint8))


class Ties(nn.Module):
    """Two pairs of classes that differ by rounding or not at all, in another way in every window."""

    def __init__(self, coarse: bool) -> None:
        super().__init__()
        self.scale, self.coarse = nn.Parameter(torch.ones(1)), coarse

    def forward(self, windows: Tensor) -> Tensor:
        base = windows * (self.scale + windows.mean((1, 2, 3, 4), keepdim=True))
        other = base + 1e-7 * torch.sin(1e4 * base)
        logits = torch.cat([base, other, base.flip(-1), base.flip(-2)], 1)
        return (logits * 4).round() / 4 if self.coarse else logits


@pytest.mark.parametrize("overlap", [0.0, 0.25, 0.5, 0.8])
def test_sums_and_ties_are_monais_to_the_bit_where_the_first_axis_is_the_longest(overlap: float) -> None:
    """Voxels whose best classes differ by one rounding get MONAI's label: the same sums, and the same division."""
    torch.manual_seed(2)
    image, model = torch.rand(41, 23, 30), Ties(coarse=False)
    labels = predict(model, image[None], (16, 12, 16), sliding_window_batch=3, overlap=overlap)
    assert torch.equal(labels, monais(model, image, (16, 12, 16), 3, overlap))
    assert set(labels.unique().tolist()) == {0, 1, 2, 3}


@pytest.mark.parametrize("shape", [(23, 41, 30), (23, 30, 41)])
def test_equal_classes_give_the_first_on_any_axis(shape: tuple[int, ...]) -> None:
    """Logits whose sums are exact in any order, as bfloat16's mostly are, with thousands of ties."""
    torch.manual_seed(3)
    image, model = torch.rand(shape), Ties(coarse=True)
    labels = predict(model, image[None], (16, 12, 16), sliding_window_batch=3, overlap=0.5)
    assert torch.equal(labels, monais(model, image, (16, 12, 16), 3, 0.5))


class Live(TorchFunctionMode):
    """Counts the bytes of all tensors that exist at once, of those that come out of a function or method of torch."""

    def __init__(self) -> None:
        super().__init__()
        self.storages: dict[int, tuple[StorageWeakRef, int]] = {}
        self.peak = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                storage = tensor.untyped_storage()
                self.storages[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
        self.storages = {key: one for key, one in self.storages.items() if not one[0].expired()}
        self.peak = max(self.peak, sum(size for _, size in self.storages.values()))
        return result


@pytest.mark.parametrize("axis", range(3))
def test_memory_does_not_grow_with_the_longest_axis(axis: int) -> None:
    """104 classes: beside image and labels, the peak is the same for a volume five times as long, and about a slab."""
    torch.manual_seed(4)
    peaks = []
    for length in (60, 300):
        shape = [12, 12, 12]
        shape[axis] = length
        model, image = Counting(classes=104, kernel=1), torch.rand(shape)
        with Live() as live:
            labels = predict(model, image[None], (8, 8, 8), sliding_window_batch=2, overlap=0.25)
        assert labels.shape == image.shape
        peaks.append(live.peak - image.nbytes - labels.nbytes)
    slab, windows = 104 * 8 * 12 * 12 * 4, 104 * 2 * 8**3 * 4
    assert abs(peaks[1] - peaks[0]) < 0.01 * slab
    assert peaks[1] < 1.1 * slab + 2 * windows


def test_prediction_repeats_itself_and_leaves_the_mode(model: Counting) -> None:
    """Dropout is off in prediction, and a model in training mode is in training mode afterwards."""
    image = torch.rand(20, 20, 20)
    model.train()
    first, second = (predict(model, image[None], (16,) * 3, sliding_window_batch=4, overlap=0.25) for _ in range(2))
    assert torch.equal(first, second)
    assert model.training


def test_window_batch_and_autocast_reach_the_model(model: Counting) -> None:
    """No forward pass sees more windows than asked for, and autocast decides their dtype."""
    image = torch.rand(40, 33, 37)
    for dtype in (torch.float32, torch.bfloat16):
        model.batches.clear()
        model.dtypes.clear()
        predict(model, image[None], (16, 16, 16), sliding_window_batch=3, overlap=0.25, dtype=dtype)
        assert max(model.batches) == 3
        assert model.dtypes == {dtype}
