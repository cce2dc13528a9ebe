"""What the parts of `gpu.py` share: where to run, how to time, and where figures go."""

import gc
import json
import statistics
import time
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch._C._autograd import DeviceType

PEAK_TFLOPS = 989.0
"""Dense bfloat16 of an H100 SXM by its data sheet; MFU counts against this, whatever the device."""


@dataclass
class Bench:
    """Where to run, how long, and what was found so far."""

    device: torch.device
    quick: bool
    folder: Path
    until: float
    results: dict[str, Any] = field(default_factory=dict)

    def put(self, *path: str, value: Any) -> None:
        """Keep and print one result; `path` are the keys in the JSON."""
        tree = self.results
        for key in path[:-1]:
            tree = tree.setdefault(key, {})
        tree[path[-1]] = value
        self.folder.mkdir(parents=True, exist_ok=True)
        (self.folder / "gpu.json").write_text(json.dumps(self.results, indent=1))
        if "spread" not in path:
            print(f"[{time.strftime('%H:%M:%S')}] {' / '.join(path)}: {show(value)[:1500]}", flush=True)

    def attempt(self, *path: str, call: Callable[[], Any]) -> Any:
        """What `call` returns; None after an error, which is kept, or when there is no time left."""
        if self.left <= 0:
            self.put("skipped", "/".join(path), value="no time left")
            return None
        try:
            return call()
        except Exception as error:
            self.put(
                "errors", "/".join(path), value=f"{type(error).__name__}: {error}\n{traceback.format_exc()[-3000:]}"
            )
            return None

    @property
    def left(self) -> float:
        """Seconds."""
        return self.until - time.monotonic()

    def clean(self) -> None:
        """Give back what nothing refers to."""
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def wait(self) -> None:
        """For the device."""
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def seconds(self, call: Callable[[], Any], at_least: float = 0.4) -> float:
        """Seconds a call, the host's share included: enough calls in a row to take `at_least`."""
        self.wait()
        start = time.perf_counter()
        call()
        self.wait()
        once = time.perf_counter() - start
        count = 1 if self.quick else max(3, min(200, int(at_least / once)))
        start = time.perf_counter()
        for _ in range(count):
            call()
        self.wait()
        return (time.perf_counter() - start) / count

    def kernels(self, name: str, call: Callable[[], Any]) -> None:
        """Time by kernel of a call, the mean of three: a table in `profile_<name>.txt`, its head printed."""
        activity = torch.profiler.ProfilerActivity
        cuda = self.device.type == "cuda"
        with torch.profiler.profile(activities=[activity.CPU] + [activity.CUDA] * cuda) as trace:
            for _ in range(3):
                call()
            self.wait()
        averages = trace.key_averages()
        order = "self_device_time_total" if cuda else "self_cpu_time_total"
        rows = [row for row in averages if not cuda or row.device_type == DeviceType.CUDA]
        rows.sort(key=lambda row: -getattr(row, order))
        total, count = sum(getattr(row, order) for row in rows), sum(row.count for row in rows) // 3
        table = [f"{getattr(row, order) / 3000:9.3f} ms {row.count // 3:5d} x  {row.key[:110]}" for row in rows[:70]]
        text = f"{name}: {total / 3000:.2f} ms of kernels, {count} a step\n"
        self.folder.mkdir(parents=True, exist_ok=True)
        (self.folder / f"profile_{name}.txt").write_text(text + "\n".join(table) + "\n")
        print(text + "\n".join(table[:30]), flush=True)
        self.put("profile", f"kernels_{name}", value=count)
        self.put("profile", f"kernel_ms_{name}", value=total / 3000)

    def compare(self, name: str, variants: Mapping[str, Callable[[], Callable[[], Any]]], turns: int = 3) -> None:
        """Seconds a call of each variant, in turns. A variant builds (and warms up) what is then called."""
        calls: dict[str, Callable[[], Any]] = {}
        found: dict[str, list[float]] = {}

        def take(variant: str) -> None:
            took = self.attempt(name, variant, call=lambda: self.seconds(calls[variant]))
            if took:
                times = found.setdefault(variant, [])
                times.append(1000 * took)
                middle = statistics.median(times)
                self.put(name, "ms", variant, value=middle)
                self.put(name, "spread", variant, value=(max(times) - min(times)) / middle)

        for variant, build in variants.items():
            start = time.perf_counter()
            call = self.attempt(name, variant, call=lambda build=build: warm(build(), self))  # type: ignore[misc]
            if call:
                calls[variant] = call
                self.put(name, "build_seconds", variant, value=time.perf_counter() - start)
                take(variant)  # at once too: building the next one may take all the time that is left
        for _ in range(0 if self.quick else turns - 1):
            for variant in calls:
                take(variant)


def warm(call: Callable[[], Any], bench: Bench) -> Callable[[], Any]:
    """The same call, after it has been made three times."""
    for _ in range(1 if bench.quick else 3):
        call()
    bench.wait()
    return call


def show(value: Any) -> str:
    """A result for a person."""
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, dict):
        return ", ".join(f"{key} {show(item)}" for key, item in value.items())
    return str(value)
