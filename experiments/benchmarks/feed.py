"""Patches of 96³ delivered to a consumer, a core: ours against what people use, and the layouts of the store.

    PYTHONPATH=. python experiments/benchmarks/feed.py [--quick]

Ours is the stream of a pretraining: sample table, Ray Data's tasks over the store, the coordinator, and in the consumer
the copy, the scaling to float32 and the corruption; the CPU time of all its processes counts, the start of the stream
included. MONAI's and TorchIO's caches are filled before the clock starts. Their transforms are those of the tutorial:
two crops a volume, one or two corrupted views. The consumer, which keeps the memory that it frees, is one for all.

Layouts of the store: what reading one patch at random costs in each, with all volumes in the page cache, and from a
cold one (the pages are given up before; the disk of this machine).

    96³ out of 12 volumes of about 150³, uint8, noisy CT:
                       patches/s a core    bytes a voxel    ms, cold
    npy                1819                1.00              8.6
    blosc2 (LZ4, 48³)   492                0.67              8.8
    zarr (zstd, 48³)    110                0.60             76
"""

import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import monai.transforms as mt
import numpy as np
import torch
from cohort import fill
from monai.data import CacheDataset, DataLoader, Dataset
from timing import Bench, main, start_ray
from torch.utils.data import RandomSampler

from ssl_ray.data.patch import open_array, read_patch
from ssl_ray.data.store import Store, Volume
from ssl_ray.pretrain.learner import scale
from ssl_ray.pretrain.samples import SampleTable
from ssl_ray.pretrain.stream import Feed, batches, segments
from ssl_ray.pretrain.tasks.restoration.corruption import corrupt, draw
from ssl_ray.pretrain.tasks.restoration.settings import Corruption

FLOORS = {"clean": 1.8, "one view": 2.0, "two views": 2.0}
BATCH = 8


