"""Fine-tuning patches: index-addressed, centred as MONAI's `RandCropByPosNegLabel`, augmented as in the recipe."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from monai.transforms.utils import correct_crop_centers
from scipy import ndimage

from ssl_ray.config.schema import Augmentation, Finetune
from ssl_ray.data.patch import crop_origin
from ssl_ray.data.store import Store, Volume, foreground_index
from ssl_ray.finetune.patches import PatchSampler, augment, vary

SHAPE = (40, 36, 20)
QUIET = {"flip_prob": 0, "rotate_prob": 0, "shift_prob": 0}


@pytest.fixture
def volumes(tmp_path):
    """Three stored volumes with a large and a small organ; outside the body (x < 8) the image is 0."""
    stored = []
    for number in range(3):
        image = np.full(SHAPE, 100 + number, np.uint8)
        image[:8] = 0
        label = np.zeros(SHAPE, np.uint8)
        label[10:30, 10:30, 4:16] = 1
        label[34:36, 2:4, 2:4] = 2
        key = f"{number}{number}volume"
        folder = Store(tmp_path).path(key)
        folder.mkdir(parents=True)
        for name, array in {"image": image, "label": label, "foreground": foreground_index(label)}.items():
            np.save(folder / f"{name}.npy", array)
        counts = {str(value): int(count) for value, count in enumerate(np.bincount(label.ravel()))}
        made = {"key": key, "shape": SHAPE, "levels": 255, "body": (0,), "label_voxels": counts}
        stored.append(Volume(**{**dict.fromkeys(Volume.__dataclass_fields__), **made}))
    return tuple(stored)


def sampler(volumes, tmp_path, seed=0, **changes):
    cohort = {"root": "x", "classes": 3, "splits": {3: "x.json"}}
    tree = {"cohort": cohort, "preparation": {"spacing": 1, "hu_window": [0, 1]}, "patch_size": 16} | changes
    return PatchSampler(volumes, Store(tmp_path), Finetune.model_validate(tree), seed)


def test_a_batch_depends_on_seed_and_step_alone(volumes, tmp_path):
    """Asking again, or in another order, gives the same patches; another seed or step others."""
    one = sampler(volumes, tmp_path)
    first, later = one.batch(0), one.batch(7)
    again = sampler(volumes, tmp_path)
    for expected, found in zip((*later, *first), (*again.batch(7), *again.batch(0)), strict=True):
        assert torch.equal(expected, found)
    assert not torch.equal(first[1], sampler(volumes, tmp_path, seed=1).batch(0)[1])


def test_every_epoch_visits_every_volume(volumes, tmp_path):
    """Three steps of one volume each see all three volumes, in orders that change."""
    one = sampler(volumes, tmp_path, augmentation=QUIET, patches_per_volume=1)
    levels = [int((one.batch(step)[0].max() * 255).round()) - 100 for step in range(30)]
    epochs = [tuple(levels[start : start + 3]) for start in range(0, 30, 3)]
    assert all(sorted(epoch) == [0, 1, 2] for epoch in epochs)
    assert len(set(epochs)) > 1


@pytest.mark.parametrize(("balance", "expected"), [(False, 8 / 4808), (True, 0.5)])
def test_organs_are_drawn_by_volume_or_equally_often(volumes, tmp_path, balance, expected):
    """Without balance a voxel is as likely as any other; with it, an organ is."""
    one = sampler(volumes, tmp_path, balance_organs=balance, foreground_prob=1)
    draws = 600
    label = np.load(Store(tmp_path).path(volumes[0].key, "label.npy"))
    image = np.load(Store(tmp_path).path(volumes[0].key, "image.npy"))
    random = np.random.default_rng(0)
    small = sum(label[one._centre(volumes[0], image, label, random)] == 2 for _ in range(draws))
    assert abs(small / draws - expected) < 0.07


def test_foreground_and_background_are_drawn_in_the_ratio_asked_for(volumes, tmp_path):
    """A background centre lies in the body and outside all organs, as with MONAI's image threshold."""
    one = sampler(volumes, tmp_path, foreground_prob=0.25)
    label = np.load(Store(tmp_path).path(volumes[0].key, "label.npy"))
    image = np.load(Store(tmp_path).path(volumes[0].key, "image.npy"))
    random = np.random.default_rng(1)
    centres = [one._centre(volumes[0], image, label, random) for _ in range(800)]
    assert abs(np.mean([label[centre] > 0 for centre in centres]) - 0.25) < 0.06
    assert all(image[centre] > 0 for centre in centres)


