from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats
from torch import Tensor

from ssl_ray.networks.unetr.settings import Unetr
from ssl_ray.pretrain.tasks.masked.settings import Masked
from ssl_ray.pretrain.tasks.masked.task import MaskedTask, patches_of, tokens_of
from ssl_ray.pretrain.tasks.registry import build_task, task_cost
from ssl_ray.pretrain.tasks.restoration.settings import Restoration

SIZE = (32, 48, 64)
GRID = (2, 3, 4)
NETWORK = Unetr(hidden_size=48, mlp_dim=96, num_heads=3, feature_size=4)


def make(channels: int = 1, **settings: Any) -> MaskedTask:
    torch.manual_seed(0)
    task = build_task(Masked(decoder_layers=1, decoder_size=32, **settings), NETWORK, SIZE, channels)
    assert isinstance(task, MaskedTask)
    return task


def patches(count: int, channels: int = 1) -> Tensor:
    return torch.rand((count, channels, *SIZE), generator=torch.Generator().manual_seed(1))


def boxes() -> list[tuple[slice, ...]]:
    """Where each of the tokens lies in a patch."""
    corners = [16 * np.array(place) for place in np.ndindex(GRID)]
    return [tuple(slice(int(first), int(first) + 16) for first in corner) for corner in corners]


def test_an_order_is_a_function_of_seed_sample_and_view() -> None:
    """Alone or in any batch; another seed, sample or view gives another one. It holds every place once."""
    task = make()
    together = task.draw(5, np.array([3, 7, 9]), 0)
    assert together.dtype == torch.int64
    assert torch.equal(together.sort(dim=1).values, torch.arange(24).expand(3, -1))
    alone = [task.draw(5, np.array([index]), 0) for index in (3, 7, 9)]
    assert torch.equal(together, torch.cat(alone))
    others = [task.draw(6, np.array([3]), 0), task.draw(5, np.array([4]), 0), task.draw(5, np.array([3]), 1)]
    assert all(not torch.equal(alone[0], other) for other in others)


def test_every_token_is_seen_as_often() -> None:
    """A quarter of the draws, wherever it lies."""
    seen = make().draw(0, np.arange(4000), 0)[:, :6]
    assert stats.chisquare(torch.bincount(seen.flatten(), minlength=24).numpy()).pvalue > 0.01


@pytest.mark.parametrize(("ratio", "kept"), [(0.75, 6), (0.5, 12), (0.9, 2)])
def test_the_ratio_is_the_share_that_is_dropped(ratio: float, kept: int) -> None:
    """Of 24 tokens."""
    assert make(ratio=ratio).objective.kept == Masked(ratio=ratio).kept(24) == kept


def test_the_network_sees_nothing_of_what_is_dropped() -> None:
    """Other voxels there change no prediction; one seen voxel changes those of all tokens."""
    task, clean = make(), patches(1)
    order = task.draw(0, np.arange(1), 0)
    places = order[:, : task.objective.kept]
    made = task.network.predict(task.network(clean, places))
    assert made.shape == (1, 24, 16**3)
    other = clean.clone()
    for token in order[0, task.objective.kept :].tolist():
        other[(0, 0, *boxes()[token])] = 7
    assert torch.equal(task.network.predict(task.network(other, places)), made)
    other[(0, 0, *(box.start for box in boxes()[int(places[0, 0])]))] += 1
    assert (task.network.predict(task.network(other, places)) != made).any(dim=2).all()


@pytest.mark.parametrize("channels", [1, 2])
@pytest.mark.parametrize("normalise", [False, True])
@pytest.mark.parametrize("loss", ["l1", "l2"])
def test_the_loss_is_that_of_the_paper(loss: str, normalise: bool, channels: int) -> None:
    """As `forward_loss` of MAE's published code computes it, on tokens that are cut out one by one."""
    task, clean = make(channels, loss=loss, normalise=normalise), patches(3, channels)
    order = task.draw(0, np.arange(3), 0)
    with torch.no_grad():
        reported, minimised = task(task.see(clean, [order]), clean)
        predicted = task.network.predict(task.network(clean, order[:, : task.objective.kept]))
        target = torch.stack([clean[(slice(None), slice(None), *box)].flatten(1) for box in boxes()], dim=1)
        if normalise:
            mean, var = target.mean(dim=-1, keepdim=True), target.var(dim=-1, keepdim=True)
            target = (target - mean) / (var + 1.0e-6) ** 0.5
        difference = predicted - target
        each = (difference.abs() if loss == "l1" else difference**2).mean(dim=-1)  # (B, N)
        mask = torch.ones(3, 24).scatter(1, order[:, : task.objective.kept], 0)  # 0 is keep, 1 is remove
        expected = (each * mask).sum() / mask.sum()
        checked = task.validate(order, clean)[0]["loss"]
    torch.testing.assert_close(reported, expected)
    torch.testing.assert_close(checked.float(), expected)
    assert torch.equal(reported, minimised)


