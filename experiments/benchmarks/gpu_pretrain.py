"""The pretraining step: right, without waiting, how fast, and what each choice brings."""

import copy
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gpu_bench import PEAK_TFLOPS, Bench, warm
from monai.networks.blocks.selfattention import SABlock
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from ssl_ray.config.schema import Study
from ssl_ray.data.store import Store
from ssl_ray.networks.registry import build_autoencoder
from ssl_ray.pretrain.job import Job
from ssl_ray.pretrain.learner import PretrainingLearner, scale
from ssl_ray.pretrain.samples import SampleTable
from ssl_ray.pretrain.stream import Feed
from ssl_ray.pretrain.tasks.registry import task_cost
from ssl_ray.pretrain.tasks.restoration import corruption
from ssl_ray.pretrain.tasks.restoration.corruption import draw, draws_of
from ssl_ray.storage.mirror import Mirror
from ssl_ray.study.parts import folders_of, recipe_of
from ssl_ray.training.gpu import to_device
from ssl_ray.training.optimizer import take_step
from ssl_ray.training.precision import autocast

VIT_B: dict[str, int] = {"hidden_size": 768, "mlp_dim": 3072, "num_heads": 12}
TINY: dict[str, int] = {"hidden_size": 48, "mlp_dim": 96, "num_heads": 3}
SMALL_BOXES: dict[str, Any] = {"inpaint_size": [3, 12], "outpaint_size": [8, 22], "shuffle_size": 4}


PRIMUS: dict[str, Any] = {"kind": "primus"}
TINY_PRIMUS: dict[str, Any] = PRIMUS | {"hidden_size": 48, "layers": 2, "num_heads": 4}


def study(bench: Bench, folder: Path, batch: int, network: dict[str, Any] | None = None, **pretrain: Any) -> Study:
    """The reference recipe with another batch, task or network; tiny where it must be quick."""
    side = 32 if bench.quick else 96
    if bench.quick and isinstance(pretrain.setdefault("task", {}), dict):
        pretrain["task"] = {"corruption": SMALL_BOXES} | pretrain["task"]
    preparation = {"spacing": 2, "hu_window": [-57, 164]}
    settings: dict[str, Any] = {
        "sources": [{"root": str(folder), "datalist": "none.json"}],
        "preparation": preparation,
        "patch_size": side,
        "batch_size": batch,
        "optimizer": {"name": "adam", "lr": 1e-4},
        "gpu": bench.device.type == "cuda",
    }
    return Study.model_validate(
        {
            "name": "gpu",
            "output": str(folder / "output"),
            "cache": str(folder / "cache"),
            "network": network or (TINY if bench.quick else VIT_B),
            "pretrain": settings | pretrain,
            "finetune": {
                "cohort": {"root": str(folder), "classes": 14, "splits": {1: "none.json"}},
                "preparation": preparation,
                "patch_size": side,
            },
        }
    )


def learner(bench: Bench, batch: int, network: dict[str, Any] | None = None, **pretrain: Any) -> PretrainingLearner:
    """A learner outside Ray, on one worker."""
    bench.clean()
    made = study(bench, Path(tempfile.gettempdir()), batch, network, **pretrain)
    patch = made.pretrain.patch_size
    table = SampleTable(0, np.array([[side * 2 for side in patch]] * 4), patch, 2, batch, 1)
    feed = Feed(table, Store(folders_of(made).cache), ("a",) * 4, ("a",) * 4, "uint8", 221)
    folder = folders_of(made).study
    job = Job(recipe_of(made), feed, feed, folder, Mirror(folder), "key", None)  # type: ignore[arg-type]
    return PretrainingLearner(job, bench.device)


def patches(bench: Bench, batch: int, seed: int = 0, pin: bool = True) -> np.ndarray[Any, Any]:
    """(B, X, Y, Z) uint8 blobs on noise, in pinned memory on a GPU."""
    side = 32 if bench.quick else 96
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand((batch, 1, 6, 6, 6), generator=generator)
    smooth = nn.functional.interpolate(coarse, (side,) * 3, mode="trilinear")[:, 0]
    noisy = smooth.mul_(200).add_(torch.rand((side,) * 3, generator=generator), alpha=20).to(torch.uint8)
    there = noisy.pin_memory() if pin and bench.device.type == "cuda" else noisy
    return there.numpy()


