"""What the benchmarks share: cost of a call in wall and CPU time, comparison in turns, floors, the last line."""

import argparse
import json
import multiprocessing
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

os.environ["OMP_NUM_THREADS"] = "1"  # also of every process that a benchmark starts
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")

import numpy as np
import psutil
import torch

from ssl_ray.cluster.malloc import keep_freed
from ssl_ray.training.precision import named, resolve

torch.set_num_threads(1)


def start_ray() -> None:
    """A Ray of two CPUs and a small object store for this benchmark alone."""
    import ray

    from ssl_ray.cluster.worker import quiet, runtime_env

    quiet()
    ray.init(
        address="local",
        num_cpus=2,
        object_store_memory=400 * 2**20,
        include_dashboard=False,
        log_to_driver=False,
        runtime_env=runtime_env(),
    )


@dataclass(frozen=True)
class Cost:
    """Seconds an item: by the clock, and of CPU over this process and all that it started."""

    wall: float
    cpu: float


class Ledger:
    """CPU time that a process and its descendants have used, those that have ended included.

    Whoever ends may take its count along (Ray does not wait for its workers), so a thread notes it twice a second.
    """

    def __init__(self, root: psutil.Process | None = None) -> None:
        self._root = root or psutil.Process()
        self._own = root is None
        self._used: dict[tuple[int, float], tuple[float, str]] = {}
        self._lock = threading.Lock()
        self._spent = 0.0  # by the noting itself
        threading.Thread(target=self._watch, daemon=True).start()

    def seconds(self, what: str = "") -> float:
        """CPU seconds so far, of all, or of the descendants whose command line holds some words."""
        with self._lock:
            start = time.thread_time()
            with suppress(psutil.Error):
                for process in ([] if self._own else [self._root]) + self._root.children(recursive=True):
                    with suppress(psutil.Error):
                        times = process.cpu_times()
                        key = process.pid, process.create_time()
                        self._used[key] = times.user + times.system, " ".join(process.cmdline())
            self._spent += time.thread_time() - start
            own = time.process_time() - self._spent if self._own and not what else 0.0
            return own + sum(used for used, command in self._used.values() if what in command)

    def _watch(self) -> None:
        while True:
            self.seconds()
            time.sleep(0.5)


@cache
def ledger() -> Ledger:
    """Of this process."""
    return Ledger()


def cost(call: Callable[[], int]) -> Cost:
    """Cost an item of a call that returns how many it did."""
    cpu, wall = ledger().seconds(), time.perf_counter()
    count = call()
    wall = time.perf_counter() - wall
    return Cost(wall / count, (ledger().seconds() - cpu) / count)


@dataclass
class Bench:
    """One benchmark: its options, what it has found, and how it ends."""

    quick: bool
    folder: Path
    precision: str
    """What the network multiplies in: as `auto` comes to on this CPU, or float32."""
    ratios: dict[str, float] = field(default_factory=dict)
    floors: dict[str, Any] = field(default_factory=dict)
    facts: dict[str, Any] = field(default_factory=dict)

    def compare(self, title: str, variants: Mapping[str, Callable[[], int]], rounds: int, unit: str) -> dict[str, Cost]:
        """Cost of each variant, in turns: forth, back, forth, ... A variant does some items and returns how many.

        Returns:
            The medians over the rounds.
        """
        found: dict[str, list[Cost]] = {name: [] for name in variants}
        names = list(variants)
        for turn in range(1 if self.quick else rounds):
            for name in names if turn % 2 == 0 else names[::-1]:
                found[name].append(cost(variants[name]))
        return self.table(title, found, unit)

    def table(self, title: str, found: Mapping[str, Sequence[Cost]], unit: str) -> dict[str, Cost]:
        """Print medians, with their spread over the rounds, against the first variant; returns them."""
        medians = {
            name: Cost(*(statistics.median(getattr(one, kind) for one in costs) for kind in ("wall", "cpu")))
            for name, costs in found.items()
        }
        base = next(iter(medians.values()))
        width = max(map(len, medians)) + 2
        columns = ("a core s", "ms CPU", "spread", "ms wall", "first/this")
        print(f"\n{title}, {unit}\n{'':{width}}" + "".join(f"{column:>12}" for column in columns))
        for name, one in medians.items():
            cpus = [cost.cpu for cost in found[name]]
            spread = (max(cpus) - min(cpus)) / max(one.cpu, 1e-9)
            print(
                f"{name:{width}}{1 / max(one.cpu, 1e-9):>12.4g}{1000 * one.cpu:>12.4g}{spread:>12.0%}"
                f"{1000 * one.wall:>12.4g}{base.cpu / max(one.cpu, 1e-9):>12.2f}",
                flush=True,
            )
        self.facts[title] = {name: [one.wall, one.cpu] for name, one in medians.items()}
        return medians

    def ratio(self, name: str, theirs: Cost, ours: Cost, floor: float | None = None) -> None:
        """How many times as much theirs costs, in CPU time and by the clock; the floor is one of CPU time."""
        self.ratios[name] = theirs.cpu / ours.cpu
        self.ratios[f"{name} (wall)"] = theirs.wall / ours.wall
        if floor is not None:
            self.floor(name, self.ratios[name], at_least=floor)

    def floor(self, name: str, found: float, at_least: float | None = None, at_most: float | None = None) -> None:
        """Hold a figure against what is asked of it."""
        ok = (at_least is None or found >= at_least) and (at_most is None or found <= at_most)
        limits = {"at_least": at_least, "at_most": at_most}
        self.floors[name] = {"found": found} | {k: v for k, v in limits.items() if v is not None} | {"ok": ok}

    def finish(self) -> int:
        """Print floors and the JSON line; 1 where a floor is not reached, which a quick run does not ask for."""
        print()
        for name, floor in self.floors.items():
            limit = " ".join(f"{k.replace('_', ' ')} {v:g}" for k, v in floor.items() if k.startswith("at_"))
            print(f"{'ok  ' if floor['ok'] else 'LOW '} {name}: {floor['found']:.4g} ({limit})")
        ok = all(floor["ok"] for floor in self.floors.values())
        result = {"ratios": self.ratios, "floors": self.floors, "ok": ok, "quick": self.quick, "facts": self.facts}
        result["precision"] = self.precision
        print(json.dumps(result, default=float), flush=True)
        return 0 if ok or self.quick else 1


