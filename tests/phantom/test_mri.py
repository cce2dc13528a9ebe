"""The same bodies seen by MRI: two channels of no unit, on the grid and with the labels of the CT."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from studies import small_study
from tiny_learner import MASKED

from ssl_ray.config.schema import LabelledCohort, PhantomCohort, Preparation, Source
from ssl_ray.data.consistency import check_lists
from ssl_ray.data.datalist import Case, read_unlabelled
from ssl_ray.data.normalise import metadata
from ssl_ray.data.prepare import prepare_case
from ssl_ray.data.splits import Splits, read_labelled
from ssl_ray.data.store import Store
from ssl_ray.errors import UserError
from ssl_ray.finetune.learner import SegmentationLearner
from ssl_ray.finetune.patches import PatchSampler
from ssl_ray.networks.weight_files import load_metadata
from ssl_ray.phantom.cohort import synthesize, write_cohort
from ssl_ray.pretrain.driver import feed_of
from ssl_ray.pretrain.job import Job
from ssl_ray.pretrain.learner import PretrainingLearner
from ssl_ray.storage.mirror import Mirror
from ssl_ray.study.parts import folders_of, recipe_of

Lists = tuple[tuple[Case, ...], tuple[Case, ...], Splits]
NUMBERS: dict[str, Any] = {"unlabelled": 3, "labelled": 1, "validation": 1, "test": 1, "splits": (1,), "seed": 3}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("mri")
    write_cohort(PhantomCohort(root=str(folder), **NUMBERS, modality="MRI"))
    return folder


@pytest.fixture(scope="module")
def lists(root: Path) -> Lists:
    splits = read_labelled(LabelledCohort(root=str(root), classes=14, splits={1: "labelled_1.json"}), (1,))
    return *read_unlabelled([Source(root=str(root), datalist="unlabelled.json")]), splits


def test_it_is_the_patient_of_the_ct() -> None:
    """A pure function of seed and index; labels, grid and pose are those of the CT, the images are not."""
    first, again = (synthesize(5, 2, spacing=8, modality="MRI") for _ in range(2))
    assert [one.to_bytes() for one in first] == [one.to_bytes() for one in again]
    ct, label = synthesize(5, 2, spacing=8)
    t1, t2, same = first
    assert same.to_bytes() == label.to_bytes()
    for image in (t1, t2):
        np.testing.assert_array_equal(image.affine, ct.affine)
        assert (image.shape, image.get_data_dtype()) == (ct.shape, np.int16)


def test_there_is_no_unit() -> None:
    """The same tissue has quite another value in another volume, and at the other end of one volume."""
    fat, within = [], []
    for index in range(6):
        hu = np.asarray(synthesize(1, index, spacing=8)[0].dataobj)
        for image in synthesize(1, index, spacing=8, modality="MRI")[:2]:
            voxels = np.asarray(image.dataobj, np.float32)[(hu > -130) & (hu < -80)]
            fat.append(np.median(voxels))
            within.append(np.percentile(voxels, 95) / np.percentile(voxels, 5))
            assert voxels.min() >= 0
    assert max(fat) > 5 * min(fat)
    assert np.median(within) > 1.3, "the bias field"


def test_the_two_weightings_differ() -> None:
    """Fat is brighter than muscle in both, water is dark in T1 and bright in T2."""
    hu = np.asarray(synthesize(1, 0, spacing=8)[0].dataobj)
    t1, t2 = (np.asarray(one.dataobj, np.float32) for one in synthesize(1, 0, spacing=8, modality="MRI")[:2])
    muscle = (hu > 45) & (hu < 70)
    fat, water = (hu > -120) & (hu < -90), (hu > -5) & (hu < 15)
    for image in (t1, t2):
        assert np.median(image[fat]) > 1.3 * np.median(image[muscle])
    assert np.median(t1[water]) < np.median(t1[muscle])
    assert np.median(t2[water]) > np.median(t2[muscle])


def test_lists_and_files_are_those_of_two_channels(root: Path, lists: Lists) -> None:
    """Every list passes the checks of a study of two channels, and none of one."""
    training, validation, splits = lists
    assert [path.name for path in training[0].images] == ["phantom0003_t1.nii.gz", "phantom0003_t2.nii.gz"]
    check_lists(training, validation, splits, channels=2)
    with pytest.raises(UserError, match=r"must list as many images as preparation\.channels, 1, got 2"):
        check_lists(training, validation, splits)
    assert json.loads((root / "unlabelled.json").read_text())["modality"] == {"0": "t1", "1": "t2"}
    assert len(list((root / "images").iterdir())) == 12
    assert len(list((root / "labels").iterdir())) == 3


def test_a_cohort_of_ct_is_not_taken_for_one_of_mri(root: Path) -> None:
    """Nor the other way round: the folder says which it holds."""
    before = (root / "phantom.json").read_bytes()
    with pytest.raises(UserError, match=r"holds the cohort .*MRI"):
        write_cohort(PhantomCohort(root=str(root), **NUMBERS))
    write_cohort(PhantomCohort(root=str(root), **NUMBERS, modality="MRI"))
    assert (root / "phantom.json").read_bytes() == before


@pytest.mark.parametrize("kind", ["percentile", "zscore"])
def test_it_can_be_prepared(lists: Lists, tmp_path: Path, kind: str) -> None:
    """From files to the store: two channels of one contrast in all volumes, cropped, with every organ."""
    training, _, splits = lists
    preparation, store = Preparation(spacing=6, normalise=kind, channels=2), Store(tmp_path)
    brightest = []
    for case in (*training, *splits.test):
        volume, fresh = prepare_case(case, preparation, store)
        image = np.load(store.path(volume.key, "image.npy"))
        assert fresh
        assert image.shape == (2, *volume.shape)
        brightest += [np.percentile(channel, 99) / volume.levels for channel in image]
        if case.label:
            assert len(volume.label_voxels) >= 12
            label = np.load(store.path(volume.key, "label.npy"))
            body = (image > np.array(volume.body)[:, None, None, None]).any(axis=0)
            assert body[label > 0].mean() > 0.9, "all but the gas in the stomach"
    assert max(brightest) < 1.3 * min(brightest)


@pytest.mark.parametrize(("kind", "task"), [("percentile", {}), ("zscore", MASKED)], ids=["restoration", "masked"])
def test_both_trainings_take_two_channels(
    root: Path, lists: Lists, tmp_path: Path, kind: str, task: dict[str, Any]
) -> None:
    """From the store through a pretraining and its file of weights to a fine-tuning and the labels of a volume."""
    torch.set_num_threads(1)
    training, validation, splits = lists
    own = {"preparation": {"spacing": 6, "normalise": kind, "channels": 2}}
    study = small_study(tmp_path, root, pretrain=own | task | {"batch_size": 4, "epochs": 8}, finetune=own)
    store = Store(folders_of(study).cache)
    feeds = [
        feed_of(recipe_of(study), folders_of(study), [prepare_case(case, study.pretrain.preparation, store)[0]])
        for case in (training[0], validation[0])
    ]
    job = Job(recipe_of(study), *feeds, tmp_path, Mirror(tmp_path), "key", None)  # type: ignore[arg-type]
    learner, losses = PretrainingLearner(job, torch.device("cpu")), []
    for _ in range(10):
        indices = feeds[0].table.rank_samples(0, 0, 1)
        images = feeds[0].read([feeds[0].table.sample(index) for index in indices])
        assert images.shape == (4, 2, *study.pretrain.patch_size)
        losses.append(float(learner.step(images, np.array(indices), 1e-3)[0]))
    assert losses[-1] < 0.9 * losses[0]
    found = learner.validate(10, picture=True)
    assert Path(str(found["picture"])).is_file()
    assert load_metadata(job.weights).items() >= metadata(study.pretrain.preparation).items()

    volume = prepare_case(splits.training[1][0], study.finetune.preparation, store)[0]
    tuned = SegmentationLearner(study.finetune, study.network, torch.device("cpu"), 0, job.weights)
    images, labels = PatchSampler((volume,), store, study.finetune, 0).batch(0)
    losses = [float(tuned.step(images, labels, 1e-3)[0]) for _ in range(4)]
    assert losses[-1] < losses[0]
    image = torch.from_numpy(np.load(store.path(volume.key, "image.npy")) / np.float32(volume.levels))
    assert tuned.predict(image).shape == volume.shape
