"""The store of canonical arrays: right under its key, whole or absent, readable patch by patch."""

import json
import multiprocessing
import os
import resource
import subprocess
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from monai.transforms import SpatialPad
from volumes import (
    AFFINE,
    PREPARATION,
    SHAPE,
    Array,
    make_case,
    oblique_affine,
    organ_labels,
    small_disk,
    smooth_ct,
    write_nifti,
)

from ssl_ray.config.schema import Preparation
from ssl_ray.data import prepare as cache
from ssl_ray.data import store as store_module
from ssl_ray.data.canonical import VERSION, prepare
from ssl_ray.data.datalist import Case
from ssl_ray.data.nifti import read_label, read_nifti
from ssl_ray.data.prepare import prepare_case, prepare_cohort
from ssl_ray.data.store import Store, Volume, foreground_index, open_array, read_patch
from ssl_ray.storage.places import Place


def files(store: Store) -> list[str]:
    return sorted(path.relative_to(store.folder).as_posix() for path in store.folder.rglob("*") if path.is_file())


def stored(store: Store, volume: Volume) -> dict[str, Array]:
    """The arrays of a volume, read without the cache of open files."""
    return {name: np.load(store.path(volume.key, f"{name}.npy")) for name in ("image", "label", "foreground")}


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "store")


@pytest.fixture
def case(tmp_path: Path) -> Case:
    return make_case(tmp_path)


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
    assert volume.levels == 65535
    assert volume.dtype == arrays["image"].dtype == np.uint16
    assert volume.box == expected.box
    assert volume.original_shape == SHAPE
    np.testing.assert_array_equal(volume.affine, expected.affine)
    np.testing.assert_array_equal(volume.original_affine, expected.original_affine)
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


