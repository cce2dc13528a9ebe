"""A whole pretraining through Ray, from a store of prepared volumes, against the step on data in memory."""

import signal
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from gpu_bench import Bench, warm
from gpu_pretrain import PRIMUS, TINY_PRIMUS, learner, stepper, study

from ssl_ray.config.schema import Study
from ssl_ray.data.normalise import CanonicalVolume
from ssl_ray.data.store import Store, Volume
from ssl_ray.study.parts import folders_of, recipe_of, tracker_of


def fill(store: Store, count: int, shape: tuple[int, int, int], first: int = 0) -> list[Volume]:
    """Random volumes, written as `ssl_ray prepare` leaves them; what is in them does not change the speed."""

    def write(index: int) -> Volume:
        key = f"{index:08x}{index:024x}"
        image = np.random.default_rng(index).integers(0, 222, shape, dtype=np.uint8)
        volume = Volume(
            key=key,
            id=f"v{index:05d}",
            image_source=f"v{index:05d}.nii.gz",
            label_source=None,
            content=key,
            shape=shape,
            spacing=(2.0, 2.0, 2.0),
            affine=tuple(map(tuple, np.eye(4).tolist())),
            dtype="uint8",
            levels=255,
            channels=1,
            normalise={},
            intensities=(),
            body=(0,),
            original_shape=shape,
            label_voxels={},
            largest_label=0,
            files={},
        )
        return store.put(volume, CanonicalVolume(image, None, 255, np.eye(4), (), (0,)))

    with ThreadPoolExecutor(8) as pool:
        return list(pool.map(write, range(first, first + count)))