@given(
    st.tuples(*(st.integers(0, side - 1) for side in SHAPE)),
    st.tuples(*(st.sampled_from([4, 8, 16, 20]) for _ in "xyz")),
)
def test_patches_are_moved_inside_as_monai_does(centre, size):
    """The origin is that of MONAI's corrected centre."""
    corrected = correct_crop_centers(list(centre), size, SHAPE)
    assert crop_origin(centre, SHAPE, size) == tuple(int(c) - s // 2 for c, s in zip(corrected, size, strict=True))


CUBES = (2.0, 2.0, 2.0)
"""Spacing in mm."""


def test_image_and_label_stay_together():
    """Flips and turns move image and label alike, and keep the shape of a patch with unequal sides."""
    random = np.random.default_rng(0)
    label = torch.arange(6 * 4 * 5).reshape(6, 4, 5)
    always = Augmentation(flip_prob=0.5, rotate_prob=1, shift_prob=0)
    for _ in range(20):
        image, moved = augment(label.float(), label, always, CUBES, random)
        assert torch.equal(image, moved.float())
        assert image.shape == label.shape
        assert torch.equal(moved.flatten().sort().values, label.flatten())


def test_probabilities_of_the_recipe():
    """Off means off; the shift is uniform within its bounds and its probability."""
    random = np.random.default_rng(0)
    patch = torch.zeros(4, 4, 4)
    label = torch.zeros(4, 4, 4, dtype=torch.long)
    quiet = Augmentation.model_validate(QUIET)
    assert torch.equal(augment(patch, label, quiet, CUBES, random)[0], patch)
    shifts = np.array([float(augment(patch, label, Augmentation(), CUBES, random)[0][0, 0, 0]) for _ in range(2000)])
    assert abs((shifts != 0).mean() - 0.5) < 0.05
    assert abs(shifts).max() <= 0.1
    assert abs(shifts[shifts != 0].std() - 0.1 / np.sqrt(3)) < 0.005


OFF = Augmentation.model_validate(QUIET)
ALONE = {"affine": (1, 0, 0, 0), "noise": (0, 1, 0, 0), "blur": (0, 0, 1, 0), "gamma": (0, 0, 0, 1)}


def ball(side=24, radius=6.0):
    """A smooth ball (1, X, Y, Z) in 0..1, and its label: where it is above one half."""
    axes = torch.meshgrid(*[torch.arange(side) - (side - 1) / 2] * 3, indexing="ij")
    distance = torch.stack(axes).square().sum(0).sqrt()
    image = torch.sigmoid(radius - distance)[None]
    return image, (image > 0.5).to(torch.uint8)


def test_the_recipe_draws_nothing_for_what_is_off():
    """The stream of random numbers, and with it the recipe's patches, stay what they were."""
    random, again = np.random.default_rng(0), np.random.default_rng(0)
    augment(*ball(), OFF, CUBES, random)
    again.random(5)  # three flips, a turn, a shift
    assert random.random() == again.random()


def test_varied_patches_are_a_function_of_the_stream():
    """The same seed gives the same patch, others mostly another; numpy's and torch's own generators are left alone."""
    before = torch.get_rng_state(), np.random.get_state()[1].tolist()
    made, again = ([vary(*ball(), CUBES, seed) for seed in range(12)] for _ in range(2))
    assert all(torch.equal(one[part], other[part]) for one, other in zip(made, again, strict=True) for part in (0, 1))
    assert len({float(image.sum()) for image, _ in made}) > 6
    for image, label in made:
        assert type(image) is type(label) is torch.Tensor
        assert (image.shape, image.dtype, label.dtype) == ((1, 24, 24, 24), torch.float32, torch.uint8)
    assert torch.equal(before[0], torch.get_rng_state())
    assert before[1] == np.random.get_state()[1].tolist()


def test_rotation_and_scaling_take_the_label_along():
    """The label stays where the image is above one half; its classes stay classes."""
    image, label = ball()
    image = image.roll((4, -3, 2), (1, 2, 3))
    label = 3 * label.roll((4, -3, 2), (1, 2, 3))
    for seed in range(8):
        moved, there = vary(image, label, CUBES, seed, ALONE["affine"])
        assert set(there.unique().tolist()) == {0, 3}
        assert ((moved > 0.5) == (there == 3)).float().mean() > 0.99
        assert ((there == label).float().mean()) < 0.999


@pytest.mark.parametrize(("spacing", "across"), [((0.8, 0.8, 5.0), 3), ((3.3, 0.8, 0.8), 1), ((1.0, 1.0, 1.6), 3)])
def test_thick_slices_are_turned_within_their_plane(spacing, across):
    """What changes across the slices alone, still does; what changes along y alone, changes across y, too."""
    ramp, label = torch.linspace(0, 1, 16), torch.zeros(1, 16, 16, 16, dtype=torch.uint8)
    through, along_y = torch.zeros(1, 16, 16, 16), ramp[:, None].expand(1, 16, 16, 16)
    through.swapaxes(across, 3)[:] = ramp
    turned = []
    for seed in range(12):
        made = [vary(one, label, spacing, seed, ALONE["affine"])[0].swapaxes(across, 1) for one in (through, along_y)]
        assert float((made[0].amax((2, 3)) - made[0].amin((2, 3))).max()) < 1e-5
        assert float((made[1].amax(1) - made[1].amin(1)).max()) < 1e-5
        turned.append(float(made[1].std(3).max()))
    assert max(turned) > 0.05


def test_nearly_cubic_voxels_are_turned_as_cubes_are():
    """Up to a ratio of 1.5, patches are to the bit those of equal sides: kept studies stay what they were."""
    for seed in range(6):
        pairs = zip(vary(*ball(), CUBES, seed), vary(*ball(), (1.5, 1.5, 2.0), seed), strict=True)
        assert all(torch.equal(one, other) for one, other in pairs)


def test_a_quarter_turn_does_not_exchange_unequal_spacings():
    """A pattern along the axis of 3.3 mm stays along it, though the patch has equal sides."""
    pattern = torch.arange(8.0)[:, None, None].expand(8, 8, 8)
    always = Augmentation(flip_prob=0, rotate_prob=1, shift_prob=0)
    for spacing, kept in (((3.3, 0.8, 0.8), True), (CUBES, False)):
        random = np.random.default_rng(0)
        made = [augment(pattern, pattern, always, spacing, random)[0] for _ in range(20)]
        assert all(float(one.std(1).max()) == 0 for one in made) == kept
        assert not all(torch.equal(one, pattern) for one in made)


def test_things_become_between_0_7_and_1_4_times_as_large():
    """A ball has between 0.7³ and 1.4³ times its voxels, and the range is used."""
    image, label = ball()
    factors = [float(vary(image, label, CUBES, seed, ALONE["affine"])[1].sum() / label.sum()) for seed in range(60)]
    assert 0.9 * 0.7**3 < min(factors) < 0.7
    assert 1.4 < max(factors) < 1.1 * 1.4**3


def test_noise_blur_and_gamma_change_the_image_alone():
    """Noise of at most 0.1; a blur between two of scipy's; a power of the patch's range that keeps its ends."""
    image, label = ball()
    for seed in range(20):
        made = {}
        for kind in ("noise", "blur", "gamma"):
            made[kind], same = vary(image, label, CUBES, seed, ALONE[kind])
            assert torch.equal(same, label)
            assert not torch.equal(made[kind], image)
        assert float((made["noise"] - image).std()) < 0.105
        narrow, wide = (ndimage.gaussian_filter(image[0].numpy(), width, mode="constant")[None] for width in (0.5, 1.0))
        inside = (slice(None), *(slice(4, -4),) * 3)
        assert (made["blur"].numpy() >= np.minimum(narrow, wide) - 0.02)[inside].all()
        assert (made["blur"].numpy() <= np.maximum(narrow, wide) + 0.02)[inside].all()
        low, high = image.min(), image.max()
        share, changed = ((one - low) / (high - low) for one in (image, made["gamma"]))
        middle = (share > 0.1) & (share < 0.9)
        powers = changed[middle].log() / share[middle].log()
        assert 0.7 < float(powers.min()) <= float(powers.max()) < 1.5
        assert float(powers.max() - powers.min()) < 1e-3


@pytest.mark.parametrize("kind", ["affine", "noise", "blur", "gamma"])
def test_each_change_has_its_odds(kind):
    """One in four patches."""
    image, label = ball(12, 3.0)
    odds = [odd / 4 for odd in ALONE[kind]]
    changed = [not torch.equal(vary(image, label, CUBES, seed, odds)[0], image) for seed in range(300)]
    assert abs(np.mean(changed) - 0.25) < 0.08


def test_a_sampler_augments_every_arm_alike(volumes, tmp_path):
    """The patches of a step depend on its settings, not on what a trial starts from."""
    varied, again = (sampler(volumes, tmp_path, augmentation={"vary": True}) for _ in range(2))
    plain = sampler(volumes, tmp_path)
    images, labels = varied.batch(3)
    assert (images.dtype, labels.dtype) == (torch.float32, torch.uint8)
    assert not all(torch.equal(varied.batch(step)[0], plain.batch(step)[0]) for step in range(4))
    assert all(torch.equal(varied.batch(step)[0], again.batch(step)[0]) for step in range(4))
