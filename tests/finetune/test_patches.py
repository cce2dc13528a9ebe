"""Fine-tuning patches: index-addressed, centred as MONAI's `RandCropByPosNegLabel`, augmented as in the recipe."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from monai.transforms.utils import correct_crop_centers

from ssl_ray.config.schema import Augmentation, Finetune
from ssl_ray.data.store import Store, Volume, foreground_index
from ssl_ray.finetune.patches import PatchSampler, augment, crop_origin

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
        empty, seen = dict.fromkeys(Volume.__dataclass_fields__), {"seen": (0, 1), "body": (0,)}
        stored.append(Volume(**{**empty, "key": key, "shape": SHAPE, "levels": 255, "label_voxels": counts, **seen}))
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


def test_image_and_label_stay_together():
    """Flips and turns move image and label alike, and keep the shape of a patch with unequal sides."""
    random = np.random.default_rng(0)
    label = torch.arange(6 * 4 * 5).reshape(6, 4, 5)
    always = Augmentation(flip_prob=0.5, rotate_prob=1, shift_prob=0)
    for _ in range(20):
        image, moved = augment(label.float(), label, always, random)
        assert torch.equal(image, moved.float())
        assert image.shape == label.shape
        assert torch.equal(moved.flatten().sort().values, label.flatten())


def test_probabilities_of_the_recipe():
    """Off means off; the shift is uniform within its bounds and its probability."""
    random = np.random.default_rng(0)
    patch = torch.zeros(4, 4, 4)
    label = torch.zeros(4, 4, 4, dtype=torch.long)
    quiet = Augmentation.model_validate(QUIET)
    assert torch.equal(augment(patch, label, quiet, random)[0], patch)
    shifts = np.array([float(augment(patch, label, Augmentation(), random)[0][0, 0, 0]) for _ in range(2000)])
    assert abs((shifts != 0).mean() - 0.5) < 0.05
    assert abs(shifts).max() <= 0.1
    assert abs(shifts[shifts != 0].std() - 0.1 / np.sqrt(3)) < 0.005