@contextmanager
def limit(seconds: float) -> Iterator[None]:
    """TimeoutError in the main thread when it takes longer."""

    def stop(*_: Any) -> None:
        raise TimeoutError(f"longer than {seconds:.0f} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def made(bench: Bench, folder: Path, name: str, batch: int, epochs: int, **options: Any) -> Study:
    """A study of one case, on a cluster of this machine."""
    settings: dict[str, Any] = {
        "epochs": epochs,
        "validate_every": epochs,
        "log_every": 2 if bench.quick else max(10, 1600 // batch),
        "cpus_per_worker": 1 if bench.quick else 4,
        "block_megabytes": 1 if bench.quick else 128,
    }
    it = study(bench, folder, batch, **settings, **options)
    cluster = it.cluster.model_copy(
        update={"object_store_gigabytes": 0.4 if bench.quick else 24, "cpus": 2 if bench.quick else None}
    )
    return it.model_copy(update={"cluster": cluster, "name": f"gpu-{name.replace(' ', '-')}"})


class Memory:
    """Stands in for `Tracker` and its one run where MLflow does not work; the speed is the question here."""

    id = "memory"

    def __init__(self) -> None:
        self.points: dict[str, dict[int, float]] = {}

    def finished(self, *_: Any) -> None:
        """Never."""

    def open(self, *_: Any, **__: Any) -> "Memory":
        """The run."""
        return self

    def metrics(self, values: dict[str, float], step: int) -> None:
        """Keep them."""
        for name, value in values.items():
            self.points.setdefault(name, {})[step] = value

    def logged(self, metric: str) -> set[int]:
        """Steps of a metric."""
        return set(self.points.get(metric, {}))

    def history(self, _: str, metric: str) -> dict[int, float]:
        """Values by step."""
        return self.points.get(metric, {})

    def text(self, *_: Any) -> None:
        """Nothing."""

    artifact = close = text


def start_ray(bench: Bench, config: Study) -> None:
    """As a study does; where Ray does not see the GPU that torch sees, it is told."""
    import ray

    from ssl_ray.cluster.connect import connect
    from ssl_ray.cluster.worker import runtime_env

    connect(config.cluster)
    if bench.device.type == "cuda" and not ray.cluster_resources().get("GPU"):
        bench.put("feed", "ray_sees_the_gpu", value=False)
        ray.shutdown()
        ray.init(
            address="local",
            num_gpus=1,
            object_store_memory=int(config.cluster.object_store_gigabytes * 2**30),
            include_dashboard=False,
            runtime_env=runtime_env(),
        )


def feed_alone(bench: Bench, folder: Path, volumes: Sequence[Volume]) -> None:
    """What carries the patches, piece by piece: reading on one core, Ray Data, and pinned memory behind it."""
    import ray

    from ssl_ray.pretrain.driver import feed_of
    from ssl_ray.pretrain.stream import batches as stream_batches
    from ssl_ray.pretrain.stream import open_segment, pin, segments

    batch = 4 if bench.quick else 64
    config = made(bench, folder, "feed", batch, 1000)
    start = time.monotonic()
    start_ray(bench, config)
    bench.put("feed", "seconds_to_start_ray", value=time.monotonic() - start)
    resources = {key: value for key, value in ray.cluster_resources().items() if not key.startswith("node")}
    bench.put("feed", "cluster", value=resources)
    feed = feed_of(recipe_of(config), folders_of(config), volumes)
    samples = [feed.table.sample(index) for index in range(batch)]
    patch_mb = float(np.prod(config.pretrain.patch_size)) / 1e6
    feed.read(samples)
    seconds = bench.seconds(lambda: feed.read(samples))
    bench.put("feed", "read_patches_per_second_core", value=batch / seconds)
    array = feed.read(samples)
    seconds = bench.seconds(lambda: pin(array))
    bench.put("feed", "pin_gb_s", value=batch * patch_mb / 1000 / seconds)
    seconds = bench.seconds(lambda: ray.put(array))
    bench.put("feed", "ray_put_gb_s", value=batch * patch_mb / 1000 / seconds)

    reference = ray.put(feed)
    held = config.pretrain.cpus_per_worker
    (segment, *_) = segments(feed.table, 0, 1, config.pretrain.block_megabytes * 2**20, 1)
    # To its end: what is left half-way goes on reading beside the next part.
    schedule = [range(0, min(segment.stop, (800 if bench.quick else 16_000) // batch), segment.step)]
    duration = 3 if bench.quick else 20

    def consume(batches: Iterator[Any], size: Callable[[Any], int]) -> dict[str, float]:
        """Rate after the first batch, whose wait is the start-up."""
        start = time.perf_counter()
        next(batches)
        first = begun = time.perf_counter()
        count, longest, before = 0, 0.0, begun
        for item in batches:
            now = time.perf_counter()
            count, longest, before = count + size(item), max(longest, now - before), now
            if now - begun > duration:
                break
        return {
            "seconds_to_first": first - start,
            "patches_per_second": count / (before - begun),
            "gb_s": count * patch_mb / 1000 / (before - begun),
            "longest_wait": longest,
        }

    def raw() -> None:
        iterator = open_segment(feed.table, reference, schedule[0], 0, 1, held)
        options: dict[str, Any] = {"batch_size": batch, "batch_format": "numpy", "prefetch_batches": 1}
        batches = iter(iterator.iter_batches(**options))
        bench.put("feed", "ray_data_alone", value=consume(batches, lambda item: len(item["index"])))
        (bench.folder / "ray_data.txt").write_text(iterator.stats())
        print(iterator.stats()[:3000], flush=True)

    def stream() -> None:
        batches: Iterator[Any] = stream_batches(feed.table, reference, schedule, 0, 1, held)
        bench.put("feed", "stream", value=consume(batches, lambda item: len(item.indices)))

    for name, call in (("stream", stream), ("ray_data", raw)):
        with limit(60):
            bench.attempt("feed", name, call=call)


def end_to_end(bench: Bench) -> None:
    """Patches/s and the share of the time that waits for data, by batch, with Ray and MLflow as a study has them."""
    batches = {2: 160} if bench.quick else {64: 27_000, 8: 12_000, 128: 30_000, 256: 30_000}
    through_ray(bench, {str(batch): (batch, patches, {}) for batch, patches in batches.items()}, feed=True)
    rows = [row for row in bench.results.get("end_to_end", {}).values() if isinstance(row, dict)]
    if rows and bench.device.type == "cuda" and not bench.quick:
        best = max(rows, key=lambda row: float(row["patches_per_second"]))
        fast, waits = best["patches_per_second"], best["data_wait_share"]
        bench.put("floors", "patches_per_second", value={"found": fast, "at_least": 1500, "ok": fast >= 1500})
        bench.put("floors", "data_wait_share", value={"found": waits, "at_most": 0.03, "ok": waits <= 0.03})


def masked_end_to_end(bench: Bench) -> None:
    """The same of the masked task, with both networks."""
    task: dict[str, Any] = {"task": "masked"}
    primus: dict[str, Any] = task | {"network": TINY_PRIMUS if bench.quick else PRIMUS}
    batch, most, fewer = (2, 160, 160) if bench.quick else (64, 60_000, 8_000)
    through_ray(bench, {"masked, unetr": (batch, most, task), "masked, primus": (batch, fewer, primus)})


def through_ray(bench: Bench, cases: Mapping[str, tuple[int, int, dict[str, Any]]], feed: bool = False) -> None:
    """Whole pretrainings; a case is its patches a step, patches in all, some 12 s of them, and other settings."""
    import ray

    from ssl_ray.config.loading import dump
    from ssl_ray.pretrain.driver import pretrain

    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        count, shape = (8, (40, 40, 40)) if bench.quick else (200, (180, 150, 130))
        start = time.monotonic()
        store = Store(Path(folder) / "cache")
        training, validation = fill(store, count, shape), fill(store, 4 if bench.quick else 16, shape, first=count)
        bench.put("feed", "seconds_to_write_the_store", value=time.monotonic() - start)
        if feed:
            bench.attempt("feed", call=lambda: feed_alone(bench, Path(folder), training))

        for name, (batch, patches, options) in cases.items():

            def run(name: str = name, batch: int = batch, patches: int = patches, options: Any = options) -> None:
                more = options | {"compile": not bench.quick}
                it = made(bench, Path(folder), name.replace(", ", "-"), batch, patches // (2 * count), **more)
                start_ray(bench, it)  # where it is not there already
                start = time.monotonic()
                tracker: Any = bench.attempt("ray", "mlflow", call=lambda: tracker_of(it)) or Memory()
                with limit(min(110.0, max(20.0, bench.left))):
                    done = pretrain(recipe_of(it), training, validation, folders_of(it), tracker, {}, dump(it), "gpu")
                row: dict[str, Any] = {"seconds_all_told": time.monotonic() - start}
                history = {
                    metric: list(tracker.history(str(done.run_id), metric).items())
                    for metric in ("system/patches_per_second", "system/data_wait_percentage", "loss")
                }
                bench.put("spread", "end_to_end_history", name, value=history)
                # The first third warms up: module loads, compiling, the first blocks.
                late = {metric: [v for _, v in points[len(points) // 3 :]] for metric, points in history.items()}
                row["patches_per_second"] = float(np.median(late["system/patches_per_second"]))
                row["data_wait_share"] = float(np.mean(late["system/data_wait_percentage"])) / 100
                row["records"] = len(late["loss"])
                row["last_loss"] = late["loss"][-1]
                ceiling = bench.results.get("step_compiled", {}).get(name)
                if ceiling is None:
                    call = warm(stepper(bench, learner(bench, batch, **more), batch), bench)
                    ceiling = {"patches_per_second": batch / bench.seconds(call, 1.0)}
                row["ceiling"] = ceiling["patches_per_second"]
                row["share_of_ceiling"] = row["patches_per_second"] / row["ceiling"]
                bench.put("end_to_end", name, value=row)
                bench.put("ratios", f"end to end over ceiling, {name}", value=row["share_of_ceiling"])

            bench.attempt("ray", name, call=run)
        ray.shutdown()