def plain(made: PretrainingLearner) -> PretrainingLearner:
    """Back to MONAI's attention and convolutions as they come."""
    for module in made.network.modules():
        if isinstance(module, SABlock):
            module.__class__, module.use_flash_attention = SABlock, False
        elif isinstance(module, nn.Conv3d | nn.ConvTranspose3d):
            module.__class__ = nn.Conv3d if isinstance(module, nn.Conv3d) else nn.ConvTranspose3d
    made.graphs = False
    return made


def eager(made: PretrainingLearner) -> PretrainingLearner:
    """Without the CUDA graph."""
    made.graphs = False
    return made


def stepper(bench: Bench, made: PretrainingLearner, batch: int, pin: bool = True) -> Callable[[], Any]:
    """A call that makes one step, on three sets of patches in turn, as the loop does: a step behind the device."""
    sets = [patches(bench, batch, seed, pin) for seed in range(3)]
    state: dict[str, Any] = {"step": 0, "before": None}

    def call() -> None:
        index = state["step"]
        indices = np.arange(index * batch, (index + 1) * batch)
        made.step(sets[index % 3], indices, 1e-4)
        state["step"] += 1
        if bench.device.type == "cuda":
            if state["before"] is not None:
                state["before"].synchronize()
            state["before"] = torch.cuda.current_stream().record_event()

    return call


def flops(bench: Bench) -> float:
    """Floating-point operations of one trained view: matrix products and convolutions, forward and backward."""
    made = study(bench, Path(tempfile.gettempdir()), 8)
    network = build_autoencoder(made.network, made.pretrain.patch_size).to(bench.device)
    with FlopCounterMode(display=False) as counter:
        network(torch.zeros(1, 1, *made.pretrain.patch_size, device=bench.device))[0].mean().backward()
    return float(counter.get_total_flops())


def rate(bench: Bench, batch: int, seconds: float) -> dict[str, float]:
    """What a step of so many seconds means."""
    mfu = flops(bench) * batch / seconds / PEAK_TFLOPS / 1e12
    hours = 360_000 / batch * seconds / 3600
    return {"ms": 1000 * seconds, "patches_per_second": batch / seconds, "mfu": mfu, "recipe_hours": hours}


def correct(bench: Bench) -> None:
    """Corruption as on the CPU; the losses of 50 steps against plain float32 without TF32."""
    side, batch, steps = (32, 4, 6) if bench.quick else (96, 8, 50)
    task: Any = study(bench, Path(tempfile.gettempdir()), batch).pretrain.task
    config = task.corruption
    clean = scale(torch.from_numpy(patches(bench, batch, pin=False)), 221)
    drawn = draw(config, (side,) * 3, 3, np.arange(batch))
    on_device = draws_of(config, drawn.table.to(bench.device))
    there = corruption.corrupt(clean.to(bench.device), on_device).cpu()
    here = corruption.corrupt(clean, drawn)
    worst = float((there - here).abs().max())
    bench.put("correct", "corruption_largest_difference", value=worst)
    bench.put("floors", "corruption_as_on_cpu", value={"found": worst, "at_most": 1e-6, "ok": worst <= 1e-6})

    if bench.device.type == "cuda":
        bench.put("correct", "painted_by_the_kernel", value=corruption.fused_paint() is not None)
    losses: dict[str, list[float]] = {}
    with_options: dict[str, dict[str, Any]] = {
        "plain_float32": {"precision": "float32"},
        "ours_eager": {},
        "ours": {},
        "ours_again": {},
        "ours_resumed": {},
    } | ({} if bench.quick else {"ours_compiled": {"compile": True}})
    for name, options in with_options.items():

        def run(name: str = name, options: dict[str, Any] = options) -> list[float]:
            torch.backends.cudnn.allow_tf32 = name != "plain_float32"
            made = learner(bench, batch, **options)
            if name == "plain_float32":
                plain(made)
            if name == "ours_eager":
                eager(made)
            sets = [patches(bench, batch, seed) for seed in range(5)]
            found = []
            for i in range(steps):
                if name == "ours_resumed" and i == steps // 2:
                    state = copy.deepcopy(made.state())
                    made = learner(bench, batch, **options)
                    made.load(state)
                found.append(made.step(sets[i % 5], np.arange(i * batch, (i + 1) * batch), 1e-4)[0])
            if bench.device.type == "cuda":
                bench.put("correct", "graph", name, value=made._graph is not None)
            return torch.stack(found).tolist()

        found = bench.attempt("correct", name, call=run)
        torch.backends.cudnn.allow_tf32 = True
        if found:
            losses[name] = found
            bench.put("correct", "losses", name, value=[round(loss, 6) for loss in found])
    for name in ("ours_eager", "ours_again", "ours_resumed"):
        if name in losses and "ours" in losses:
            difference = float(np.abs(np.array(losses[name]) / np.array(losses["ours"]) - 1).max())
            bench.put("correct", f"{name}_against_ours", value=difference)
    for name, tolerance in (("ours_eager", 2e-2), ("ours", 2e-2), ("ours_resumed", 2e-2), ("ours_compiled", 2e-2)):
        if name in losses:
            reference = np.array(losses["plain_float32"])
            difference = float(np.abs(np.array(losses[name]) / reference - 1).max())
            bench.put("correct", f"{name}_largest_relative_difference", value=difference)
            ok = difference <= tolerance
            bench.put("floors", f"losses_{name}", value={"found": difference, "at_most": tolerance, "ok": ok})


