"""How feed and step change with workers and volumes, what it costs in memory, and where the next bottleneck is.

    PYTHONPATH=. python experiments/benchmarks/scale.py [--quick]

1. Feed: 1 to 8 ranks, each with a stream of its own, read small patches; CPU time of the coordinators (Ray Data's
   scheduling loops) and of the rest, a block. Small blocks, so that blocks and not bytes are what is measured.
2. Step: 1 to 8 processes of DDP, each on as many patches as the one alone; CPU time of a rank's step, as there are more
   ranks than cores, and how much of it the exchange of gradients adds.
3. Volumes: 100 to 100,000 of them and 300 epochs planned, through `pretrain()` itself: seconds to the first batch, rate
   over many segments, memory of driver, worker and coordinator. Every volume has a key and a folder of its own, which
   are links to a few real ones: the page cache is warmer than it would be, the metadata are not.
4. Model: what limits a run on up to 256 GPUs, out of the figures above, those of no more ranks than there are cores.
"""

import json
import os
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
from cohort import fill, spread
from timing import Bench, Watched, ledger, main, start_ray
from torch.multiprocessing.spawn import spawn

from ssl_ray.cluster.malloc import keep_freed
from ssl_ray.data.store import Store
from ssl_ray.pretrain.job import Job
from ssl_ray.pretrain.learner import PretrainingLearner, scale
from ssl_ray.pretrain.samples import SampleTable
from ssl_ray.pretrain.stream import SEGMENT_BLOCKS, Feed, batches, segments
from ssl_ray.storage.mirror import Mirror
from ssl_ray.study.parts import folders_of, recipe_of, tracker_of

H100 = 1500.0
"""Patches/s a GPU that the feed must carry: the floor of gpu.py with ViT-B."""
PATCH = 96**3
NETWORK = 25e9
"""Bytes/s between nodes of 8 GPUs, 200 Gbit/s; the model's only figure that is not measured here."""
PARAMETERS = 88e6
WIDE = {"hidden_size": 192, "mlp_dim": 768, "num_heads": 3}


def feed(bench: Bench) -> dict[str, float]:
    """Part 1."""
    import ray

    start_ray()
    store = Store(bench.folder / "store")
    volumes = fill(store, 4, (60, 60, 60))
    keys = tuple(volume.key for volume in volumes)
    shapes = np.array([volume.shape for volume in volumes], dtype=np.int64)
    side, batch, blocks = 32, 8, 32 if bench.quick else 512
    results: dict[str, float] = {}

    def stream(world: int, blocks: int) -> dict[str, float]:
        table = SampleTable(0, shapes, (side,) * 3, 2, batch * world, blocks)  # 8 patches an epoch
        made = Feed(table, store, keys, keys, "uint8", volumes[0].levels)
        shared = ray.put(made)
        schedule = segments(table, 0, world, batch * side**3, 1)
        before, coordinating, start = ledger().seconds(), coordinator_seconds(), time.perf_counter()
        ranks = [batches(table, shared, schedule, rank, world, 0) for rank in range(world)]
        first = 0.0
        for _ in range(table.steps):
            for rank in ranks:
                scale(torch.from_numpy(next(rank).images), made.levels)
            first = first or time.perf_counter() - start
        seconds, count = time.perf_counter() - start, world * sum(map(len, schedule))
        return {
            "blocks/s": count / seconds,
            "cpu a block": (ledger().seconds() - before) / count,
            "coordinator a block": (coordinator_seconds() - coordinating) / count,
            "open": first,
        }

    stream(1, 8)  # starts Ray's workers
    print(f"\nfeed: {blocks} blocks of 8 patches of {side}³")
    print(f"{'ranks':>8}{'blocks/s':>12}{'ms a block':>12}{'of coordinator':>16}{'segment opens in s':>20}")
    for world in (2,) if bench.quick else (1, 2, 4, 8):
        row = stream(world, blocks)
        results |= {f"{name}, {world} ranks": value for name, value in row.items()}
        print(
            f"{world:>8}{row['blocks/s']:>12.1f}{1000 * row['cpu a block']:>12.2f}"
            f"{1000 * row['coordinator a block']:>16.2f}{row['open']:>20.2f}",
            flush=True,
        )
    ray.shutdown()
    bench.facts["feed"] = results
    return results


