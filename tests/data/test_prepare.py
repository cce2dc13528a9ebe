"""Preparing cohorts: a volume is right under its key, prepared once, and named where it is bad."""

import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from volumes import (
    AFFINE,
    PREPARATION,
    SHAPE,
    files,
    make_case,
    oblique_affine,
    organ_labels,
    small_disk,
    smooth_ct,
    stored,
    write_nifti,
)

from ssl_ray.config.schema import Preparation
from ssl_ray.data import prepare as cache
from ssl_ray.data.datalist import Case
from ssl_ray.data.nifti import read_label, read_nifti
from ssl_ray.data.normalisations.window.settings import Window
from ssl_ray.data.normalise import VERSION, prepare
from ssl_ray.data.prepare import prepare_case, prepare_cohort
from ssl_ray.data.store import Store
from ssl_ray.errors import UserError


def test_what_is_stored_is_what_prepare_gives(store: Store, case: Case) -> None:
    """Arrays and manifest are those of the prepared volume, and the manifest comes back as it was written."""
    volume, fresh = prepare_case(case, PREPARATION, store)
    assert fresh
    assert case.label
    expected = prepare(read_nifti(case.image), read_label(case.label), PREPARATION)
    assert expected.label is not None
    arrays = stored(store, volume)
    np.testing.assert_array_equal(arrays["image"], expected.image)
    np.testing.assert_array_equal(arrays["label"], expected.label)
    assert store.get(volume.key) == volume
    assert volume.shape == expected.image.shape
    assert volume.spacing == PREPARATION.spacing
    assert (volume.levels, volume.channels) == (65535, 1)
    assert (volume.intensities, volume.body) == (((-175, 250),), (0,))
    assert volume.normalise == {"kind": "window", "hu_window": [-175, 250]}
    assert volume.dtype == arrays["image"].dtype == np.uint16
    assert volume.original_shape == SHAPE
    np.testing.assert_array_equal(volume.affine, expected.affine)
    values, counts = np.unique(expected.label, return_counts=True)
    assert volume.largest_label == 3
    assert volume.label_voxels == {str(v): c for v, c in zip(values.tolist(), counts.tolist(), strict=True)}
    assert sum(volume.label_voxels.values()) == expected.image.size


def test_an_unlabelled_volume_has_no_label_files(store: Store, tmp_path: Path) -> None:
    """Only image and manifest are stored where there is no label."""
    volume, _ = prepare_case(make_case(tmp_path, labelled=False), PREPARATION, store)
    assert [Path(name).name for name in files(store)] == ["image.npy", "manifest.json"]
    assert volume.label_source is None
    assert (volume.label_voxels, volume.largest_label) == ({}, 0)


