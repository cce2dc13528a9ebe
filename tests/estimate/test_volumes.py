"""Volumes and their bytes, out of datalists, manifests and headers."""

import gzip
import json
import os
import re
from pathlib import Path
from typing import Literal

import numpy as np
import pytest
from planned import write
from volumes import oblique_affine, smooth_ct

from ssl_ray.config.schema import PhantomCohort, Preparation, Study
from ssl_ray.data.datalist import Case, read_unlabelled
from ssl_ray.data.nifti import Nifti
from ssl_ray.data.normalise import prepare
from ssl_ray.data.prepare import prepare_case
from ssl_ray.data.resample import canonical_grid
from ssl_ray.data.store import Store
from ssl_ray.errors import UserError
from ssl_ray.estimate.volumes import Group, survey
from ssl_ray.phantom.cohort import write_cohort
from ssl_ray.study.experiment import load
from ssl_ray.study.parts import folders_of

_HEADER = 128
"""Bytes that `.npy` has before its array."""


def found(study: Study) -> dict[str, Group]:
    return survey(study, folders_of(study))


def images(cohort: Path, section: str = "training", listed: str = "unlabelled.json") -> list[Path]:
    return [cohort / entry["image"] for entry in json.loads((cohort / listed).read_text())[section]]


def prepare_all(study: Study, paths: list[Path], place: Path | str) -> int:
    """Put volumes into a store as a run does, and return their bytes there."""
    store, size = Store(place), 0
    for path in paths:
        os.utime(path, (0, 0))  # what was just written might be written to again, and is not remembered
        volume, _ = prepare_case(Case(path.name, path), study.pretrain.preparation, store)
        size += sum(count for count, _ in volume.files.values())
    return size


def test_a_cohort_is_counted_by_section(cohort: Path, tmp_path: Path) -> None:
    """A labelled volume that is in both splits counts once."""
    groups = found(load(write(tmp_path, cohort), []))
    assert {name: group.volumes for name, group in groups.items()} == {
        "unlabelled training": 4,
        "unlabelled validation": 2,
        "labelled training": 4,
        "labelled validation": 2,
        "labelled test": 1,
    }


@pytest.mark.parametrize("orientation", ["RAS", None])
def test_the_prepared_grid_is_told_by_the_header_alone(orientation: Literal["RAS"] | None) -> None:
    """Oblique, flipped, stored along other axes: the shape is what the preparation makes."""
    preparation = Preparation(
        orientation=orientation, spacing=(2.0, 3.0, 5.0), hu_window=(-1000, 200), crop_foreground=False
    )
    for order in ([0, 1, 2], [2, 0, 1]):
        affine = oblique_affine((1.5, 2.0, 3.0), 12, flip=True)[:, [*order, 3]]
        voxels = np.ascontiguousarray(smooth_ct((20, 24, 28)).transpose(order)).astype(np.float32)
        made = prepare(Nifti(voxels, affine), None, preparation)
        assert canonical_grid(voxels.shape, affine, preparation).shape == made.image.shape


@pytest.mark.parametrize("crop", [False, True])
def test_headers_tell_the_bytes_before_the_crop(cohort: Path, tmp_path: Path, crop: bool) -> None:
    """To the byte where nothing is cropped, for oblique volumes of any stored axes; an upper bound where it is."""
    options = [f"pretrain.preparation.crop_foreground={json.dumps(crop)}"]
    study = load(write(tmp_path, cohort), options)
    group = found(study)["unlabelled training"]
    size = prepare_all(study, images(cohort), tmp_path / "elsewhere") - 4 * _HEADER
    assert group.missing_bytes is not None
    assert group.prepared == 0
    assert (0.5 * group.missing_bytes < size < group.missing_bytes) if crop else size == group.missing_bytes


