"""Several images of a volume: listed together, on one grid, stored, cut and corrupted together."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import torch
from scipy import ndimage
from volumes import AFFINE, SHAPE, Array, oblique_affine, organ_labels, stored, touch, write_nifti

from ssl_ray.config.schema import Finetune, Preparation
from ssl_ray.data.consistency import check_lists
from ssl_ray.data.datalist import Case, read_datalist
from ssl_ray.data.nifti import read_label, read_nifti
from ssl_ray.data.normalise import prepare
from ssl_ray.data.patch import read_patch
from ssl_ray.data.prepare import prepare_case
from ssl_ray.data.splits import Splits
from ssl_ray.data.store import Store
from ssl_ray.errors import UserError
from ssl_ray.finetune.patches import PatchSampler
from ssl_ray.pretrain.learner import scale
from ssl_ray.pretrain.samples import SampleTable
from ssl_ray.pretrain.stream import Feed
from ssl_ray.pretrain.tasks.restoration.corruption import corrupt, draw
from ssl_ray.pretrain.tasks.restoration.settings import Corruption

TWO = Preparation(spacing=(1.5, 1.5, 2), normalise="zscore", channels=2)
WHOLE = TWO.model_copy(update={"crop_foreground": False})


def mr(seed: int, shift: int = 0, unit: float = 1.0) -> Array:
    """A body of smooth tissue in faint noise, int16; its box is moved by `shift` voxels along the first axis."""
    random = np.random.default_rng(seed)
    tissue = 600 + 900 * ndimage.gaussian_filter(random.normal(size=SHAPE), 1.5)
    body = np.zeros(SHAPE, bool)
    body[3 + shift : 9 + shift, 3:12, 2:7] = True
    return np.where(body, unit * tissue.clip(300), unit * random.uniform(0, 30, SHAPE)).round().astype(np.int16)


@pytest.fixture
def two(tmp_path: Path) -> Case:
    """A case of two channels, whose bodies lie two voxels apart, with a label."""
    first = write_nifti(tmp_path / "t1.nii.gz", mr(0), AFFINE)
    second = write_nifti(tmp_path / "t2.nii.gz", mr(1, shift=2, unit=3.3), AFFINE)
    return Case("two", first, write_nifti(tmp_path / "label.nii.gz", organ_labels(SHAPE, 3), AFFINE), others=(second,))


def listed(root: Path, **entry: Any) -> Path:
    (root / "list.json").write_text(json.dumps({"training": [entry], "validation": ["c.nii.gz"]}))
    return root / "list.json"


def test_a_list_of_images_is_one_volume(tmp_path: Path) -> None:
    """The first is the volume's image, and names it."""
    touch(tmp_path, "a/t1.nii.gz", "a/t2.nii.gz", "a/label.nii.gz", "c.nii.gz")
    (tmp_path / "list.json").write_text(
        json.dumps({"training": [{"image": ["a/t1.nii.gz", "a/t2.nii.gz"], "label": "a/label.nii.gz", "subject": "p"}]})
    )
    (case,) = read_datalist(tmp_path, "list.json", labelled=True).training
    images = tmp_path / "a" / "t1.nii.gz", tmp_path / "a" / "t2.nii.gz"
    assert case == Case("t1", images[0], tmp_path / "a" / "label.nii.gz", "p", others=images[1:])
    assert case.images == images
    assert read_datalist(tmp_path, "list.json", labelled=False).training[0].images == images