def coordinator_seconds() -> float:
    """CPU time of the actors that run Ray Data's loop."""
    return ledger().seconds("SplitCoordinator")


def steps(bench: Bench) -> None:
    """Part 2."""
    count = 3 if bench.quick else 20
    print(f"\nstep: 8 patches of 32³ a rank, ViT of width {WIDE['hidden_size']}, DDP over gloo")
    print(f"{'ranks':>8}{'ms CPU':>12}")
    for world in (1, 2) if bench.quick else (1, 2, 4, 8):
        spawn(step_rank, (world, str(bench.folder), count), nprocs=world)
        found = [json.loads((bench.folder / f"step{world}-{rank}.json").read_text()) for rank in range(world)]
        bench.facts[f"CPU s a rank's step, {world} ranks"] = mean = sum(found) / world
        print(f"{world:>8}{1000 * mean:>12.1f}", flush=True)


def step_rank(rank: int, world: int, folder: str, count: int) -> None:
    """A rank of part 2: writes the CPU seconds of one of its steps."""
    torch.set_num_threads(1)
    keep_freed()
    store = f"file://{folder}/rendezvous{world}"
    torch.distributed.init_process_group("gloo", init_method=store, rank=rank, world_size=world)
    made = study(Path(folder), 1, batch=8 * world, network=WIDE)
    size = made.pretrain.patch_size
    table = SampleTable(0, np.array([size]), size, 1, 8 * world, 1)
    source = Feed(table, Store(Path(folder)), ("",), ("",), "uint8", 221)
    learner = PretrainingLearner(
        Job(recipe_of(made), source, source, Path(folder), Mirror(Path(folder)), "", None), torch.device("cpu")
    )  # type: ignore[arg-type]
    images = np.random.default_rng(rank).integers(0, 222, (8, *size)).astype(np.uint8)
    indices = np.arange(rank, 8 * world, world)
    for _ in range(3):
        learner.step(images, indices, 1e-4)
    start = time.process_time()
    for _ in range(count):
        learner.step(images, indices, 1e-4)
    (Path(folder) / f"step{world}-{rank}.json").write_text(json.dumps((time.process_time() - start) / count))
    torch.distributed.destroy_process_group()


def volumes(bench: Bench) -> None:
    """Part 3: each cohort in a process of its own, which is ended after some time."""
    counts = (300,) if bench.quick else (100, 1000, 10_000, 100_000)
    print(f"\n{'volumes':>10}{'first batch s':>15}{'patches/s':>12}{'last third':>12}{'driver MB':>12}", end="")
    print(f"{'worker MB':>12}{'coordinator MB':>16}")
    rates = {}
    for count in counts:
        out = bench.folder / f"volumes{count}.jsonl"
        command = [sys.executable, __file__, "--cohort", str(count), "--folder", str(bench.folder)]
        watched = Watched(command, out.with_suffix(".log"), RAY_ADDRESS="", OMP_NUM_THREADS="1")
        seconds = 6 if bench.quick else 50
        peaks: dict[str, float] = {}

        def enough(out: Path = out, watched: Watched = watched, peaks: Any = peaks, seconds: float = seconds) -> bool:
            for name, size in memory(watched.tree).items():
                peaks[name] = max(peaks.get(name, 0.0), size)
            rows = read(out)
            return len(rows) > 3 and time.time() - rows[1]["time"] > seconds

        try:
            watched.wait(enough, at_most=150)
        finally:
            watched.stop()
        rows = read(out)
        began = next(row["time"] for row in rows if row["what"] == "pretrain")
        records = [row for row in rows if row["what"] == "record"]
        third = len(records) // 3
        early, late = (pace(part) for part in (records[third : 2 * third + 1], records[2 * third :]))
        first = records[0]["time"] - began
        rates[count] = late
        bench.facts[f"{count} volumes"] = peaks | {"first batch": first, "middle third": early, "last third": late}
        print(
            f"{count:>10}{first:>15.1f}{early:>12.0f}{late:>12.0f}"
            + "".join(
                f"{peaks.get(name, 0):>{w}.0f}" for name, w in (("driver", 12), ("worker", 12), ("coordinator", 16))
            ),
            flush=True,
        )
    largest = counts[-1]
    bench.floor(f"driver GB, {largest} volumes", bench.facts[f"{largest} volumes"]["driver"] / 1000, at_most=2.0)
    bench.floor(f"seconds to the first batch, {largest} volumes", first, at_most=30.0)
    bench.floor(f"last third over middle third, {largest} volumes", late / early, at_least=0.9)
    bench.floor(f"rate at {largest} over rate at {counts[0]} volumes", rates[largest] / rates[counts[0]], at_least=0.9)


