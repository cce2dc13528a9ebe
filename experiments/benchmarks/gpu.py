"""How fast the training steps are on one GPU, how right, and what each choice brings. No network and no data needed.

    PYTHONPATH=. python experiments/benchmarks/gpu.py --out results
    PYTHONPATH=. python experiments/benchmarks/gpu.py --out results --quick     # all of it on a CPU, about 2 minutes

Variants that are compared are timed in turns within one run; a figure is the median of the turns. Results are written
to `<out>/gpu.json` as they come; at the end a table, and as the last line one JSON object with `ratios`, `floors` and
`ok`. Where a part fails, its traceback is in the JSON and the next one goes on.
"""

import argparse
import json
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

import gpu_device
import gpu_end_to_end
import gpu_pretrain
import gpu_unetr
import torch
from gpu_bench import Bench, show


def main() -> int:
    """Run the parts that were asked for; 1 where one failed or a floor was not reached."""
    parts: dict[str, Callable[[Bench], None]] = {
        "device": gpu_device.device,
        "correct": gpu_pretrain.correct,
        "sync": gpu_pretrain.sync,
        "step": gpu_pretrain.step,
        "masked": gpu_pretrain.masked,
        "breakdown": gpu_pretrain.breakdown,
        "profile": gpu_pretrain.profile,
        "variants": gpu_pretrain.variants,
        "compile": gpu_pretrain.compiled,
        "ray": gpu_end_to_end.end_to_end,
        "ray_masked": gpu_end_to_end.masked_end_to_end,
        "unetr": gpu_unetr.unetr,
        "trials": gpu_unetr.trials,
        "small_trials": gpu_unetr.small_trials,
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
    for kind in ("step", "step_compiled", "masked", "end_to_end", "feed"):
        for batch, row in results.get(kind, {}).items():
            print(f"{kind}, {batch}: {show(row)}")
    for name in (
        "device",
        "profile",
        "seconds",
        "unetr_peak_gb",
        "unetr_mfu",
        "unetr_trials",
        *(f"small_trials_{experiment}" for experiment in gpu_unetr.SMALL),
        "unetr_recipe_hours",
    ):
        if name in results:
            print(f"{name}: {show(results[name])}")
    floors = results.get("floors", {})
    ratios |= results.get("ratios", {})
    ok = not results.get("errors") and all(floor["ok"] for floor in floors.values())
    print(json.dumps({"ratios": ratios, "floors": floors, "errors": sorted(results.get("errors", {})), "ok": ok}))
    return 0 if ok else 1


if __name__ == "__main__":
    sys.exit(main())