@pytest.mark.parametrize(
    ("images", "rule"),
    [
        ([], r"training\.0\.image: .* at least 1 item"),
        (["a.nii.gz", 5], r"training\.0\.image\.1: input should be a valid string, got 5"),
        (["a.nii.gz", "b.txt"], r"training\.0\.image\.1: 'b\.txt' must end in \.nii or \.nii\.gz"),
        (["a.nii.gz", "../b.nii.gz"], r"training\.0\.image\.1: \.\./b\.nii\.gz leaves the root"),
        (["a.nii.gz", "gone.nii.gz"], r"training\.0: no such file: .*gone\.nii\.gz"),
        (["a.nii.gz", "a.nii.gz"], r"training\.0: .*a\.nii\.gz is listed twice"),
        (["a.nii.gz", "c.nii.gz"], r"validation\.0: .*c\.nii\.gz is listed twice, first in .*training\.0"),
    ],
)
def test_a_bad_channel_is_named(tmp_path: Path, images: list[Any], rule: str) -> None:
    """By file, entry and place in the list."""
    touch(tmp_path, "root/a.nii.gz", "root/b.nii.gz", "root/b.txt", "root/c.nii.gz", "b.nii.gz")
    with pytest.raises(UserError, match=rf"list\.json: {rule}"):
        read_datalist(tmp_path / "root", listed(tmp_path / "root", image=images), labelled=False)


def pair(name: str, *others: str, label: str | None = "l") -> Case:
    return Case(name, Path(name), Path(label + name) if label else None, "", f"list: {name}", tuple(map(Path, others)))


def splits(training: Case, *test: Case) -> Splits:
    return Splits({1: (training,)}, (pair("v1", "v2"),), test, ())


def test_every_volume_has_the_channels_of_the_study() -> None:
    """Neither fewer nor more."""
    check_lists((), (), splits(pair("a1", "a2")), channels=2)
    with pytest.raises(UserError, match=r"list: a1\.image: must list as many .* as preparation\.channels, 2, got 1"):
        check_lists((), (), splits(pair("a1")), channels=2)
    with pytest.raises(UserError, match=r"list: a1\.image: must list as many .*, 1, got 2"):
        check_lists((), (), splits(pair("a1", "a2")))


def test_a_scan_is_held_out_by_each_of_its_channels() -> None:
    """The second channel of a test volume may not be trained on in another volume, compressed or not."""
    held_out = splits(pair("a1", "a2"), pair("t1", "t2.nii.gz"))
    check_lists((pair("b1", "b2", label=None),), (), held_out, channels=2)
    with pytest.raises(UserError, match=r"list: t1: scan \S*t2 is in labelled test \(t1\) and also in unlabelled tr"):
        check_lists((pair("b1", "t2.nii", label=None),), (), held_out, channels=2)


def test_two_lists_give_an_image_the_same_channels() -> None:
    """Else one of them would be stored for both."""
    with pytest.raises(UserError, match="list: a1: a1 has the further channels a3 here, but a2 in list: a1"):
        check_lists((pair("a1", "a3", label=None),), (), splits(pair("a1", "a2")), channels=2)


def test_channels_are_stored_as_each_would_be_alone(two: Case, tmp_path: Path) -> None:
    """(C, X, Y, Z) on the first one's grid, each normalised by its own body; the manifest says so, and comes back."""
    store = Store(tmp_path / "store")
    volume, _ = prepare_case(two, WHOLE, store)
    arrays = stored(store, volume)
    alone = [prepare(read_nifti(path), None, WHOLE.model_copy(update={"channels": 1})) for path in two.images]
    np.testing.assert_array_equal(arrays["image"], np.stack([one.image for one in alone]))
    assert (volume.channels, volume.dtype, volume.levels) == (2, "int16", 4000)
    assert volume.shape == arrays["label"].shape == alone[0].image.shape
    assert volume.intensities == tuple(one.intensities[0] for one in alone)
    assert volume.body == tuple(one.body[0] for one in alone)
    assert volume.normalise == {"kind": "zscore", "over": "body"}
    assert store.get(volume.key) == volume
    assert (
        volume.content
        == prepare_case(replace(two, others=()), WHOLE.model_copy(update={"channels": 1}), store)[0].content
    )


