"""The store of canonical arrays: whole or absent, readable patch by patch."""

import json
import multiprocessing
import os
import resource
import subprocess
import threading
import time
from collections.abc import Callable, Sequence
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
    files,
    make_case,
    small_disk,
    stored,
    write_nifti,
)

from ssl_ray.data import store as store_module
from ssl_ray.data.datalist import Case
from ssl_ray.data.patch import open_array, read_patch
from ssl_ray.data.prepare import prepare_case, prepare_cohort
from ssl_ray.data.store import Store, Volume, foreground_index
from ssl_ray.storage.files import UNIQUE, remove_stale
from ssl_ray.storage.object_store import Place


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
    theirs = store.folder / "tmp-results-of-anna"
    theirs.mkdir()
    remove_stale(store.folder, f"tmp-{UNIQUE}", 24 * 3600)
    assert left.is_dir(), "it might be the work of a run that goes on"
    yesterday = time.time() - 25 * 3600
    os.utime(left, (yesterday, yesterday))
    os.utime(theirs, (yesterday, yesterday))
    prepare_cohort([], PREPARATION, store)
    assert not left.exists()
    assert theirs.exists()
    assert store.get(volume.key) == volume


def of_the_first_format(path: Path) -> None:
    tree = json.loads(path.read_text())
    del tree["files"]
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


def test_a_file_that_is_no_array_is_named(store: Store, case: Case) -> None:
    """Damage between the check and the training ends it in one line that says what to do."""
    volume, _ = prepare_case(case, PREPARATION, store)
    path = store.path(volume.key, "image.npy")
    for content in (b"", path.read_bytes()[:-10], b"x" * 1000):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=r"image\.npy: damaged \(.*\); `ssl-ray prepare --verify` mends it"):
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
    assert open_array(store, volume.key, "foreground").shape == (0,)
    assert set(volume.label_voxels) == {"0"}


def test_open_arrays_are_mapped_and_read_only(store: Store, case: Case) -> None:
    """An array is not read until it is used, and nobody can change the store through it."""
    volume, _ = prepare_case(case, PREPARATION, store)
    for name in ("image", "label", "foreground"):
        array = open_array(store, volume.key, name)  # type: ignore[arg-type]
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