def sync(bench: Bench) -> None:
    """No call of a step makes the host wait for the device: torch raises where one does."""
    if bench.device.type != "cuda":
        bench.put("sync", value="needs a GPU")
        return
    two: dict[str, Any] = {"task": {"contrastive": {"enabled": True}}}
    for name, options, graphs in (("one_view", {}, True), ("two_views", two, True), ("eager", {}, False)):

        def run(options: dict[str, Any] = options, graphs: bool = graphs) -> None:
            made = learner(bench, 8, **options)
            made.graphs = graphs
            call = stepper(bench, made, 8)
            call()
            torch.cuda.synchronize()
            torch.cuda.set_sync_debug_mode("error")
            try:
                for _ in range(4):
                    call()
            finally:
                torch.cuda.set_sync_debug_mode("default")

        bench.attempt("sync", name, call=run)
    bench.put(
        "sync", value="none" if not any(key.startswith("sync/") for key in bench.results.get("errors", {})) else "found"
    )


def step(bench: Bench) -> None:
    """Our step as it comes, by batch: time, MFU, peak memory. The data are in memory: the end-to-end ceiling."""
    bench.put("gflop_a_view", value=flops(bench) / 1e9)
    for kind, options, batches in (
        ("step_compiled", {"compile": True}, (64, 256, 8, 128)),
        ("step", {}, (8, 16, 32, 64, 128, 256)),
    ):
        for batch in (2, 4) if bench.quick else batches:

            def run(kind: str = kind, options: dict[str, Any] = options, batch: int = batch) -> None:
                if bench.device.type == "cuda":
                    torch.cuda.reset_peak_memory_stats()
                start = time.monotonic()
                made = learner(bench, batch, **options)
                call = warm(stepper(bench, made, batch), bench)
                built = time.monotonic() - start
                row = rate(bench, batch, min(bench.seconds(call, 0.8) for _ in range(2)))
                row["build_seconds"] = built
                if bench.device.type == "cuda":
                    row["peak_gb"] = torch.cuda.max_memory_allocated() / 1e9
                    row["graph"] = made._graph is not None
                    row["compiled"] = made.config.compile
                bench.put(kind, str(batch), value=row)

            bench.attempt(kind, str(batch), call=run)
        torch.compiler.reset()
    rows = [*bench.results.get("step", {}).values(), *bench.results.get("step_compiled", {}).values()]
    if rows and bench.device.type == "cuda" and not bench.quick:
        best = max(row["mfu"] for row in rows)
        bench.put("floors", "mfu", value={"found": best, "at_least": 0.3, "ok": best >= 0.3})