def test_the_crop_holds_the_body_of_every_channel(two: Case, tmp_path: Path) -> None:
    """The box of both bodies together, for image and label."""
    same = TWO.model_copy(update={"spacing": (0.8, 1.1, 2.5), "orientation": None})
    assert two.label
    found = prepare(read_nifti(two.image), read_label(two.label), same, [read_nifti(two.others[0])])
    first, second = (mr(0) > 100, mr(1, shift=2, unit=3.3) > 330)
    box = tuple(slice(hits.min(), hits.max() + 1) for hits in np.nonzero(first | second))
    assert found.image.shape == (2, *(first[box]).shape)
    assert found.label is not None
    np.testing.assert_array_equal(found.label, organ_labels(SHAPE, 3)[box])


@pytest.mark.parametrize("axes", ["RAS", "LPS", "PIR"])
def test_a_channel_with_axes_of_its_own_is_turned(two: Case, tmp_path: Path, axes: str) -> None:
    """The same voxels are stored, whatever the order of the file's axes."""
    store = Store(tmp_path / "store")
    expected = stored(store, prepare_case(two, TWO, store)[0])["image"]
    second = nib.load(two.others[0])
    turn = nib.orientations.ornt_transform(nib.io_orientation(second.affine), nib.orientations.axcodes2ornt(axes))
    nib.save(second.as_reoriented(turn), tmp_path / "turned.nii")
    volume, _ = prepare_case(replace(two, others=(tmp_path / "turned.nii",)), TWO, store)
    np.testing.assert_array_equal(stored(store, volume)["image"], expected)


SPOILT: dict[str, tuple[Callable[[Path], object], str]] = {
    "other grid": (
        lambda path: write_nifti(path, mr(1), oblique_affine((0.8, 1.1, 2.5), 20)),
        "{second}: the channel's affine puts its voxels up to",
    ),
    "other shape": (
        lambda path: write_nifti(path, mr(1)[:, :-1], AFFINE),
        "{second}: the channel has shape (12, 13, 9), its image (12, 14, 9)",
    ),
    "constant": (
        lambda path: write_nifti(path, mr(1) * 0, AFFINE),
        "{first} and {second}: no scan to normalise: 1 distinct values, 0 to 0",
    ),
    "cut off": (lambda path: path.write_bytes(path.read_bytes()[:300]), "{second}: "),
}


@pytest.mark.parametrize("kind", SPOILT)
def test_a_channel_that_does_not_fit_is_refused(two: Case, tmp_path: Path, kind: str) -> None:
    """Its file is named, and nothing is stored."""
    spoil, text = SPOILT[kind]
    spoil(two.others[0])
    with pytest.raises(UserError) as caught:
        prepare_case(two, TWO, Store(tmp_path / "store"))
    assert str(caught.value).startswith(text.format(first=two.image, second=two.others[0]))
    assert not list((tmp_path / "store").rglob("*.npy"))


def test_the_key_covers_the_channels_and_their_order(two: Case, tmp_path: Path) -> None:
    """Exchanged, or with another second one, it is another volume."""
    store = Store(tmp_path / "store")
    another = write_nifti(tmp_path / "t3.nii.gz", mr(2), AFFINE)
    exchanged = replace(two, image=two.others[0], others=(two.image,))
    keys = {prepare_case(case, TWO, store)[0].key for case in (two, exchanged, replace(two, others=(another,)))}
    assert len(keys) == 3
    assert prepare_case(two, TWO, store)[1] is False