def main(description: str, run: Callable[[Bench], None]) -> None:
    """Parse the options, run the benchmark in a folder that is removed afterwards, exit."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="tiny sizes, one turn, floors are not enforced")
    parser.add_argument("--float32", action="store_true", help="as on a CPU that does not multiply in bfloat16")
    options = parser.parse_args()
    precision = "float32" if options.float32 else named(resolve("auto", torch.device("cpu")))
    keep_freed()  # as ssl_ray's workers do
    with tempfile.TemporaryDirectory(prefix="ssl_ray_bench_") as folder:
        bench = Bench(options.quick, Path(folder), precision)
        run(bench)
        code = bench.finish()
    sys.exit(code)


class Elsewhere:
    """An object in a process of its own, whose malloc is as it comes: what ours is compared with."""

    def __init__(self, make: Callable[..., Any], *args: Any) -> None:
        context = multiprocessing.get_context("spawn")
        self._pool = ProcessPoolExecutor(1, context, initializer=_make, initargs=(make, args))

    def __call__(self, method: str, *args: Any) -> Any:
        """What a method of the object returns."""
        return self._pool.submit(_call, method, args).result()

    def stop(self) -> None:
        """End the process."""
        self._pool.shutdown()


def _make(make: Callable[..., Any], args: tuple[Any, ...]) -> None:
    global _made
    _made = make(*args)


def _call(method: str, args: tuple[Any, ...]) -> Any:
    return getattr(_made, method)(*args)


_made: Any = None


class Watched:
    """A command in a process of its own, whose CPU time is noted as it runs."""

    def __init__(self, command: Sequence[str], log: Path, **environment: str) -> None:
        with log.open("wb") as out:
            self._process = subprocess.Popen(
                command, stdout=out, stderr=subprocess.STDOUT, env={**os.environ, **environment}, start_new_session=True
            )
        self._log = log
        self.tree = psutil.Process(self._process.pid)
        self.ledger = Ledger(self.tree)
        self.started = time.time()
        self.points: list[tuple[float, float]] = [(self.started, 0.0)]

    def wait(self, until: Callable[[], bool] = lambda: False, at_most: float = 540.0) -> None:
        """Until the command ends, or a condition holds, or time is over.

        Raises:
            RuntimeError: with the end of its output, when the command fails.
        """
        while self._process.poll() is None and not until() and time.time() - self.started < at_most:
            self.points.append((time.time(), self.ledger.seconds()))
            time.sleep(0.25)
        if self._process.returncode:
            raise RuntimeError(f"{self._process.args!r}: {self._log.read_text(errors='replace')[-3000:]}")

    def cpu(self, at: float) -> float:
        """CPU seconds that it had used at a time (of `time.time`)."""
        times, used = zip(*self.points, strict=True)
        return float(np.interp(at, times, used))

    def stop(self) -> None:
        """End it and what it started."""
        with suppress(psutil.Error):
            processes = [self.tree, *self.tree.children(recursive=True)]
            self._process.terminate()
            with suppress(subprocess.TimeoutExpired):
                self._process.wait(20)
            for process in processes:
                with suppress(psutil.Error):
                    process.kill()