def test_the_baseline_is_the_mean_of_what_is_seen() -> None:
    """Where seen tokens are 0.2 in one channel and 0.6 in the other, and dropped ones 0.5: L1 is (0.3 + 0.1) / 2."""
    task, clean = make(2, loss="l1"), torch.full((1, 2, *SIZE), 0.5)
    order = task.draw(0, np.arange(1), 0)
    for token in order[0, : task.objective.kept].tolist():
        clean[(0, 0, *boxes()[token])], clean[(0, 1, *boxes()[token])] = 0.2, 0.6
    assert float(task.validate(order, clean)[0]["mean_loss"]) == pytest.approx(0.2, abs=1e-6)
    random = make(normalise=True, loss="l2").validate(task.draw(0, np.arange(2), 0), patches(2))[0]["mean_loss"]
    assert float(random) == pytest.approx(1, abs=1e-3), "of normalised tokens: their variance"


@pytest.mark.parametrize("normalise", [False, True])
def test_the_rows_are_truth_seen_made_and_made_with_seen_put_back(
    normalise: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is dropped is blank in what was seen. A network that knows the targets makes the truth, and has no loss."""
    task, clean = make(normalise=normalise), patches(2)
    order = task.draw(0, np.arange(2), 0)
    _, rows = task.validate(order, clean)
    truth, seen, made, back = rows.values()
    assert [*rows] == ["ground truth", "seen", "made", "made, seen put back"]
    assert torch.equal(truth, clean)
    dropped = seen.isnan()
    assert float(dropped.float().mean()) == 0.75
    assert torch.equal(seen[~dropped], clean[~dropped])
    assert torch.equal(back, torch.where(dropped, made, clean))
    assert not torch.allclose(made[~dropped], clean[~dropped]), "the network made those, too"

    voxels = tokens_of(clean, 16)
    mean, scale = task.objective.units(voxels)
    monkeypatch.setattr(task.network, "predict", lambda _: (voxels - mean) / scale)
    losses, rows = task.validate(order, clean)
    assert float(losses["loss"]) == 0
    torch.testing.assert_close(rows["made"], clean)


def test_tokens_are_those_of_the_embedding() -> None:
    """Cut out and put together again nothing changes, and their order is that in which the network sees them."""
    clean, token = patches(2, 3), 16
    voxels = tokens_of(clean, token)
    assert torch.equal(patches_of(voxels, GRID, token), clean)
    for place, box in enumerate(boxes()):
        assert torch.equal(voxels[:, place], clean[(slice(None), slice(None), *box)].flatten(1))
    embedding = make(3).encoder.patch_embedding.patch_embeddings  # a convolution
    products = voxels @ embedding.weight.flatten(1).T + embedding.bias
    torch.testing.assert_close(products, embedding(clean).flatten(2).transpose(1, 2), rtol=1e-4, atol=1e-5)


def test_a_patch_costs_a_third_of_restoration_or_less() -> None:
    """ViT-B on 96³; the count is that of plain arithmetic."""
    masked, restoration = (task_cost(settings, Unetr(), (96, 96, 96)) for settings in (Masked(), Restoration()))
    embedding = 2 * 216 * 16**3 * 768

    def blocks(layers: int, tokens: int, width: int, mlp_dim: int) -> int:
        return layers * (2 * tokens * width * (4 * width + 2 * mlp_dim) + 4 * tokens**2 * width)

    ends = 2 * 54 * 768 * 384 + 2 * 216 * 384 * 16**3
    forward = embedding + blocks(12, 54, 768, 3072) + blocks(2, 216, 384, 1536) + ends
    assert (masked.forward, masked.training) == (forward, 3 * forward - embedding)
    assert 3 * masked.training <= restoration.training
