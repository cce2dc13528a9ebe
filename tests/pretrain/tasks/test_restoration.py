from typing import Any

import numpy as np
import pytest
import torch
from monai.losses import ContrastiveLoss
from monai.transforms import RandCoarseDropout, RandCoarseShuffle
from scipy import stats
from torch import Tensor

from ssl_ray.pretrain.tasks.restoration import corruption as module
from ssl_ray.pretrain.tasks.restoration.corruption import Draws, corrupt, draw, draws_of
from ssl_ray.pretrain.tasks.restoration.settings import Corruption
from ssl_ray.pretrain.tasks.restoration.task import contrastive_loss

SIZE = (48, 32, 64)
SMALL = Corruption(inpaint_size=(3, 14), outpaint_size=(10, 30), inpaint_boxes=4, outpaint_boxes=5, shuffle_size=7)
INPAINT = SMALL.model_copy(update={"outpaint_prob": 0.0, "shuffle_prob": 0.0})
OUTPAINT = SMALL.model_copy(update={"outpaint_prob": 1.0, "shuffle_prob": 0.0})
SHUFFLE = SMALL.model_copy(update={"shuffle_prob": 1.0})


def indices(count: int, first: int = 0) -> np.ndarray:
    return np.arange(first, first + count, dtype=np.int64)


def make_patches(count: int, size: tuple[int, int, int] = SIZE, low: float = 0.2, high: float = 0.7) -> Tensor:
    uniform = torch.rand((count, 1, *size), generator=torch.Generator().manual_seed(0))
    patches = low + (high - low) * uniform
    patches[:, :, 0, 0, 0], patches[:, :, 0, 0, 1] = low, high
    return patches


def box_mask(start: Tensor, stop: Tensor, size: tuple[int, int, int] = SIZE) -> Tensor:
    """(K, 3) corners -> (X, Y, Z) bool, voxel by voxel."""
    x, y, z = np.indices(size)[..., None]
    inside = np.ones((*size, len(start)), bool)
    for axis, voxel in enumerate((x, y, z)):
        inside &= (start[:, axis].numpy() <= voxel) & (voxel < stop[:, axis].numpy())
    return torch.from_numpy(inside.any(-1))


def shuffle_only(patches: Tensor, draws: Draws) -> Tensor:
    views = patches[:, 0].clone()
    module._shuffle_(views, draws)
    return views[:, None]


def test_a_view_does_not_depend_on_the_batch_it_is_in() -> None:
    """Samples 3, 7 and 9 are corrupted alike together, in another order and one by one, on either path."""
    patches = make_patches(3)
    together = corrupt(patches, draw(SMALL, SIZE, 5, np.array([3, 7, 9])))
    turned = corrupt(patches.flip(0), draw(SMALL, SIZE, 5, np.array([9, 7, 3]))).flip(0)
    single = [corrupt(patches[i : i + 1], draw(SMALL, SIZE, 5, np.array([n]))) for i, n in enumerate((3, 7, 9))]
    assert torch.equal(together, turned)
    assert torch.equal(together, torch.cat(single))


@pytest.mark.parametrize("change", [{"seed": 6}, {"view": 1}, {"indices": np.array([4])}])
def test_another_seed_view_or_sample_is_another_corruption(change: dict[str, Any]) -> None:
    """The boxes and the key change with each of seed, view and index."""
    arguments: dict[str, Any] = {"seed": 5, "indices": np.array([3]), "view": 0}
    one, other = draw(SMALL, SIZE, **arguments), draw(SMALL, SIZE, **(arguments | change))
    assert not torch.equal(one.start, other.start)
    assert not torch.equal(one.key, other.key)


def test_the_input_stays_as_it_is_and_its_memory_layout_does_not_matter() -> None:
    """A transposed view of memory is corrupted like its contiguous copy, and neither is written to."""
    draws = draw(SHUFFLE, SIZE, 5, indices(4))
    patches = make_patches(4)
    transposed = patches.transpose(2, 4).contiguous().transpose(2, 4)
    before = patches.clone()
    assert torch.equal(corrupt(patches, draws), corrupt(transposed, draws))
    assert torch.equal(patches, before)
    assert torch.equal(transposed, before)