def pace(records: list[dict[str, Any]]) -> float:
    """Patches/s between the first and the last of some records."""
    first, last = records[0], records[-1]
    return float((last["patches"] - first["patches"]) / (last["time"] - first["time"]))


def memory(root: psutil.Process) -> dict[str, float]:
    """MB of private memory of the driver, the largest worker and the largest coordinator."""
    found: dict[str, float] = {}
    for process in (root, *root.children(recursive=True)):
        try:
            command = " ".join(process.cmdline())
            kinds = {"SplitCoordinator": "coordinator", "RayTrainWorker": "worker"}
            name = next(
                (kind for key, kind in kinds.items() if key in command), "driver" if process == root else "rest"
            )
            usage = process.memory_info()
            found[name] = max(found.get(name, 0.0), (usage.rss - usage.shared) / 1e6)
        except psutil.Error:
            continue
    return found


def read(path: Path) -> list[dict[str, Any]]:
    """The whole lines of a JSONL file so far."""
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text().split("\n")[:-1]]


def cohort(count: int, folder: Path) -> None:
    """A child of part 3: `pretrain()` on `count` volumes, with a line for every record."""
    from ssl_ray.cluster.connect import connect
    from ssl_ray.config.loading import dump
    from ssl_ray.pretrain.driver import pretrain
    from ssl_ray.tracking.tracker import Run

    made = study(folder, count)
    store = Store(folders_of(made).cache)
    training = spread(store, fill(store, 4, (60, 60, 60)), count)
    lines = (folder / f"volumes{count}.jsonl").open("w", buffering=1)

    def line(what: str, **facts: Any) -> None:
        lines.write(json.dumps({"what": what, "time": time.time(), **facts}) + "\n")

    metrics = Run.metrics

    def noted(run: Run, values: Mapping[str, float], step: int, *of: Any) -> None:
        if "system/patches_per_second" in values:
            line("record", patches=step * made.pretrain.batch_size)
        metrics(run, values, step, *of)

    Run.metrics = noted  # type: ignore[method-assign,assignment]
    connect(made.cluster)
    tracker = tracker_of(made)
    line("pretrain")
    pretrain(recipe_of(made), training, training[:2], folders_of(made), tracker, {}, dump(made), "scale")