CHANGES: dict[str, Callable[[Case], tuple[Case, Preparation]]] = {
    "orientation": lambda case: (case, PREPARATION.model_copy(update={"orientation": "LPS"})),
    "no orientation": lambda case: (case, PREPARATION.model_copy(update={"orientation": None})),
    "spacing": lambda case: (case, PREPARATION.model_copy(update={"spacing": (1.5, 1.5, 2.5)})),
    "hu_window": lambda case: (case, PREPARATION.model_copy(update={"hu_window": (-175.0, 251.0)})),
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


@pytest.mark.parametrize("target", ["Path.mkdir", "array", "Path.rename", "os.fsync"])
def test_an_interrupted_put_leaves_no_volume(
    store: Store, case: Case, monkeypatch: pytest.MonkeyPatch, target: str
) -> None:
    """Wherever writing stops, nothing is found under the key, and the next run completes it."""
    owner, name = {
        "Path.mkdir": (Path, "mkdir"),
        "array": (store_module, "_write_array"),
        "Path.rename": (Path, "rename"),
        "os.fsync": (os, "fsync"),
    }[target]

    def fail(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(owner, name, fail)
        with pytest.raises(OSError, match="No space left"):
            prepare_case(case, PREPARATION, store)
    assert not store.folder.exists() or (files(store) == [] and not list(store.folder.glob("tmp-*")))
    volume, fresh = prepare_case(case, PREPARATION, store)
    assert fresh
    assert store.get(volume.key) == volume


def die_while_saving(case: Case, store: Store) -> None:
    saves = iter(range(10))
    sync = os.fsync

    def stop(file: int) -> None:
        if next(saves) == 1:
            os._exit(9)  # as after SIGKILL, nothing is cleaned up
        sync(file)

    os.fsync = stop  # type: ignore[assignment]
    prepare_case(case, PREPARATION, store)


def test_a_killed_put_leaves_no_volume(store: Store, case: Case) -> None:
    """A process that dies while it writes leaves only what a day later is removed."""
    process = multiprocessing.get_context("fork").Process(target=die_while_saving, args=(case, store))
    process.start()
    process.join()
    assert process.exitcode == 9
    (left,) = store.folder.iterdir()
    assert left.name.startswith("tmp-")
    volume, fresh = prepare_case(case, PREPARATION, store)
    assert fresh
    store.remove_stale()
    assert left.is_dir(), "it might be the work of a run that goes on"
    yesterday = time.time() - 25 * 3600
    os.utime(left, (yesterday, yesterday))
    store.remove_stale()
    assert not left.exists()
    assert store.get(volume.key) == volume


def edited(path: Path) -> None:
    path.write_text(path.read_text().replace('"levels": 65535', '"levels": 255'))


def of_the_first_format(path: Path) -> None:
    tree = json.loads(path.read_text())
    del tree["seal"], tree["files"]
    path.write_text(json.dumps(tree | {"digest": "0" * 64}))


def bit_flipped(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


DAMAGE: dict[str, tuple[str, Callable[[Path], object]]] = {
    "image deleted": ("image.npy", Path.unlink),
    "label deleted": ("label.npy", Path.unlink),
    "foreground deleted": ("foreground.npy", Path.unlink),
    "image cut": ("image.npy", lambda path: path.write_bytes(path.read_bytes()[:-1])),
    "image empty": ("image.npy", lambda path: path.write_bytes(b"")),
    "label longer": ("label.npy", lambda path: path.write_bytes(path.read_bytes() + b"x")),
    "manifest deleted": ("manifest.json", Path.unlink),
    "manifest torn": ("manifest.json", lambda path: path.write_bytes(path.read_bytes()[:100])),
    "manifest not text": ("manifest.json", lambda path: path.write_bytes(b"\xff\xfe")),
    "manifest of another kind": ("manifest.json", lambda path: path.write_text("[]")),
    "manifest edited": ("manifest.json", edited),
    "manifest of the first format": ("manifest.json", of_the_first_format),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_volume_is_prepared_again(store: Store, case: Case, damage: str) -> None:
    """Whatever of it is missing, cut or from an older version, it is as it was, also for who reads it meanwhile."""
    volume, _ = prepare_case(case, PREPARATION, store)
    before, reading = stored(store, volume), open_array(store, volume.key, "foreground")
    name, function = DAMAGE[damage]
    function(store.path(volume.key, name))
    assert store.get(volume.key) is None
    assert prepare_case(case, PREPARATION, store) == (volume, True)
    for found, expected in zip(stored(store, volume).values(), before.values(), strict=True):
        np.testing.assert_array_equal(found, expected)
    np.testing.assert_array_equal(reading, before["foreground"])
    assert prepare_case(case, PREPARATION, store, verify=True) == (volume, False)
    assert not list(store.folder.glob("tmp-*"))


@pytest.mark.parametrize("name", ["image", "label", "foreground"])
def test_an_altered_file_is_found_by_its_digest(store: Store, case: Case, name: str) -> None:
    """One bit in any file is seen by the time of the file, or, if a disk lost it, when all are verified; and mended."""
    volume, _ = prepare_case(case, PREPARATION, store)
    before, path = stored(store, volume), store.path(volume.key, f"{name}.npy")
    time.sleep(0.01)  # times have the grain of the kernel's clock
    bit_flipped(path)
    assert store.get(volume.key) is None
    assert prepare_case(case, PREPARATION, store) == (volume, True)
    times = path.stat().st_atime_ns, path.stat().st_mtime_ns
    bit_flipped(path)
    os.utime(path, ns=times)
    assert store.get(volume.key) == volume
    assert store.get(volume.key, verify=True) is None
    assert prepare_case(case, PREPARATION, store, verify=True) == (volume, True)
    for found, expected in zip(stored(store, volume).values(), before.values(), strict=True):
        np.testing.assert_array_equal(found, expected)


def test_a_copied_store_is_read_once(store: Store, case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    """Files with new times are compared with their digests, and when they were right, not again."""
    volume, _ = prepare_case(case, PREPARATION, store)
    future = time.time_ns() + 10**6
    os.utime(store.path(volume.key, "label.npy"), ns=(future, future))
    read: list[str] = []
    digest = Place.sha256
    monkeypatch.setattr(Place, "sha256", lambda place: (read.append(place.path), digest(place))[1])
    time.sleep(0.01)
    assert [store.get(volume.key), store.get(volume.key)] == [volume, volume]
    assert len(read) == len(volume.files)


def test_sources_that_have_not_changed_are_not_read_again(
    store: Store, case: Case, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Size and time stand for the content until either changes; a young file and `verify` trust nothing."""
    assert case.label
    read: list[Path] = []
    monkeypatch.setattr(cache, "read_file", lambda path: (read.append(path), path.read_bytes())[1])
    stamps: cache.Stamps = {}
    volume, _ = prepare_case(case, PREPARATION, store, stamps=stamps)
    assert stamps == {}, "written a moment ago"
    for path in (case.image, case.label):
        os.utime(path, (1e9, 1e9))
    prepare_case(case, PREPARATION, store, stamps=stamps)
    assert set(stamps) == {str(case.image), str(case.label)}
    read.clear()
    assert prepare_case(case, PREPARATION, store, stamps=stamps) == (volume, False)
    assert read == []
    assert prepare_case(case, PREPARATION, store, verify=True, stamps=stamps) == (volume, False)
    assert read == [case.image, case.label]
    other, fresh = prepare_case(case, PREPARATION.model_copy(update={"spacing": (3, 3, 3)}), store, stamps=stamps)
    assert (fresh, other.image_sha256) == (True, volume.image_sha256)
    os.utime(case.image, (1e9, 1e9 + 1))
    read.clear()
    assert prepare_case(case, PREPARATION, store, stamps=stamps) == (volume, False)
    assert read == [case.image]
    write_nifti(case.image, smooth_ct(SHAPE, 5), AFFINE)
    changed, fresh = prepare_case(case, PREPARATION, store, stamps=stamps)
    assert fresh
    assert changed.key != volume.key


def test_a_file_that_is_no_array_is_named(store: Store, case: Case) -> None:
    """Damage between the check and the training ends it in one line that says what to do."""
    volume, _ = prepare_case(case, PREPARATION, store)
    path = store.path(volume.key, "image.npy")
    for content in (b"", path.read_bytes()[:-10], b"x" * 1000):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=r"image\.npy: damaged \(.*\); preparing the cohort again mends it"):
            open_array(store, volume.key)


def prepare_with_little_room(case: Case, store: Store, answers: Any) -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (500, 500))
    try:
        prepare_case(case, PREPARATION, store)
    except OSError as error:
        answers.put(str(error))


def test_a_file_that_must_not_grow_is_named(store: Store, case: Case) -> None:
    """The operating system's reason comes with the store's place, and nothing of the volume is left."""
    context = multiprocessing.get_context("fork")
    answers = context.SimpleQueue()
    process = context.Process(target=prepare_with_little_room, args=(case, store, answers))
    process.start()
    process.join()
    assert answers.get() == f"{store.folder}: cannot write a volume: File too large"
    assert list(store.folder.iterdir()) == []


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
        assert len([name for name in files(store) if name != "sources.json"]) == 4
        assert not list(store.folder.glob("tmp-*"))


def test_a_read_only_store_serves_what_it_has(tmp_path: Path, case: Case) -> None:
    """What is prepared is found and read; what is not ends in one line."""
    other = make_case(tmp_path, "other", 1)
    with small_disk(tmp_path / "disk", "size=1m") as disk:
        store = Store(disk / "store")
        volume, _ = prepare_case(case, PREPARATION, store)
        subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
        assert prepare_case(case, PREPARATION, store, verify=True) == (volume, False)
        assert open_array(store, volume.key).shape == volume.shape
        with pytest.raises(OSError, match=r"^\S+/disk/store: cannot write a volume: Read-only file system$"):
            prepare_case(other, PREPARATION, store)
        open_array.cache_clear()


def test_runs_that_put_at_once_leave_one_whole_volume(
    store: Store, case: Case, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever is second finds an equal volume there, and keeps it."""
    runs = 4
    barrier = threading.Barrier(runs)
    put = Store.put

    def together(*arguments: Any) -> Volume:
        barrier.wait()
        return put(*arguments)

    monkeypatch.setattr(Store, "put", together)
    results: list[Volume] = []
    threads = [
        threading.Thread(target=lambda: results.append(prepare_case(case, PREPARATION, store)[0])) for _ in range(runs)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == runs
    assert all(result == results[0] for result in results)
    assert len(files(store)) == 4
    assert store.get(results[0].key) == results[0]
    assert stored(store, results[0])["image"].shape == results[0].shape
    assert not list(store.folder.glob("tmp-*"))


def test_stored_files_have_the_users_permissions(store: Store, case: Case) -> None:
    """A store that others may read by the umask can be read by them."""
    mask = os.umask(0o027)
    try:
        volume, _ = prepare_case(case, PREPARATION, store)
    finally:
        os.umask(mask)
    assert store.path(volume.key).stat().st_mode & 0o777 == 0o750
    assert store.path(volume.key, "image.npy").stat().st_mode & 0o777 == 0o640


def bad_case(folder: Path, kind: str) -> tuple[Case, str]:
    case = make_case(folder, kind)
    assert case.label
    match kind:
        case "truncated":
            case.image.write_bytes(case.image.read_bytes()[:-100])
            return case, f"{case.image}: truncated gzip: Compressed file ended before"
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
            return case, f"{case.image}: no voxel lies above -175 HU"


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
def test_a_cohort_is_prepared_but_for_its_bad_volumes(store: Store, tmp_path: Path) -> None:
    """Bad volumes among good ones are reported by id and reason; the good ones are stored, once."""
    good = [make_case(tmp_path, f"good{seed}", seed) for seed in range(5)]
    copy = make_case(tmp_path, "copy", 0)  # the same bytes as good0
    bad = [bad_case(tmp_path, kind) for kind in BAD]
    cases = [case for pair in zip(good, bad, strict=False) for case in (pair[0], pair[1][0])]
    cases += [bad[-1][0], copy]
    seen: list[int] = []

    def progress(rows: Any, total: int) -> Any:
        for row in rows:
            seen.append(total)
            yield row

    volumes, unusable, fresh = prepare_cohort(cases, PREPARATION, store, classes=4, progress=progress)
    assert seen == [len(cases)] * len(cases)
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

    for round in range(3):  # sources too young to remember, remembered ones, a damaged memory
        again, unusable_again, fresh = prepare_cohort(cases, PREPARATION, store, classes=4)
        assert fresh == 0
        assert (again, unusable_again) == (volumes, unusable)
        known = json.loads((store.folder / "sources.json").read_text())
        assert (set(known) >= {str(case.image) for case in good}) == (round > 0)
        for case in good:
            os.utime(case.image, (1e9, 1e9))
        if round == 1:
            (store.folder / "sources.json").write_text('{"x": 3')

    few, unusable, fresh = prepare_cohort([*good, copy], PREPARATION, store, classes=3)
    assert (few, fresh) == ({}, 0)
    assert [one.id for one in unusable] == ["copy", *[f"good{seed}" for seed in range(5)]]
    for one, case in zip(unusable, (copy, *good), strict=True):
        assert one.reason == f"{case.label}: label 3 is beyond the 3 classes (0..2)"


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


@given(st.integers(0, 2**32), st.integers(1, 7), st.tuples(*[st.integers(1, 9)] * 3))
def test_foreground_index_goes_organ_by_organ(seed: int, classes: int, shape: tuple[int, int, int]) -> None:
    """It lists every labelled voxel once, by ascending label, each organ's as often as the manifest counts."""
    label = np.random.default_rng(seed).integers(0, classes, shape).astype(np.uint8)
    index = foreground_index(label)
    assert index.dtype == np.int64
    values = label.ravel()[index]
    assert (np.diff(values.astype(int)) >= 0).all()
    np.testing.assert_array_equal(np.sort(index), np.flatnonzero(label))
    for value in range(1, classes):
        np.testing.assert_array_equal(index[values == value], np.flatnonzero(label == value))


def test_a_label_without_organs_can_be_opened(store: Store, tmp_path: Path) -> None:
    """An empty foreground is stored and opened like any other."""
    case = make_case(tmp_path)
    assert case.label
    write_nifti(case.label, np.zeros(SHAPE, np.uint8), AFFINE)
    volume, _ = prepare_case(case, PREPARATION, store)
    assert open_array(store.folder, volume.key, "foreground").shape == (0,)
    assert set(volume.label_voxels) == {"0"}


def test_open_arrays_are_mapped_and_read_only(store: Store, case: Case) -> None:
    """An array is not read until it is used, and nobody can change the store through it."""
    volume, _ = prepare_case(case, PREPARATION, store)
    for name in ("image", "label", "foreground"):
        array = open_array(store.folder, volume.key, name)  # type: ignore[arg-type]
        assert isinstance(array, np.memmap)
        assert not array.flags.writeable
        np.testing.assert_array_equal(array, stored(store, volume)[name])


SIDES = st.tuples(*[st.integers(1, 12)] * 3)


def padded(array: Array, size: Sequence[int]) -> Array:
    """The volume with MONAI's symmetric padding up to the patch."""
    result: torch.Tensor = SpatialPad(list(size))(torch.from_numpy(array.astype(np.int64))[None])
    return result[0].numpy().astype(array.dtype)


@given(SIDES, SIDES, st.data())
@settings(max_examples=60)
def test_a_patch_is_a_slice_of_the_padded_volume(
    shape: tuple[int, int, int], size: tuple[int, int, int], data: st.DataObject
) -> None:
    """Shorter volumes count as padded like MONAI's SpatialPad; nothing of what was in `out` before is left."""
    array = np.random.default_rng(0).integers(1, 2**16, shape).astype(np.uint16)
    whole = padded(array, size)
    origin = [data.draw(st.integers(0, length - side)) for length, side in zip(whole.shape, size, strict=True)]
    expected = whole[tuple(slice(start, start + side) for start, side in zip(origin, size, strict=True))]
    patch = read_patch(array, origin, size)
    np.testing.assert_array_equal(patch, expected)
    assert patch.dtype == array.dtype
    out = np.full(size, 7, np.uint16)
    assert read_patch(array, origin, size, out) is out
    np.testing.assert_array_equal(out, expected)


@given(SIDES, SIDES, st.tuples(*[st.integers(-4, 14)] * 3))
def test_a_patch_stays_in_the_padded_volume(
    shape: tuple[int, int, int], size: tuple[int, int, int], origin: tuple[int, int, int]
) -> None:
    """An origin from which the patch would leave the padded volume is refused, any other is not."""
    array = np.ones(shape, np.uint8)
    room = [max(length, side) - side for length, side in zip(shape, size, strict=True)]
    if all(0 <= start <= most for start, most in zip(origin, room, strict=True)):
        assert read_patch(array, origin, size).shape == size
    else:
        with pytest.raises(ValueError, match="leaves the volume"):
            read_patch(array, origin, size)