def test_channels_have_the_same_boxes_and_noise_of_their_own() -> None:
    """The first channel is what it is alone; the others are changed in the same voxels, to other values."""
    patches = make_patches(6)
    for config in (INPAINT, OUTPAINT):
        draws = draw(config, SIZE, 5, indices(6))
        alone, together = corrupt(patches, draws), corrupt(patches.expand(-1, 3, -1, -1, -1), draws)
        assert torch.equal(together[:, :1], alone)
        changed = together != patches
        for channel in (1, 2):
            assert (changed[:, channel] == changed[:, 0]).float().mean() > 0.999  # noise may hit the old value
            assert (together[:, channel] != together[:, 0])[changed[:, 0]].float().mean() > 0.99


def test_words_are_those_of_the_published_generator() -> None:
    """SplitMix64 seeded with 1234567 gives the five numbers that every implementation is checked against."""
    words = module._words(torch.tensor(1234567), torch.arange(5)).numpy().view(np.uint64)
    assert words.tolist() == [
        6457827717110365317,
        3203168211198807973,
        9817491932198370423,
        4593380528125082431,
        16408922859458223821,
    ]


@pytest.mark.parametrize("size", [SIZE, (32, 48, 33)])
@pytest.mark.parametrize("sides", [(3, 30), (1, 4)])
def test_masks_and_boxes_paint_the_same(size: tuple[int, int, int], sides: tuple[int, int]) -> None:
    """What a GPU computes with masks is bit for bit what a CPU computes with slices, also in rows of a single voxel."""
    draws = draw(SMALL.model_copy(update={"inpaint_size": sides, "outpaint_size": sides}), size, 5, indices(12))
    assert 0 < draws.outpaint.sum() < 12
    volumes = make_patches(12, size)[:, 0]
    assert torch.equal(module._paint_masks(volumes, draws), module._paint_boxes(volumes, draws))


def test_nothing_on_the_device_waits_for_data() -> None:
    """On the meta device, where tensors have no values to read, every shape is known and all tensors are there."""
    drawn = draws_of(SMALL, draw(SMALL, SIZE, 5, indices(3)).table.to("meta"))
    view = corrupt(torch.empty((3, 1, *SIZE), device="meta"), drawn)
    assert view.shape == (3, 1, *SIZE)
    assert view.is_meta


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_gpu_agrees_with_the_cpu_without_synchronising() -> None:
    """On a GPU the boxes and permutations are the CPU's, the noise is to rounding, and no call waits."""
    draws = draw(SHUFFLE, SIZE, 5, indices(6))
    patches = make_patches(6)
    on_device, drawn = patches.cuda(), draws_of(SHUFFLE, draws.table.cuda())
    torch.cuda.set_sync_debug_mode("error")
    try:
        views = corrupt(on_device, drawn)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    torch.testing.assert_close(views.cpu(), corrupt(patches, draws), rtol=0, atol=1e-6)


def test_inpainting_keeps_every_voxel_outside_its_boxes() -> None:
    """Outside the boxes the view is bit-identical, inside practically everything is replaced."""
    patches, draws = make_patches(8), draw(INPAINT, SIZE, 1, indices(8))
    assert draws.start.shape == (8, 5, 3)
    for patch, view, start, stop in zip(patches, corrupt(patches, draws), draws.start, draws.stop, strict=True):
        inside = box_mask(start, stop)
        assert torch.equal(patch[0][~inside], view[0][~inside])
        assert (patch[0][inside] != view[0][inside]).float().mean() > 0.999
        assert ((stop - start).prod(dim=1) > 0).sum() == INPAINT.inpaint_boxes


def test_outpainting_keeps_every_voxel_inside_its_boxes() -> None:
    """Inside the boxes the view is bit-identical, outside practically everything is replaced."""
    patches, draws = make_patches(8), draw(OUTPAINT, SIZE, 1, indices(8))
    for patch, view, start, stop in zip(patches, corrupt(patches, draws), draws.start, draws.stop, strict=True):
        inside = box_mask(start, stop)
        assert torch.equal(patch[0][inside], view[0][inside])
        assert (patch[0][~inside] != view[0][~inside]).float().mean() > 0.999
        assert ((stop - start).prod(dim=1) > 0).sum() == OUTPAINT.outpaint_boxes