def masked(bench: Bench) -> None:
    """Both tasks with both networks, compiled, in turns: time, patches/s, MFU, and how much memory each takes."""
    primus: dict[str, Any] = {"network": TINY_PRIMUS if bench.quick else PRIMUS}
    kinds: dict[str, dict[str, Any]] = {
        "restoration, unetr": {},
        "masked, unetr": {"task": "masked"},
        "masked, primus": {"task": "masked"} | primus,
        "restoration, primus": primus,
    }
    for batch in (2,) if bench.quick else (16, 64):  # 64 patches of 1728 tokens take more than one device has
        costs: dict[str, int] = {}
        peaks: dict[str, dict[str, float | bool]] = {}

        def build(name: str, batch: int = batch, costs: Any = costs, peaks: Any = peaks) -> Callable[[], Any]:
            cuda = bench.device.type == "cuda"
            before = torch.cuda.memory_allocated() if cuda else 0
            made = learner(bench, batch, compile=not bench.quick, **kinds[name])
            costs[name] = task_cost(made.config.task, made.job.recipe.network, made.config.patch_size).training
            call = stepper(bench, made, batch)
            if cuda:
                torch.cuda.reset_peak_memory_stats()
            warm(call, bench)
            peaks[name] = {"peak_gb": (torch.cuda.max_memory_allocated() - before) / 1e9} if cuda else {}
            peaks[name] |= {"compiled": made.config.compile, "graph": made._graph is not None}
            return call

        names = [name for name in kinds if batch < 64 or name != "restoration, primus"]
        bench.compare(f"masked_{batch}", {name: (lambda name=name: build(name)) for name in names})  # type: ignore[misc]
        for name, ms in bench.results.get(f"masked_{batch}", {}).get("ms", {}).items():
            row = {
                "ms": ms,
                "patches_per_second": 1000 * batch / ms,
                "mfu": costs[name] * batch / ms / 1e9 / PEAK_TFLOPS,
            }
            bench.put("masked", f"{batch}, {name}", value=row | peaks[name])
        torch.compiler.reset()