def ours(volumes: Sequence[Volume], store: Store, side: int, views: int, count: int) -> Callable[[], int]:
    """A stream of `count` patches, from its opening to its end."""
    import ray

    size = (side,) * 3
    config = boxes(side)

    def call() -> int:
        shapes = np.array([volume.shape for volume in volumes], dtype=np.int64)
        table = SampleTable(0, shapes, size, 2, BATCH, -(-count // (2 * len(volumes))))
        keys = tuple(volume.key for volume in volumes)
        feed = Feed(table, store, keys, keys, volumes[0].dtype, volumes[0].levels)
        shared = ray.put(feed)
        schedule = segments(table, 0, 1, 64 * 2**20 if side == 96 else 2**20, 1)
        for batch in batches(table, shared, schedule, 0, 1, 1):
            clean = scale(torch.from_numpy(batch.images), feed.levels)
            for view in range(views):
                corrupt(clean, draw(config, size, 0, batch.indices, view))
        return table.steps * BATCH

    return call


def boxes(side: int) -> Corruption:
    """The recipe's for 96³, smaller ones for a quick run."""
    return Corruption() if side == 96 else Corruption(inpaint_size=(3, 10), outpaint_size=(8, 20), shuffle_size=4)


def view(key: str, side: int) -> list[Any]:
    """The published corruption of one view."""
    config = boxes(side)
    paint: dict[str, Any] = {"keys": [key], "prob": 1.0}
    (a, b), (c, d) = config.inpaint_size, config.outpaint_size
    return [
        mt.OneOf(
            [
                mt.RandCoarseDropoutd(**paint, holes=6, spatial_size=a, dropout_holes=True, max_spatial_size=b),
                mt.RandCoarseDropoutd(**paint, holes=6, spatial_size=c, dropout_holes=False, max_spatial_size=d),
            ]
        ),
        mt.RandCoarseShuffled(keys=[key], prob=0.8, holes=10, spatial_size=config.shuffle_size),
    ]


def published(side: int, views: int) -> list[Any]:
    """The random half of the tutorial's transforms."""
    crop = mt.RandSpatialCropSamplesd("image", roi_size=(side,) * 3, random_size=False, num_samples=2)
    names = ["gt_image", "image_2"][:views]
    chain: list[Any] = [mt.SpatialPadd("image", spatial_size=(side,) * 3), crop]
    if names:
        chain.append(mt.CopyItemsd("image", times=len(names), names=names))
    for key in ["image", "image_2"][:views]:
        chain += view(key, side)
    return chain


def monai(data: Any, count: int, workers: int) -> Callable[[], int]:
    """`count` patches of a MONAI dataset through its DataLoader, which has been started before.

    One endless epoch: with as few volumes as here, epochs would begin more often than in a study.
    """
    sampler = RandomSampler(data, replacement=True, num_samples=10**7)
    batches = iter(DataLoader(data, batch_size=BATCH // 2, sampler=sampler, num_workers=workers))
    next(batches)

    def call() -> int:
        done = 0
        while done < count:
            done += len(next(batches)["image"])
        return done

    return call


def torchio_queue(arrays: Sequence[Any], side: int, count: int, views: int) -> Callable[[], int] | None:
    """TorchIO's queue of patches, two of a volume; the views by MONAI's transforms, as TorchIO has none of them."""
    try:
        import torchio
    except ImportError as error:
        print(f"TorchIO: left out, {error}")
        return None
    subjects = [torchio.Subject(image=torchio.ScalarImage(tensor=torch.from_numpy(array)[None])) for array in arrays]
    corrupting = mt.Compose(published(side, views)[2:]) if views else None

    def call() -> int:
        done = 0
        while done < count:
            queue = torchio.Queue(torchio.SubjectsDataset(subjects), 64, 2, torchio.UniformSampler(side))
            for batch in torchio.SubjectsLoader(queue, batch_size=BATCH, num_workers=0):
                images = batch["image"][torchio.DATA]
                if corrupting:
                    for image in images:
                        corrupting({"image": image})
                done += len(images)
        return done

    return call


def layouts(bench: Bench, stored: Sequence[Any], side: int) -> None:
    """The table of layouts; each offers a way to write an array and to cut a patch out of it."""
    size = (side,) * 3
    random = np.random.default_rng(0)
    origins = [
        (index, tuple(int(v) for v in random.integers(0, np.array(stored[index].shape) - side + 1)))
        for index in random.integers(0, len(stored), 8 if bench.quick else 200)
    ]
    kinds = {"npy": npy(), "blosc2": blosc(), "zarr": zarr()}
    calls, table = {}, {}
    for name, pair in kinds.items():
        if pair is None:
            continue
        write, cut = pair
        paths = [bench.folder / f"layout{index}.{name}" for index in range(len(stored))]
        for path, array in zip(paths, stored, strict=True):
            write(path, array)
        files = [file for path in paths for file in (path.rglob("*") if path.is_dir() else [path]) if file.is_file()]
        index, origin = origins[0]
        expected = stored[index][tuple(slice(o, o + side) for o in origin)]
        if not np.array_equal(cut(paths[index], origin, size), expected):
            raise RuntimeError(f"{name}: another patch")

        def call(paths: list[Path] = paths, cut: Any = cut) -> int:
            for index, origin in origins:
                cut(paths[index], origin, size)
            return len(origins)

        def cold(paths: list[Path] = paths, cut: Any = cut, files: list[Path] = files) -> float:
            took = 0.0
            for index, path in enumerate(paths):
                forget(files)
                start = time.perf_counter()
                cut(path, next(origin for found, origin in origins if found == index), size)
                took += time.perf_counter() - start
            return took / len(paths)

        calls[name] = call
        table[name] = {"bytes on disk a voxel": sum(map(allocated, files)) / sum(array.size for array in stored)}
        first = [path for path in range(len(stored)) if any(found == path for found, _ in origins)]
        if len(first) == len(stored):
            table[name]["ms cold"] = 1000 * cold()
    found = bench.compare("layouts, warm", calls, 5, "patches")
    for name, row in table.items():
        row["patches a core s"] = 1 / found[name].cpu
        print(f"{name:8}" + ", ".join(f"{key} {value:.4g}" for key, value in row.items()))
        if name != "npy":
            bench.ratio(f"layout npy over {name}", found[name], found["npy"])
    bench.facts["layouts"] = table


def allocated(file: Path) -> int:
    """Bytes that a file takes on the disk."""
    return file.stat().st_blocks * 512


def forget(files: Sequence[Path]) -> None:
    """Drop files out of the page cache."""
    for file in files:
        with file.open("rb") as handle:
            os.fsync(handle.fileno())
            os.posix_fadvise(handle.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def npy() -> tuple[Any, Any]:
    """What the store has: memory-mapped, without the cache of open files."""
    return np.save, lambda path, origin, size: read_patch(np.load(path, mmap_mode="r"), origin, size)


def blosc() -> tuple[Any, Any] | None:
    """Chunks of 48³ with LZ4 and bit shuffle, one thread."""
    try:
        import blosc2
    except ImportError as error:
        print(f"blosc2: left out, {error}")
        return None
    blosc2.set_nthreads(1)

    def write(path: Path, array: Any) -> None:
        parameters = blosc2.CParams(codec=blosc2.Codec.LZ4, clevel=5, nthreads=1)
        blosc2.asarray(array, urlpath=str(path), mode="w", chunks=(48,) * 3, blocks=(24,) * 3, cparams=parameters)

    def cut(path: Path, origin: Any, size: Any) -> Any:
        box = tuple(slice(start, start + side) for start, side in zip(origin, size, strict=True))
        return blosc2.open(str(path), mode="r")[box]

    return write, cut


def zarr() -> tuple[Any, Any] | None:
    """Version 3, chunks of 48³, its default codec (zstd)."""
    try:
        import zarr
    except ImportError as error:
        print(f"zarr: left out, {error}")
        return None
    zarr.config.set({"async.concurrency": 1, "threading.max_workers": 1})

    def write(path: Path, array: Any) -> None:
        made = zarr.create_array(str(path), shape=array.shape, chunks=(48,) * 3, dtype=array.dtype)
        made[:] = array

    def cut(path: Path, origin: Any, size: Any) -> Any:
        box = tuple(slice(start, start + side) for start, side in zip(origin, size, strict=True))
        return zarr.open_array(str(path), mode="r")[box]

    return write, cut


def run(bench: Bench) -> None:
    """Layouts, then the feeds."""
    import ray

    side, shape = (32, (60, 56, 50)) if bench.quick else (96, (190, 170, 150))
    store = Store(bench.folder / "store")
    volumes = fill(store, 3 if bench.quick else 12, shape)
    stored = [np.array(open_array(store, volume.key)) for volume in volumes]
    layouts(bench, stored, side)

    start_ray()
    ours(volumes, store, side, 0, 48)()  # starts Ray's workers
    arrays = [array.astype(np.float32) / volumes[0].levels for array in stored]
    for views, (name, floor) in enumerate(FLOORS.items()):
        # Ours counts the start of its stream, which a study pays once in 19,000 patches.
        count, more = (24, 48) if bench.quick else ((600, 9000), (400, 2000), (250, 1500))[views]
        cases = [{"image": torch.from_numpy(array)[None]} for array in arrays]
        transform = mt.Compose(published(side, views))
        cached = CacheDataset(cases, transform, progress=False)
        variants = {
            "MONAI CacheDataset, 1 worker": monai(cached, count, 1),
            "MONAI CacheDataset, no worker": monai(cached, count, 0),
            "ours": ours(volumes, store, side, views, more),
        }
        if views < 2 and (queue := torchio_queue(arrays, side, count // 2, views)):
            variants["TorchIO queue"] = queue
        found = bench.compare(f"{name} patches of {side}³", variants, 3, "patches")
        bench.ratio(f"feed, {name}, over MONAI", found["MONAI CacheDataset, 1 worker"], found["ours"], floor)
        # Without a worker nothing is sent between processes, but the training waits for every patch.
        bench.ratio(f"feed, {name}, over MONAI in the consumer", found["MONAI CacheDataset, no worker"], found["ours"])
        if "TorchIO queue" in found:
            bench.ratio(f"feed, {name}, over TorchIO", found["TorchIO queue"], found["ours"])
    uncached(bench, volumes, store, side, ours(volumes, store, side, 1, 48 if bench.quick else 400))
    ray.shutdown()


def uncached(bench: Bench, volumes: Sequence[Volume], store: Store, side: int, stream: Callable[[], int]) -> None:
    """MONAI's `Dataset`, which prepares every volume anew each time, against the store."""
    from cohort import write_scan
    from prepare import chain

    shape = (96, 96, 40) if bench.quick else (320, 320, 100)
    files = [write_scan(bench.folder / f"s{seed}.nii.gz", shape, (1.25, 1.25, 3.0), seed) for seed in range(2)]
    transform = mt.Compose([*chain().transforms, *published(side, 1)])
    data = Dataset([{"image": str(file)} for file in files for _ in range(4)], transform)
    variants = {"MONAI Dataset, no cache": monai(data, 8, 0), "ours": stream}
    found = bench.compare("one view, nothing cached by MONAI", variants, 2, "patches")
    bench.ratio("feed, one view, over MONAI without a cache", found["MONAI Dataset, no cache"], found["ours"])


if __name__ == "__main__":
    main(__doc__ or "", run)
