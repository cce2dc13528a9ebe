"""How fast the training steps are on one GPU, how right, and what each choice brings. No network and no data needed.

    PYTHONPATH=. python experiments/benchmarks/gpu.py --out results
    PYTHONPATH=. python experiments/benchmarks/gpu.py --out results --quick     # all of it on a CPU, about 2 minutes

Variants that are compared are timed in turns within one run; a figure is the median of the turns. Results are written
to `<out>/gpu.json` as they come; at the end a table, and as the last line one JSON object with `ratios`, `floors` and
`ok`. Where a part fails, its traceback is in the JSON and the next one goes on.
"""

import argparse
import gc
import json
import signal
import statistics
import sys
import time
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

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


def main() -> int:
    """Run the parts that were asked for; 1 where one failed or a floor was not reached."""
    import gpu_device
    import gpu_end_to_end
    import gpu_pretrain
    import gpu_unetr

    parts: dict[str, Callable[[Bench], None]] = {
        "device": gpu_device.device,
        "correct": gpu_pretrain.correct,
        "sync": gpu_pretrain.sync,
        "step": gpu_pretrain.step,
        "breakdown": gpu_pretrain.breakdown,
        "profile": gpu_pretrain.profile,
        "variants": gpu_pretrain.variants,
        "compile": gpu_pretrain.compiled,
        "ray": gpu_end_to_end.end_to_end,
        "unetr": gpu_unetr.unetr,
        "ddp": gpu_pretrain.ddp,
    }
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", default=",".join(parts), help=f"of {', '.join(parts)}; all if left out")
    parser.add_argument("--out", type=Path, default=Path("gpu_results"), help="folder for gpu.json")
    parser.add_argument("--seconds", type=float, default=540, help="begin nothing more after this time")
    parser.add_argument("--quick", action="store_true", help="tiny networks, one turn")
    options = parser.parse_args()
    device = torch.device("cuda:0" if torch.cuda.is_available() else "cpu")
    if device.type == "cpu":
        torch.set_num_threads(1)
    bench = Bench(device, options.quick, options.out, time.monotonic() + options.seconds)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    try:
        for name in options.parts.split(","):
            start = time.monotonic()
            bench.clean()
            bench.attempt(name, call=lambda name=name: parts[name](bench))  # type: ignore[misc]
            bench.put("seconds", name, value=time.monotonic() - start)
    except (SystemExit, KeyboardInterrupt):
        bench.put("errors", "stopped", value="before the end")
    return report(bench)


def report(bench: Bench) -> int:
    """The table, and the last line."""
    results = bench.results
    ratios: dict[str, float] = {}
    print()
    for name, tree in results.items():
        times = tree.get("ms") if isinstance(tree, dict) else None
        if not times:
            continue
        base = next(iter(times))
        print(f"{name}\n  {'variant':<28}{'ms':>10}{f'  {base} = 1':>24}{'spread':>9}")
        for variant, ms in times.items():
            ratios[f"{name}/{variant}"] = times[base] / ms
            print(f"  {variant:<28}{ms:>10.2f}{times[base] / ms:>24.2f}{tree['spread'][variant]:>9.1%}")
    for kind in ("step", "step_compiled", "end_to_end", "feed"):
        for batch, row in results.get(kind, {}).items():
            print(f"{kind}, {batch}: {show(row)}")
    for name in ("device", "profile", "seconds", "unetr_peak_gb"):
        if name in results:
            print(f"{name}: {show(results[name])}")
    floors = results.get("floors", {})
    ratios |= results.get("ratios", {})
    ok = not results.get("errors") and all(floor["ok"] for floor in floors.values())
    print(json.dumps({"ratios": ratios, "floors": floors, "errors": sorted(results.get("errors", {})), "ok": ok}))
    return 0 if ok else 1


if __name__ == "__main__":
    sys.exit(main())