def test_what_the_store_holds_is_exact(cohort: Path, tmp_path: Path) -> None:
    """Bytes of the manifests instead of headers; with another preparation they do not count."""
    path = write(tmp_path, cohort)
    study = load(path, [])
    size = prepare_all(study, images(cohort), folders_of(study).cache)
    group = found(study)["unlabelled training"]
    assert (group.prepared, group.stored_bytes, group.missing_bytes) == (4, size, 0)
    for change in ("spacing=5", "crop_foreground=false"):
        other = found(load(path, [f"pretrain.preparation.{change}"]))["unlabelled training"]
        assert (other.prepared, other.stored_bytes) == (0, 0)


def test_the_bytes_of_two_channels(tmp_path: Path) -> None:
    """To the byte by headers, and as many in the store; what was stored with other settings does not count."""
    root, numbers = tmp_path / "mri", {"unlabelled": 3, "labelled": 1, "validation": 1, "test": 1}
    write_cohort(PhantomCohort(root=str(root), splits=(1,), modality="MRI", **numbers))
    preparation = {"spacing": 9, "normalise": "percentile", "channels": 2, "crop_foreground": False}
    cohort = {"root": str(root), "classes": 14, "splits": {1: "labelled_1.json"}}
    finetune = {"preparation": preparation, "cohort": cohort}
    path = write(tmp_path, root, pretrain={"preparation": preparation}, finetune=finetune)
    study = load(path, [])
    group = found(study)["unlabelled training"]
    store, size = Store(folders_of(study).cache), 0
    for case in read_unlabelled(study.pretrain.sources)[0]:
        for image in case.images:
            os.utime(image, (0, 0))
        size += prepare_case(case, study.pretrain.preparation, store)[0].files["image.npy"][0]
    assert (group.volumes, group.prepared, group.missing_bytes) == (1, 0, size - _HEADER)
    group = found(study)["unlabelled training"]
    assert (group.prepared, group.stored_bytes, group.missing_bytes) == (1, size, 0)
    assert found(load(path, ["pretrain.preparation.normalise=zscore"]))["unlabelled training"].prepared == 0


def test_a_synthetic_cohort_is_counted_before_it_is_made(cohort: Path, tmp_path: Path) -> None:
    """Its numbers are known, its sizes are not; nothing is written."""
    numbers = {"unlabelled": 6, "labelled": 4, "validation": 2, "test": 1, "splits": [2, 4], "seed": 1}
    before, after = (
        found(load(write(tmp_path, root, phantom={"root": str(root), **numbers}), []))
        for root in (tmp_path / "absent", cohort)
    )
    assert {name: group.volumes for name, group in before.items()} == {
        name: group.volumes for name, group in after.items()
    }
    assert all(group.missing_bytes is None and group.shape is None for group in before.values())
    assert all(group.missing_bytes and group.shape for group in after.values())
    assert not (tmp_path / "absent").exists()


def test_a_bad_header_is_named(cohort: Path, tmp_path: Path) -> None:
    """As a run would; where that skips bad volumes, the others are measured all the same."""
    root = tmp_path / "bad"
    for path in images(cohort) + images(cohort, "validation"):
        target = root / path.relative_to(cohort)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(path.read_bytes())
    broken = root / images(cohort)[0].relative_to(cohort)
    broken.write_bytes(gzip.compress(b"not a NIfTI"))
    (root / "unlabelled.json").write_text((cohort / "unlabelled.json").read_text())
    own = {"sources": [{"root": str(root), "datalist": "unlabelled.json"}]}
    with pytest.raises(UserError, match=re.escape(str(broken))):
        found(load(write(tmp_path, cohort, pretrain=own), []))
    group = found(load(write(tmp_path, cohort, pretrain=own, on_bad_volume="skip"), []))["unlabelled training"]
    assert group.missing_bytes is not None
    assert group.missing_bytes > 0


def test_a_warm_up_longer_than_the_pretraining_is_refused(cohort: Path, tmp_path: Path) -> None:
    """As a run does, which knows the number of steps when it has read the lists."""
    with pytest.raises(UserError, match=r"pretrain\.optimizer"):
        found(load(write(tmp_path, cohort), ["pretrain.optimizer.warmup_steps=1000"]))