def study(folder: Path, count: int, batch: int = 8, network: Any = None) -> Any:
    """300 epochs, by default of a network so small that the feed has to hurry."""
    from ssl_ray.config.schema import Study

    preparation = {"spacing": 2, "hu_window": [-57, 164]}
    nowhere = {"root": str(folder), "datalist": "none.json"}
    return Study.model_validate(
        {
            "name": f"volumes{count}",
            "output": str(folder / f"output{count}"),
            "cache": str(folder / "links"),
            "network": network or {"hidden_size": 12, "mlp_dim": 12, "num_heads": 1},
            "cluster": {"cpus": 2, "object_store_gigabytes": 0.3},
            "pretrain": {
                "sources": [nowhere],
                "preparation": preparation,
                "patch_size": 32,
                "batch_size": batch,
                "epochs": 300,
                "validate_every": 300,
                "log_every": 5,
                "block_megabytes": 1,
                "task": {"corruption": {"inpaint_size": [3, 10], "outpaint_size": [8, 20], "shuffle_size": 4}},
            },
            "finetune": {
                "cohort": {"root": str(folder), "classes": 14, "splits": {1: "none.json"}},
                "preparation": preparation,
                "patch_size": 32,
            },
        }
    )


def model(bench: Bench, found: dict[str, float]) -> None:
    """Part 4: what each stage can carry for G GPUs, of blocks of 64 MiB, in patches/s."""
    # Ranks bring cores of their own; with more of them than cores here, their loops would wait for each other.
    worlds = {int(key.split()[3]) for key in found if key.startswith("coordinator a block")}
    world = max((each for each in worlds if each <= (os.cpu_count() or 1)), default=min(worlds))
    coordinator = found[f"coordinator a block, {world} ranks"]
    opening = found[f"open, {world} ranks"]
    reading = read_seconds(bench)
    block = 64 * 2**20 // PATCH
    print(
        f"\nmodel: coordinator {1000 * coordinator:.2f} ms a block, a segment opens in {opening:.1f} s, reading "
        f"{1000 * reading:.2f} ms a patch of 96³, {block} patches a block; all in thousands of patches/s\n"
        f"{'GPUs':>6}{'needed':>10}{'coordinator':>13}{'windows':>10}{'all-reduce':>12}{'cores to read':>15}  limit"
    )
    for gpus in (1, 2, 4, 8, 16, 32, 64, 128, 256):
        needed = gpus * H100
        length = SEGMENT_BLOCKS * gpus * block
        # The next segment opens when half of this one is consumed.
        limits = {"coordinator": gpus * block / coordinator, "windows": length / 2 / opening}
        seconds = 2 * 4 * PARAMETERS * (gpus - 1) / gpus / (NETWORK if gpus > 8 else 200e9)
        limits["all-reduce"] = gpus * 64 / seconds if gpus > 1 else float("inf")
        name = min(limits, key=lambda key: limits[key])
        row = "".join(f"{limits[key] / 1000:>{w}.1f}" for key, w in (("coordinator", 13), ("windows", 10)))
        print(
            f"{gpus:>6}{needed / 1000:>10.1f}{row}{limits['all-reduce'] / 1000:>12.0f}{needed * reading:>15.1f}  "
            + (name if limits[name] < needed else "the GPU")
        )
        bench.facts.setdefault("model", {})[gpus] = limits | {"needed": needed, "cores to read": needed * reading}


def read_seconds(bench: Bench) -> float:
    """CPU seconds of reading one patch of 96³ out of the page cache."""
    store = Store(bench.folder / "large")
    made = fill(store, 1, (180, 170, 150))
    table = SampleTable(0, np.array([made[0].shape]), (96,) * 3, 2, 8, 20)
    source = Feed(table, store, (made[0].key,), ("0",), "uint8", 221)
    samples = [table.sample(index) for index in range(40)]
    source.read(samples)
    start = time.process_time()
    source.read(samples)
    return (time.process_time() - start) / len(samples)


def run(bench: Bench) -> None:
    """All four parts."""
    found = feed(bench)
    steps(bench)
    volumes(bench)
    model(bench, found)


if __name__ == "__main__":
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    if "--cohort" in sys.argv:
        count, folder = (sys.argv[sys.argv.index(name) + 1] for name in ("--cohort", "--folder"))
        cohort(int(count), Path(folder))
    else:
        main(__doc__ or "", run)