@pytest.mark.usefixtures("ray_cluster")
def test_a_volume_that_kills_its_process_is_a_bad_one(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As one does that the memory does not hold: the others are prepared all the same, and it is named."""
    cases = [make_case(tmp_path, name, seed) for seed, name in enumerate("ab")]

    def deadly(case: Case, *given: Any) -> Any:
        return os.kill(os.getpid(), 9) if case.id == "b" else prepare_case(case, *given)

    monkeypatch.setattr(cache, "prepare_case", deadly)
    volumes, bad, fresh = prepare_cohort(cases, PREPARATION, store, classes=4)
    assert ([*volumes], fresh) == ([str(cases[0].image)], 1)
    assert [one.image for one in bad] == [str(cases[1].image)]
    assert "its process was killed 5 times" in bad[0].reason


def test_a_prepared_volume_is_found_again(store: Store, case: Case) -> None:
    """The second time nothing is written."""
    volume, _ = prepare_case(case, PREPARATION, store)
    before = {name: (store.folder / name).stat() for name in files(store)}
    again, fresh = prepare_case(case, PREPARATION, store)
    assert not fresh
    assert again == volume
    after = {name: (store.folder / name).stat() for name in files(store)}
    assert {name: (stat.st_ino, stat.st_mtime_ns) for name, stat in after.items()} == {
        name: (stat.st_ino, stat.st_mtime_ns) for name, stat in before.items()
    }


def changed_voxel(path: Path | None) -> Path:
    """The file again, one voxel one larger."""
    assert path
    array = read_nifti(path).voxels.astype(np.int16)
    array[6, 7, 4] += 1
    return write_nifti(path, array, AFFINE)


def another_channel(case: Case) -> Path:
    """A second one for it, on its grid."""
    return write_nifti(case.image.with_name("second.nii.gz"), smooth_ct(SHAPE, 5), AFFINE)


TWO = PREPARATION.model_copy(update={"channels": 2})
CHANGES: dict[str, Callable[[Case], tuple[Case, Preparation]]] = {
    "orientation": lambda case: (case, PREPARATION.model_copy(update={"orientation": "LPS"})),
    "no orientation": lambda case: (case, PREPARATION.model_copy(update={"orientation": None})),
    "spacing": lambda case: (case, PREPARATION.model_copy(update={"spacing": (1.5, 1.5, 2.5)})),
    "normalise": lambda case: (case, PREPARATION.model_copy(update={"normalise": Window(hu_window=(-175, 251))})),
    "channels": lambda case: (replace(case, others=(another_channel(case),)), TWO),
    "crop_foreground": lambda case: (case, PREPARATION.model_copy(update={"crop_foreground": False})),
    "image": lambda case: (replace(case, image=changed_voxel(case.image)), PREPARATION),
    "label": lambda case: (replace(case, label=changed_voxel(case.label)), PREPARATION),
    "without label": lambda case: (Case(case.id, case.image), PREPARATION),
}


def test_the_changes_cover_every_parameter() -> None:
    """A new preparation parameter needs a place in the test of the key."""
    assert set(Preparation.model_fields) <= set(CHANGES)


@pytest.mark.parametrize("change", CHANGES)
def test_the_key_covers_content_and_parameters(store: Store, case: Case, change: str) -> None:
    """Another parameter, image or label is another volume; the old one stays."""
    first, _ = prepare_case(case, PREPARATION, store)
    other, fresh = prepare_case(*CHANGES[change](case), store)
    assert fresh
    assert other.key != first.key
    assert store.get(first.key) == first


def test_the_key_covers_the_version(store: Store, case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    """What an older preparation stored is not taken for the result of a newer one."""
    first, _ = prepare_case(case, PREPARATION, store)
    monkeypatch.setattr(cache, "VERSION", VERSION + 1)
    other, fresh = prepare_case(case, PREPARATION, store)
    assert fresh
    assert other.key != first.key


def test_the_key_does_not_cover_name_and_place(store: Store, case: Case, tmp_path: Path) -> None:
    """A cohort that was moved or renamed is not prepared again, and its volumes name the files as they are now."""
    assert case.label
    first, _ = prepare_case(case, PREPARATION, store)
    moved = Case("other", tmp_path / "moved" / "other.nii.gz", tmp_path / "moved" / "label.nii.gz")
    assert moved.label
    (tmp_path / "moved").mkdir()
    case.image.rename(moved.image)
    case.label.rename(moved.label)
    again, fresh = prepare_case(moved, PREPARATION, store)
    assert not fresh
    assert (again.key, again.files) == (first.key, first.files)
    assert (again.id, again.image_source, again.label_source) == ("other", str(moved.image), str(moved.label))


def test_sources_that_have_not_changed_are_not_read_again(
    store: Store, case: Case, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Size and time stand for the content until either changes; a young file and `verify` trust nothing."""
    assert case.label
    read: list[Path] = []
    monkeypatch.setattr(cache, "read_file", lambda path: (read.append(path), path.read_bytes())[1])
    volume, _ = prepare_case(case, PREPARATION, store)
    read.clear()
    assert prepare_case(case, PREPARATION, store) == (volume, False)
    assert read == [case.image, case.label], "written a moment ago"
    for path in (case.image, case.label):
        os.utime(path, (1e9, 1e9))
    prepare_case(case, PREPARATION, store)
    read.clear()
    assert prepare_case(case, PREPARATION, store) == (volume, False)
    assert read == []
    assert prepare_case(case, PREPARATION, store, verify=True) == (volume, False)
    assert read == [case.image, case.label]
    other, fresh = prepare_case(case, PREPARATION.model_copy(update={"spacing": (3, 3, 3)}), store)
    assert (fresh, other.content) == (True, volume.content)
    os.utime(case.image, (1e9, 1e9 + 1))
    read.clear()
    assert prepare_case(case, PREPARATION, store) == (volume, False)
    assert read == [case.image, case.label]
    write_nifti(case.image, smooth_ct(SHAPE, 5), AFFINE)
    changed, fresh = prepare_case(case, PREPARATION, store)
    assert fresh
    assert changed.key != volume.key


@pytest.mark.usefixtures("ray_cluster")
def test_a_full_disk_ends_the_preparation_and_keeps_what_there_is(tmp_path: Path) -> None:
    """The error is one line with the store's place; the volumes that fitted are whole, and there is no half one."""
    small = make_case(tmp_path)
    large = Case("large", write_nifti(tmp_path / "large.nii.gz", smooth_ct((90, 90, 40)), AFFINE))
    with small_disk(tmp_path / "disk", "size=64k") as disk:
        store = Store(disk / "store")
        volume, _ = prepare_case(small, PREPARATION, store)
        with pytest.raises(ValueError, match=r"^\S+/disk/store: cannot write a volume: No space left on device$"):
            prepare_cohort([large, small], PREPARATION, store)
        assert store.get(volume.key, verify=True) == volume
        assert len([name for name in files(store) if not name.startswith("sources/")]) == 4
        assert not list(store.folder.glob("tmp-*"))


def bad_case(folder: Path, kind: str) -> tuple[Case, str]:
    case = make_case(folder, kind)
    assert case.label
    match kind:
        case "truncated":
            case.image.write_bytes(case.image.read_bytes()[:-100])
            return case, f"{case.image}: Compressed file ended before"
        case "missing":
            case.image.unlink()
            return case, f"{case.image}: cannot read: No such file"
        case "no label":
            case.label.unlink()
            return case, f"{case.label}: cannot read: No such file"
        case "other grid":
            write_nifti(case.label, organ_labels(SHAPE), oblique_affine((0.8, 1.1, 2.5), 20))
            return case, f"{case.label}: the label's affine puts its voxels up to"
        case "fractions":
            write_nifti(case.label, np.full(SHAPE, 0.5, np.float32), AFFINE)
            return case, f"{case.label}: label values must be integers"
        case _:
            write_nifti(case.image, np.full(SHAPE, -1000, np.int16), AFFINE)
            return case, f"{case.image}: not a CT in HU: the values are -1000 to -1000, 0.0% of them inside the window"


BAD = ["truncated", "missing", "no label", "other grid", "fractions", "air"]


@pytest.mark.parametrize("kind", BAD)
def test_a_bad_volume_is_named_and_not_stored(store: Store, tmp_path: Path, kind: str) -> None:
    """The file at fault is named, be it the image or the label, and the store stays empty."""
    case, reason = bad_case(tmp_path, kind)
    with pytest.raises(ValueError, match=r"\S") as caught:
        prepare_case(case, PREPARATION, store)
    assert str(caught.value).startswith(reason)
    assert not store.folder.exists() or files(store) == []


@pytest.mark.usefixtures("ray_cluster")
def test_a_cohort_is_prepared_but_for_its_bad_volumes(
    store: Store, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Bad volumes among good ones are reported by id and reason; the good ones are stored, once."""
    good = [make_case(tmp_path, f"good{seed}", seed) for seed in range(5)]
    copy = make_case(tmp_path, "copy", 0)  # the same bytes as good0
    bad = [bad_case(tmp_path, kind) for kind in BAD]
    cases = [case for pair in zip(good, bad, strict=False) for case in (pair[0], pair[1][0])]
    cases += [bad[-1][0], copy]
    volumes, unusable, fresh = prepare_cohort(cases, PREPARATION, store, classes=4)
    assert f"preparing labelled volumes {len(cases)}/{len(cases)}" in capsys.readouterr().out
    assert {one.id: one.reason.startswith(reason) for one, (_, reason) in zip(
        unusable, sorted(bad, key=lambda pair: pair[0].id), strict=True
    )} == dict.fromkeys(sorted(BAD), True)  # fmt: skip
    assert set(volumes) == {str(case.image) for case in (*good, copy)}
    assert fresh in (5, 6), "the copy may be prepared at the same time as its original"
    assert volumes[str(copy.image)].key == volumes[str(good[0].image)].key
    for case in (*good, copy):
        volume = volumes[str(case.image)]
        assert (volume.id, volume.image_source, volume.label_source) == (case.id, str(case.image), str(case.label))
        assert prepare_case(case, PREPARATION, store) == (volume, False)

    for _ in range(2):  # sources too young to be remembered, and remembered ones
        again, unusable_again, fresh = prepare_cohort(cases, PREPARATION, store, classes=4)
        assert fresh == 0
        assert (again, unusable_again) == (volumes, unusable)
        for case in good:
            os.utime(case.image, (1e9, 1e9))

    few, unusable, fresh = prepare_cohort([*good, copy], PREPARATION, store, classes=3)
    assert (few, fresh) == ({}, 0)
    assert [one.id for one in unusable] == ["copy", *[f"good{seed}" for seed in range(5)]]
    for one, case in zip(unusable, (copy, *good), strict=True):
        assert one.reason == f"{case.label}: label 3 is beyond the 3 classes (0..2)"


def old_cases(folder: Path) -> list[Case]:
    """Five, whose files are old enough to be remembered."""
    cases = [make_case(folder, f"case{seed}", seed) for seed in range(5)]
    for case in cases:
        assert case.label
        os.utime(case.image, (1e9, 1e9))
        os.utime(case.label, (1e9, 1e9))
    return cases


def test_what_is_known_is_not_sent_to_the_cluster(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Known is what has not changed, source, label or array; with `verify`, nothing is."""
    cases = old_cases(tmp_path)
    volumes = {str(case.image): prepare_case(case, PREPARATION, store)[0] for case in cases}
    sent: list[str] = []

    def here(rest: Sequence[Case], *options: Any) -> Iterator[tuple[Case, Any]]:
        sent.extend(case.id for case in rest)
        return ((case, prepare_case(case, *options)) for case in rest)

    monkeypatch.setattr("ssl_ray.data.prepare._prepared_on_cluster", here)
    assert prepare_cohort(cases, PREPARATION, store, classes=4) == (volumes, [], 0)
    assert sent == []
    os.utime(cases[1].image, (2e9, 2e9))
    assert cases[2].label
    os.utime(cases[2].label, (2e9, 2e9))
    (store.path(volumes[str(cases[3].image)].key) / "image.npy").unlink()
    assert prepare_cohort(cases, PREPARATION, store, classes=4) == (volumes, [], 1)
    assert sent == ["case1", "case2", "case3"]
    assert prepare_cohort(cases, PREPARATION, store, classes=4, verify=True) == (volumes, [], 0)
    assert sent[3:] == [case.id for case in cases]


def test_a_store_that_is_away_is_told_at_the_first_look(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither is every volume asked for, each until a time-out, nor the cluster asked for the same again."""
    cases = old_cases(tmp_path)
    for case in cases:
        prepare_case(case, PREPARATION, store)
    asked: list[str] = []

    def away(_: Store, key: str, verify: bool = False) -> None:
        asked.append(key)
        time.sleep(0.1)
        raise OSError("the store does not answer")

    monkeypatch.setattr(Store, "get", away)
    monkeypatch.setattr(cache, "_AT_ONCE", 1)
    monkeypatch.setattr(cache, "_prepared_on_cluster", lambda *_: pytest.fail("asked the cluster"))
    with pytest.raises(UserError, match="the store does not answer"):
        prepare_cohort(cases, PREPARATION, store, classes=4)
    assert len(asked) < len(cases)


def test_a_structure_that_does_not_survive_the_resampling_still_counts(store: Store, tmp_path: Path) -> None:
    """The largest label is that of the file, as the evaluation reads the file."""
    case = make_case(tmp_path)
    assert case.label
    array = np.zeros(SHAPE, np.uint8)
    array[0, 0, 0] = 200  # in the rim that the crop takes off
    write_nifti(case.label, array, AFFINE)
    volume, _ = prepare_case(case, PREPARATION, store)
    assert volume.largest_label == 200
    assert set(volume.label_voxels) == {"0"}