def test_patches_have_all_channels(two: Case, tmp_path: Path) -> None:
    """Beyond a volume that is shorter than the patch, all channels are 0 for the network, the mean."""
    store = Store(tmp_path / "store")
    volume, _ = prepare_case(two, TWO, store)
    side = (16, 16, 16)
    assert max(volume.shape) < 16
    table = SampleTable(0, np.array([volume.shape]), side, 2, 2, 1)
    feed = Feed(table, store, (volume.key,), ("two",), volume.dtype, volume.levels)
    patches = feed.read([table.sample(0), table.sample(1)])
    assert (patches.shape, patches.dtype) == ((2, 2, *side), np.int16)
    images = scale(torch.from_numpy(patches), feed.levels)
    image = np.load(store.path(volume.key, "image.npy"))
    inside = tuple(slice((16 - n) // 2, (16 - n) // 2 + n) for n in volume.shape)
    np.testing.assert_allclose(images[0][:, *inside].numpy(), image / 4000, atol=1e-5)
    outside = torch.ones(side, dtype=torch.bool)
    outside[inside] = False
    assert (images[:, :, outside] == 0).all()
    assert torch.equal(images[0], images[1])


def test_one_channel_is_read_as_before() -> None:
    """Patches of a volume without an axis for channels have none, and become (B, 1, X, Y, Z) in 0..1."""
    volume = np.arange(60, dtype=np.uint8).reshape(3, 4, 5)
    patch = read_patch(volume, (0, 1, 0), (3, 3, 5))
    np.testing.assert_array_equal(patch, volume[:, 1:])
    images = scale(torch.from_numpy(patch[None]), 255)
    assert (images.shape, images.dtype) == ((1, 1, 3, 3, 5), torch.float32)
    np.testing.assert_allclose(images[0, 0].numpy(), patch / 255, rtol=2e-7)


def test_fine_tuning_patches_have_all_channels(two: Case, tmp_path: Path) -> None:
    """Image and label are cut and turned together; background centres lie in the body of a channel."""
    store = Store(tmp_path / "store")
    volume, _ = prepare_case(two, TWO, store)
    tree = {
        "cohort": {"root": "x", "classes": 3, "splits": {1: "x.json"}},
        "preparation": TWO.model_dump(),
        "patch_size": 16,
        "augmentation": {"flip_prob": 0.5, "rotate_prob": 0.5, "shift_prob": 0},
    }
    sampler = PatchSampler((volume,), store, Finetune.model_validate(tree), 0)
    image, label = (np.load(store.path(volume.key, f"{name}.npy")) for name in ("image", "label"))
    there = set(zip(*image.reshape(2, -1).tolist(), label.ravel().tolist(), strict=True)) | {(0, 0, 0)}
    images, labels = sampler.batch(0)
    assert (images.shape, labels.shape) == ((4, 2, 16, 16, 16), (4, 1, 16, 16, 16))
    for one, truth in zip(images * 4000, labels, strict=True):
        assert set(zip(*one.round().int().reshape(2, -1).tolist(), truth.flatten().tolist(), strict=True)) <= there
    centres = [sampler._centre(volume, image, label, np.random.default_rng(seed)) for seed in range(200)]
    outside = [centre for centre in centres if label[centre] == 0]
    assert outside
    assert all((image[:, *centre] > np.array(volume.body)).any() for centre in outside)


@pytest.mark.parametrize("channels", [1, 3])
def test_a_view_has_the_same_boxes_in_every_channel(channels: int) -> None:
    """The first channel is corrupted as alone, the others at the same voxels, with noise of their own range."""
    settings = Corruption(inpaint_size=(2, 6), outpaint_size=(4, 10), shuffle_size=3)
    offsets = 10.0 * torch.arange(channels)[:, None, None, None]
    patches = torch.rand(8, channels, 16, 16, 16, generator=torch.Generator().manual_seed(0)) + offsets
    draws = draw(settings, (16, 16, 16), 5, np.arange(8))
    views = corrupt(patches, draws)
    assert views.shape == patches.shape
    assert torch.equal(views[:, :1], corrupt(patches[:, :1].contiguous(), draws))
    changed = views != patches
    for channel in range(1, channels):
        apart = (changed[:, channel] != changed[:, 0]).float().mean()
        assert apart < 0.01, "a voxel that keeps its place in a permutation, or noise of its own value"
        assert views[:, channel].min() >= patches[:, channel].min()
        assert views[:, channel].max() <= patches[:, channel].max()
        painted = changed[:, 0] & changed[:, channel]
        noise = [views[:, c][painted] - 10.0 * c for c in (0, channel)]
        assert abs(float(torch.corrcoef(torch.stack(noise))[0, 1])) < 0.05