def test_outpaint_prob_is_the_share_of_outpainted_samples() -> None:
    """At 0.3, 0.3 of the samples are out-painted, and at 1 and 0 all and none are."""
    some = draw(SMALL.model_copy(update={"outpaint_prob": 0.3}), SIZE, 0, indices(3000))
    assert stats.binomtest(int(some.outpaint.sum()), 3000, 0.3).pvalue > 0.01
    assert draw(OUTPAINT, SIZE, 0, indices(200)).outpaint.all()
    assert not draw(INPAINT, SIZE, 0, indices(200)).outpaint.any()


def test_the_replacement_is_uniform_between_the_patch_minimum_and_maximum() -> None:
    """Replaced voxels follow U(min, max) of their own patch, all of them and each of the four that share a word."""
    patches = torch.cat([make_patches(1), make_patches(1, low=0.5, high=0.6)])
    draws = draw(OUTPAINT, SIZE, 2, indices(2))
    for patch, view, start, stop in zip(patches, corrupt(patches, draws), draws.start, draws.stop, strict=True):
        low, high = patch.min().item(), patch.max().item()
        outside = ~box_mask(start, stop)
        assert low <= view.min().item()
        assert view.max().item() <= high
        for part in (slice(None), *(slice(lane, None, 4) for lane in range(4))):
            noise = view[0][:, :, part][outside[:, :, part]].double().numpy()
            assert stats.kstest(noise, "uniform", (low, high - low)).pvalue > 0.01


def test_noise_is_uncorrelated() -> None:
    """Neighbouring voxels, samples and views have noise that is unrelated: |r| < 4 standard errors."""
    keys = torch.cat([draw(SMALL, SIZE, 2, indices(2), view).key for view in (0, 1)])
    counters = torch.arange(20_000)
    noise = module._noise(keys[:, None], counters, torch.tensor(0.0), torch.tensor(1.0)).numpy()
    streams = [noise[0], noise[0], noise[0], noise[0], noise[1], noise[2], noise[3]]
    shifted = [np.roll(stream, lag) for stream, lag in zip(streams, (0, 1, 2, 4, 0, 0, 0), strict=True)]
    off_diagonal = np.corrcoef(shifted)[np.triu_indices(len(shifted), 1)]
    assert np.abs(off_diagonal).max() < 4 / np.sqrt(noise.shape[1])


def test_a_constant_patch_stays_constant() -> None:
    """Between equal minimum and maximum there is one value."""
    patches = torch.full((6, 1, *SIZE), 0.3)
    assert torch.equal(corrupt(patches, draw(SHUFFLE, SIZE, 3, indices(6))), patches)