def breakdown(bench: Bench) -> None:
    """The pieces of a step, one by one, each waited for: their sum is more than a step."""
    for batch in (2,) if bench.quick else (8, 64):

        def run(batch: int = batch) -> None:
            made, array = learner(bench, batch), patches(bench, batch)
            task: Any = made.task
            network, config, side, indices = task.network, task.corruption, made.config.patch_size, np.arange(batch)
            stored = torch.from_numpy(array).to(bench.device)
            clean = scale(stored, 221)
            drawn = draw(config, side, 0, indices)
            there = draws_of(config, to_device(drawn.table, bench.device))
            view = corruption.corrupt(clean, there)
            painted = view.squeeze(1).clone()
            tokens = torch.randn(batch, (side[0] // 16) ** 3, network.hidden_size, device=bench.device)

            def forward(x: Tensor = view) -> Tensor:
                with autocast(bench.device, made.dtype):
                    restored: Tensor = network(x)[0]
                return (restored.float() - clean).abs().mean()

            def embed() -> None:
                with autocast(bench.device, made.dtype):
                    y = network.patch_embedding(view)
                y.float().mean().backward()

            def decode() -> None:
                grid = [length // 16 for length in side]
                x = tokens.transpose(1, 2).reshape(batch, -1, *grid).detach().requires_grad_()
                with autocast(bench.device, made.dtype):
                    y = network.conv3d_transpose_1(network.conv3d_transpose(x))
                y.float().mean().backward()

            def block() -> None:
                with autocast(bench.device, made.dtype):
                    y = network.blocks[0](tokens.detach().requires_grad_())
                y.float().mean().backward()

            def optimize() -> None:
                for parameter in made.network.parameters():
                    parameter.grad = grads.get(parameter)
                take_step(made.optimizer, made.config.optimizer, 1e-4)

            forward().backward()
            grads = {p: p.grad for p in made.network.parameters() if p.grad is not None}
            pieces: dict[str, Callable[[], Any]] = {
                "upload pinned": lambda: torch.from_numpy(array).to(bench.device, non_blocking=True),
                "scale": lambda: scale(stored, 221),
                "draw (host)": lambda: draw(config, side, 0, indices),
                "upload draws": lambda: to_device(drawn.table, bench.device),
                "paint, torch": lambda: corruption._paint_masks(clean.squeeze(1), there),
                "shuffle": lambda: corruption._shuffle_(painted, there),
                "forward": forward,
                "forward + backward": lambda: forward().backward(),
                "embedding f+b": embed,
                "one block f+b": block,
                "decoder f+b": decode,
                "optimizer": optimize,
            }
            if bench.device.type == "cuda" and (fused := corruption.fused_paint()):
                pieces["paint, kernel"] = lambda: fused(
                    clean.squeeze(1), there.key, there.outpaint, there.start, there.stop
                )
            builds: dict[str, Callable[[], Callable[[], Any]]] = {
                name: partial(lambda it: it, p) for name, p in pieces.items()
            }
            bench.compare(f"breakdown_{batch}", builds, 1)

        bench.attempt("breakdown", str(batch), call=run)


def profile(bench: Bench) -> None:
    """Time by kernel, of three steps."""
    parts: dict[str, Any] = {"compile": True}
    for kind, batch, options in (
        ((("graph", 2, {}),)) if bench.quick else (("compiled", 64, parts), ("graph", 64, {}), ("compiled", 8, parts))
    ):
        call = warm(stepper(bench, learner(bench, batch, **options), batch), bench)
        bench.kernels(f"{kind}_{batch}", call)


def variants(bench: Bench) -> None:
    """Each choice against the graph of the plain step, in turns, without compiling."""
    for batch in (2,) if bench.quick else (64, 8):

        def make(
            change: Callable[[PretrainingLearner], Any] | None = None, batch: int = batch, **options: Any
        ) -> Callable[[], Callable[[], Any]]:
            def build() -> Callable[[], Any]:
                made = learner(bench, batch, **options)
                if change:
                    change(made)
                return stepper(bench, made, batch)

            return build

        def convolutions(made: PretrainingLearner) -> None:
            for module in made.network.modules():
                if isinstance(module, nn.Conv3d | nn.ConvTranspose3d):
                    module.__class__ = nn.Conv3d if isinstance(module, nn.Conv3d) else nn.ConvTranspose3d

        def attention(made: PretrainingLearner) -> None:
            for block in made.network.modules():
                if isinstance(block, SABlock):
                    block.__class__ = SABlock

        kinds: dict[str, Callable[[], Callable[[], Any]]] = {
            "ours": make(),
            "eager": make(eager),
            "plain, eager": make(plain),
            "attention's own indexing": make(attention),
            "two views": make(task={"contrastive": {"enabled": True}}),
            "masked": make(task="masked"),
        }
        if bench.device.type == "cuda":
            kinds["convolutions"] = make(convolutions)
            kinds["flash attention"] = backend(make())
        bench.compare(f"variants_{batch}", kinds, turns=2)


def compiled(bench: Bench) -> None:
    """`torch.compile` of the parts (what `pretrain.compile` does) and of the whole network at once."""
    for batch in (2,) if bench.quick else (64,):

        def whole(batch: int = batch, **options: Any) -> Callable[[], Any]:
            made = learner(bench, batch)
            made.model.compile(dynamic=False, **options)
            return stepper(bench, made, batch)

        kinds: dict[str, Callable[[], Callable[[], Any]]] = {
            "none": lambda batch=batch: stepper(bench, learner(bench, batch), batch),  # type: ignore[misc]
            "parts": lambda batch=batch: stepper(bench, learner(bench, batch, compile=True), batch),  # type: ignore[misc]
        }
        if not bench.quick:
            kinds["whole network"] = whole
        bench.compare(f"compile_{batch}", kinds, turns=2)
        torch.compiler.reset()


def ddp(bench: Bench) -> None:
    """One rank of DDP: what its hooks and buckets cost, with gradients copied and as views."""
    with tempfile.NamedTemporaryFile() as file:
        backend = "nccl" if bench.device.type == "cuda" else "gloo"
        torch.distributed.init_process_group(backend, init_method=f"file://{file.name}_ddp", rank=0, world_size=1)
        batch = 2 if bench.quick else 8

        def build(view: bool | None) -> Callable[[], Any]:
            made = learner(bench, batch)
            made.graphs = False  # as with workers
            if view is not None:
                devices = [bench.device.index or 0] if bench.device.type == "cuda" else None
                made.model = nn.parallel.DistributedDataParallel(
                    made.task, device_ids=devices, gradient_as_bucket_view=view
                )
            return stepper(bench, made, batch)

        kinds = {"no DDP": None, "DDP": False, "DDP, bucket views": True}
        bench.compare("ddp", {name: (lambda view=view: build(view)) for name, view in kinds.items()})  # type: ignore[misc]
        torch.distributed.destroy_process_group()


def backend(build: Callable[[], Callable[[], Any]]) -> Callable[[], Callable[[], Any]]:
    """The same with flash attention where torch prefers cuDNN's."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    def built() -> Callable[[], Any]:
        call = build()

        def wrapped() -> None:
            with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
                call()

        return wrapped

    return built
