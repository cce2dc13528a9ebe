"""The fine-tuning step of the reference recipe (UNETR, 4 patches of 96³, 14 classes) and inference of a volume."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from gpu_pretrain import TINY, VIT_B
from monai.losses import DiceCELoss

from ssl_ray.config import Network, Optimizer
from ssl_ray.finetune.metrics import predict
from ssl_ray.networks import build_unetr, use_fast_attention, use_patch_products
from ssl_ray.optimize import build_optimizer, take_step
from ssl_ray.precision import autocast, resolve

if TYPE_CHECKING:
    from gpu import Bench


def unetr(bench: "Bench") -> None:
    """Step and inference, each choice in turns."""
    side, count = (32, 2) if bench.quick else (96, 4)
    size, cuda = (side,) * 3, bench.device.type == "cuda"
    network = Network(**(TINY | {"feature_size": 4} if bench.quick else VIT_B))
    best = resolve("auto", bench.device)
    images = torch.rand(count, 1, *size, device=bench.device)
    labels = torch.randint(14, (count, 1, *size), device=bench.device)
    config = Optimizer(name="adamw", weight_decay=1e-5)

    def model(last: bool, fast: bool, products: bool, compiled: dict[str, Any] | None) -> torch.nn.Module:
        torch.manual_seed(0)
        made = build_unetr(network, size, 14)
        made.to(bench.device, memory_format=torch.channels_last_3d if last else torch.contiguous_format)
        if fast:
            use_fast_attention(made)
        if products:
            use_patch_products(made)
        if compiled is not None:
            made.compile(dynamic=False, **compiled)
        return made

    def step(
        dtype: torch.dtype = best,
        last: bool = True,
        fast: bool = True,
        products: bool = False,
        compiled: dict[str, Any] | None = None,
        loss_compiled: bool = False,
    ) -> Callable[[], Callable[[], Any]]:
        def build() -> Callable[[], Any]:
            made = model(last, fast, products, compiled)
            optimizer = build_optimizer(config, made.parameters())
            dice: Any = DiceCELoss(to_onehot_y=True, softmax=True)
            if loss_compiled:
                dice = torch.compile(dice, dynamic=False)

            def call() -> None:
                with autocast(bench.device, dtype):
                    logits = made(images)
                dice(logits.float(), labels).backward()
                take_step(optimizer, config, 1e-4)

            return call

        return build

    kinds: dict[str, Callable[[], Callable[[], Any]]] = {
        "as it was": step(fast=False),
        "flash attention": step(),
        "not channels_last": step(last=False),
        "products": step(products=True),
        "products, not ch.last": step(products=True, last=False),
        "float32": step(torch.float32),
    }
    bench.compare("unetr_step", kinds, turns=2)
    if cuda:
        for name, last in (("channels_last", True), ("contiguous", False)):

            def peak(name: str = name, last: bool = last) -> None:
                call = step(last=last)()
                torch.cuda.reset_peak_memory_stats()
                call()
                bench.put("unetr_peak_gb", name, value=torch.cuda.max_memory_allocated() / 1e9)

            bench.attempt("unetr", "peak", name, call=peak)

    shape = (48, 40, 40) if bench.quick else (240, 200, 200)
    volume = torch.rand(shape, device=bench.device)

    def infer(
        windows: int, last: bool = True, compiled: dict[str, Any] | None = None
    ) -> Callable[[], Callable[[], Any]]:
        def build() -> Callable[[], Any]:
            made = model(last, True, False, compiled)
            options: dict[str, Any] = {"window_batch": windows, "overlap": 0.25}
            options["autocast"] = None if best == torch.float32 else best

            @torch.no_grad()
            def call() -> None:
                predict(made, volume, size, 14, **options)

            return call

        return build

    bench.compare(
        "unetr_inference",
        {"4 windows": infer(4), "1 window": infer(1), "16 windows": infer(16), "4, not ch.last": infer(4, False)},
    )
    if not bench.quick:
        kinds = {
            "flash attention": step(),
            "compiled": step(compiled={}),
            "compiled with loss": step(compiled={}, loss_compiled=True),
            "compiled, not ch.last": step(compiled={}, last=False),
        }
        bench.compare("unetr_step_compiled", kinds, turns=2)