def monai_boxes(low: int, high: int, holes: int, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Start and stop (count, holes, 3) of MONAI's boxes."""
    transform = RandCoarseDropout(holes, low, max_spatial_size=high, prob=1.0).set_random_state(0)
    corners = np.empty((2, count, holes, 3), np.int64)
    for sample in range(count):
        transform.randomize(SIZE)
        corners[:, sample] = [
            [[getattr(side, end) for side in hole[1:]] for hole in transform.hole_coords] for end in ("start", "stop")
        ]
    return corners[0], corners[1]


@pytest.mark.parametrize("config", [INPAINT, OUTPAINT])
def test_boxes_are_distributed_as_the_first_of_monai(config: Corruption) -> None:
    """Sides and corners of all our boxes have the distribution of MONAI's first box, on each axis."""
    low, high = config.outpaint_size if config is OUTPAINT else config.inpaint_size
    start, stop = monai_boxes(low, high, 1, 2000)
    ours = draw(config, SIZE, 0, indices(2000))
    used = config.outpaint_boxes if config is OUTPAINT else config.inpaint_boxes
    sides = (ours.stop - ours.start).numpy()
    assert sides[:, :used].min() == low
    assert sides[:, :used].max() == high
    assert ours.start.min() == 0
    assert (ours.stop.numpy().max((0, 1)) == SIZE).all()
    for box in range(used):
        for axis in range(3):
            assert stats.ks_2samp((stop - start)[:, 0, axis], sides[:, box, axis]).pvalue > 0.001
            assert stats.ks_2samp(start[:, 0, axis], ours.start[:, box, axis]).pvalue > 0.001


def test_boxes_do_not_grow_as_those_of_monai_do() -> None:
    """MONAI draws a side between the previous box's and the largest; ours are uniform from the first to the last."""
    start, stop = monai_boxes(5, 30, 6, 1000)
    drifting = (stop - start).mean((0, 2))
    config = Corruption(inpaint_size=(5, 30), outpaint_size=(20, 30), outpaint_prob=0)
    draws = draw(config, SIZE, 0, indices(1000))
    sides = (draws.stop - draws.start).numpy()
    assert (np.diff(drifting) > 0).all()
    assert drifting[-1] > 29
    np.testing.assert_allclose(sides.mean((0, 2)), 17.5, atol=0.6)
    assert stats.ks_2samp(sides[:, 0].ravel(), sides[:, 5].ravel()).pvalue > 0.01
    assert stats.ks_2samp((stop - start)[:, 5].ravel(), sides[:, 5].ravel()).pvalue < 1e-6


@pytest.mark.parametrize("config", [INPAINT, OUTPAINT])
def test_the_replaced_share_is_that_of_monai_without_the_drift(config: Corruption) -> None:
    """MONAI's dropout of one box, applied once a box, covers as many voxels as ours replaces or keeps."""
    low, high = config.outpaint_size if config is OUTPAINT else config.inpaint_size
    boxes = config.outpaint_boxes if config is OUTPAINT else config.inpaint_boxes
    one_box = RandCoarseDropout(1, low, max_spatial_size=high, fill_value=1, prob=1.0).set_random_state(1)
    covered = []
    for _ in range(250):
        patch = torch.zeros((1, *SIZE))
        for _ in range(boxes):
            patch = one_box(patch)
        covered.append(float(patch.mean()))

    patches = make_patches(1).expand(250, -1, -1, -1, -1)
    changed = corrupt(patches, draw(config, SIZE, 4, indices(250))) != patches
    replaced = changed.flatten(1).float().mean(1).numpy()
    reference = 1 - np.array(covered) if config is OUTPAINT else np.array(covered)
    assert stats.ks_2samp(replaced, reference).pvalue > 0.01


def test_shuffling_moves_voxels_within_their_box_only() -> None:
    """A box holds the same values in another order, and every voxel outside of it is bit-identical."""
    config = SHUFFLE.model_copy(update={"shuffle_boxes": 1})
    patches, draws = make_patches(6), draw(config, SIZE, 1, indices(6))
    for patch, view, start in zip(patches, shuffle_only(patches, draws), draws.shuffle_start, strict=True):
        inside = box_mask(start, start + 7)
        assert torch.equal(patch[0][~inside], view[0][~inside])
        assert torch.equal(patch[0][inside].sort().values, view[0][inside].sort().values)
        assert (patch[0][inside] != view[0][inside]).float().mean() > 0.9


def test_shuffling_comes_after_painting() -> None:
    """The view is the shuffled in- or out-painted patch, as in MONAI's tutorial."""
    patches, draws = make_patches(6), draw(SHUFFLE, SIZE, 1, indices(6))
    painted = corrupt(patches, draws._replace(shuffle=torch.zeros_like(draws.shuffle)))
    assert torch.equal(corrupt(patches, draws), shuffle_only(painted, draws))
    assert not torch.equal(corrupt(patches, draws), painted)


def test_without_painted_boxes_shuffling_is_all_there_is() -> None:
    """With no box to in-paint and nothing to out-paint, a view is its patch with shuffled boxes."""
    config = SHUFFLE.model_copy(update={"inpaint_boxes": 0, "outpaint_prob": 0.0})
    patches, draws = make_patches(6), draw(config, SIZE, 1, indices(6))
    assert torch.equal(corrupt(patches, draws), shuffle_only(patches, draws))
    assert torch.equal(module._paint_masks(patches[:, 0], draws), patches[:, 0])


def test_overlapping_shuffle_boxes_lose_no_value() -> None:
    """Boxes are shuffled one after the other, so that ten boxes that overlap keep the patch's multiset of values."""
    config = SHUFFLE.model_copy(update={"shuffle_size": 24})
    patches = make_patches(4)
    views = shuffle_only(patches, draw(config, SIZE, 1, indices(4)))
    assert torch.equal(patches.flatten(1).sort().values, views.flatten(1).sort().values)
    assert (patches != views).float().mean() > 0.5


def test_shuffle_prob_is_the_share_of_shuffled_samples() -> None:
    """A sample whose draw says no is left alone; at 0.8, 0.8 of them are shuffled, and in- or out-painting aside."""
    patches = make_patches(20)
    draws = draw(SMALL, SIZE, 1, indices(20))
    moved = (shuffle_only(patches, draws) != patches).flatten(1).any(1)
    assert moved.tolist() == draws.shuffle.tolist()
    many = draw(SMALL, SIZE, 1, indices(3000))
    assert stats.binomtest(int(many.shuffle.sum()), 3000, 0.8).pvalue > 0.01
    assert stats.chi2_contingency(stats.contingency.crosstab(many.shuffle, many.outpaint).count).pvalue > 0.01
    assert draw(SHUFFLE, SIZE, 1, indices(200)).shuffle.all()
    assert not draw(INPAINT, SIZE, 1, indices(200)).shuffle.any()


def test_every_permutation_is_as_likely() -> None:
    """A voxel of a 2³ box goes to each of the eight places equally often, whichever voxel it is."""
    config = SHUFFLE.model_copy(update={"shuffle_size": 2, "shuffle_boxes": 1})
    patches = torch.arange(8.0).view(1, 1, 2, 2, 2).expand(4000, -1, -1, -1, -1)
    views = shuffle_only(patches, draw(config, (2, 2, 2), 1, indices(4000))).flatten(1).long()
    places = torch.stack([torch.bincount(column, minlength=8) for column in views.T]).numpy()
    # Of the 64 counts, 49 are free.
    statistic = ((places - 500) ** 2 / 500).sum()
    assert stats.chi2.sf(statistic, 49) > 0.01


def test_as_many_voxels_move_as_with_monai() -> None:
    """The number of voxels that ten shuffled boxes move has the distribution of RandCoarseShuffle."""
    shuffle = RandCoarseShuffle(10, 7, prob=1.0).set_random_state(0)
    patch = make_patches(1)[0]
    theirs = [float((shuffle(patch.clone()) != patch).float().mean()) for _ in range(200)]
    patches = patch.expand(200, -1, -1, -1, -1)
    views = shuffle_only(patches, draw(SHUFFLE, SIZE, 1, indices(200)))
    ours = (views != patches).flatten(1).float().mean(1).numpy()
    assert stats.ks_2samp(ours, theirs).pvalue > 0.01


def test_the_contrastive_loss_and_its_gradient_are_those_of_monai() -> None:
    """Loss and gradients agree with MONAI's ContrastiveLoss at the recipe's temperature."""
    generator = torch.Generator().manual_seed(0)
    first, second = ((torch.rand((5, 700), generator=generator) + 0.5).requires_grad_() for _ in range(2))
    ours, theirs = contrastive_loss(first, second, 0.05), ContrastiveLoss(0.05)(first, second)
    torch.testing.assert_close(ours, theirs)
    for gradient, reference in zip(
        *(torch.autograd.grad(loss, (first, second)) for loss in (ours, theirs)), strict=True
    ):
        torch.testing.assert_close(gradient, reference, rtol=1e-4, atol=1e-6)


def test_the_contrastive_loss_is_exact_under_autocast() -> None:
    """Mixed precision changes the restorations, not the arithmetic of the loss."""
    first, second = torch.rand((2, 6, 500), generator=torch.Generator().manual_seed(0))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mixed = contrastive_loss(first, second, 0.05)
    assert torch.equal(mixed, contrastive_loss(first, second, 0.05))


@pytest.mark.parametrize("outpaint_prob", [0.0, 1.0])
def test_growing_boxes_are_those_of_monai(outpaint_prob: float) -> None:
    """With `growing`, each of six boxes has the sides and corners of MONAI's box of the same number."""
    low, high = (10, 30) if outpaint_prob else (5, 30)
    config = Corruption(inpaint_size=(5, 30), outpaint_size=(10, 30), outpaint_prob=outpaint_prob, growing=True)
    start, stop = monai_boxes(low, high, 6, 2000)
    ours = draw(config, SIZE, 0, indices(2000))
    for box in range(6):
        for axis in range(3):
            sides = (ours.stop - ours.start)[:, box, axis]
            assert stats.ks_2samp((stop - start)[:, box, axis], sides).pvalue > 0.001
            assert stats.ks_2samp(start[:, box, axis], ours.start[:, box, axis]).pvalue > 0.001
