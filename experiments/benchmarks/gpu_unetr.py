"""The fine-tuning step of the reference recipe (UNETR, 4 patches of 96³, 14 classes) and inference of a volume."""

import argparse
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from gpu_bench import PEAK_TFLOPS, Bench
from gpu_pretrain import study
from monai.networks.blocks.selfattention import SABlock
from torch.utils.flop_counter import FlopCounterMode

from ssl_ray.finetune.learner import SegmentationLearner
from ssl_ray.networks.faster import use_patch_products
from ssl_ray.study.experiment import load

SMALL = ("real_ct", "real_ct_gpu")
"""Experiments whose trials leave most of a device idle."""

Build = Callable[[], Callable[[], Any]]


def unetr(bench: Bench) -> None:
    """Step and inference, each choice in turns against the step that a trial takes."""
    cuda = bench.device.type == "cuda"

    def learner(**finetune: Any) -> SegmentationLearner:
        return learner_of(bench, **finetune)

    def step(change: Callable[[SegmentationLearner], Any] = lambda made: None, **finetune: Any) -> Build:
        def build() -> Callable[[], Any]:
            made = learner(**finetune)
            change(made)
            return stepper(made)

        return build

    kinds = {
        "ours": step(),
        "MONAI's attention": step(plain_attention),
        "not channels_last": step(contiguous),
        "products": step(lambda made: use_patch_products(made.network)),
        "float32": step(precision="float32"),
    }
    if not bench.quick:
        kinds["compiled"] = step(compile=True)
    if cuda:
        kinds["eager"] = step(eager)
    if cuda and not bench.quick:
        kinds["compiled, eager"] = step(eager, compile=True)
    bench.compare("unetr_step", kinds, turns=2)
    if cuda:
        for name, change in (("channels_last", lambda made: None), ("contiguous", contiguous)):

            def peak(name: str = name, change: Callable[[SegmentationLearner], Any] = change) -> None:
                call = step(change)()
                torch.cuda.reset_peak_memory_stats()
                call()
                bench.put("unetr_peak_gb", name, value=torch.cuda.max_memory_allocated() / 1e9)

            bench.attempt("unetr", "peak", name, call=peak)

    volume = torch.rand((1, 48, 40, 40) if bench.quick else (1, 240, 200, 200), device=bench.device)

    def infer(windows: int, change: Callable[[SegmentationLearner], Any] = lambda made: None) -> Build:
        def build() -> Callable[[], Any]:
            made = learner(sliding_window_batch=windows)
            change(made)
            return lambda: made.predict(volume)

        return build

    inferences = {"4 windows": infer(4), "1 window": infer(1), "16 windows": infer(16)}
    bench.compare("unetr_inference", inferences | {"4, not ch.last": infer(4, contiguous)})
    made = learner()
    eager(made)
    with FlopCounterMode(display=False) as counter:
        made.step(*batch_of(made), 1e-4)
    for name, ms in bench.results["unetr_step"]["ms"].items():
        bench.put("unetr_mfu", name, value=counter.get_total_flops() / ms / 1e9 / PEAK_TFLOPS)
    bench.attempt("unetr", "profile", call=lambda: bench.kernels("unetr", step(compile=not bench.quick)()))
    steps, volumes = bench.results["unetr_step"]["ms"], bench.results["unetr_inference"]["ms"]
    hours = 6 * (30_000 * min(steps.values()) + 300 * 6 * min(volumes.values())) / 3.6e6
    bench.put("unetr_recipe_hours", "six trials one by one, fastest variants", value=hours)


def trials(bench: Bench) -> None:
    """Steps a second of one, two and three of the recipe's trials on one device, at the same time."""
    for compiled in (False, True) if not bench.quick else (False,):
        for count in (1, 2) if bench.quick else (1, 2, 3):
            together(bench, "unetr_trials_compiled" if compiled else "unetr_trials", count, ["--compile"] * compiled)


def small_trials(bench: Bench) -> None:
    """The same of the trials of `SMALL`, which fill a device only together."""
    for name in SMALL:
        for count in (2,) if bench.quick else (1, 4, 16):
            together(bench, f"small_trials_{name}", count, ["--small", name])


def together(bench: Bench, kind: str, count: int, arguments: list[str]) -> None:
    """So many trials, each a process of its own: steps a second of all, and of the slowest."""
    seconds = 1 if bench.quick else 8
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, __file__, "--seconds", str(seconds), "--folder", folder, *arguments]
        command += ["--quick"] * bench.quick
        processes = [
            subprocess.Popen([*command, "--name", str(number)], stdout=subprocess.PIPE, text=True)
            for number in range(count)
        ]
        while len(list(Path(folder).glob("ready_*"))) < count and all(p.poll() is None for p in processes):
            time.sleep(0.05)
        Path(folder, "go").touch()
        rates = [float(process.communicate(timeout=120)[0].split()[-1]) for process in processes]
    bench.put(kind, str(count), value={"steps_per_second": sum(rates), "slowest": min(rates)})


def learner_of(bench: Bench, network: dict[str, Any] | None = None, **finetune: Any) -> SegmentationLearner:
    """A learner of the recipe's trials, or of another network, or a tiny one."""
    base = study(bench, Path(tempfile.gettempdir()), 8, network)
    config = base.finetune.model_copy(update={"patches_per_volume": 2 if bench.quick else 4} | finetune)
    return SegmentationLearner(config, base.network, bench.device, seed=0)


def batch_of(made: SegmentationLearner) -> tuple[torch.Tensor, torch.Tensor]:
    """Images and labels of one step, as they come from the host."""
    images = torch.rand(made.config.patches_per_volume, 1, *made.config.patch_size)
    labels = torch.randint(made.config.cohort.classes, images.shape, dtype=torch.uint8)
    return (images.pin_memory(), labels.pin_memory()) if made.device.type == "cuda" else (images, labels)


def stepper(made: SegmentationLearner) -> Callable[[], Any]:
    """A call that makes one step."""
    images, labels = batch_of(made)
    return lambda: made.step(images, labels, 1e-4)


def eager(made: SegmentationLearner) -> None:
    """Without the CUDA graph."""
    made.graphs = False


def contiguous(made: SegmentationLearner) -> None:
    """The network as it is built."""
    made.network.to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]


def plain_attention(made: SegmentationLearner) -> None:
    """Two matrix products, as on a CPU."""
    for block in made.network.modules():
        if isinstance(block, SABlock):
            block.__class__, block.use_flash_attention = SABlock, False


def one_trial() -> None:
    """One process of `trials`: warm up, wait for the others, and print steps a second."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--small", choices=SMALL)
    parser.add_argument("--seconds", type=float)
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--name")
    options = parser.parse_args()
    device = torch.device("cuda:0" if torch.cuda.is_available() else "cpu")
    bench = Bench(device, options.quick, options.folder, 0)
    small: dict[str, Any] = {}
    if options.small:
        made = load(Path(__file__).parents[1] / f"{options.small}.yaml")
        patches = made.finetune.volumes_per_step * made.finetune.patches_per_volume
        small = {"network": made.network.model_dump(), "patch_size": made.finetune.patch_size}
        small |= {"patches_per_volume": patches}
    call = stepper(learner_of(bench, **small, compile=options.compile))
    for _ in range(3):
        call()
    bench.wait()
    (options.folder / f"ready_{options.name}").touch()
    while not (options.folder / "go").exists():
        time.sleep(0.01)
    count, start = 0, time.perf_counter()
    while time.perf_counter() - start < options.seconds:
        call()
        count += 1
        bench.wait()
    print(count / (time.perf_counter() - start))


if __name__ == "__main__":
    one_trial()
