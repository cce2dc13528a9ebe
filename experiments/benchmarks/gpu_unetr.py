"""The fine-tuning step of the reference recipe (UNETR, 4 patches of 96³, 14 classes) and inference of a volume."""

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from gpu_bench import Bench
from gpu_pretrain import study
from monai.networks.blocks.selfattention import SABlock

from ssl_ray.finetune.learner import SegmentationLearner
from ssl_ray.networks.faster import use_patch_products

Build = Callable[[], Callable[[], Any]]


def unetr(bench: Bench) -> None:
    """Step and inference, each choice in turns against the step that a trial takes."""
    cuda = bench.device.type == "cuda"
    base = study(bench, Path(tempfile.gettempdir()), 8)
    recipe = base.finetune.model_copy(update={"patches_per_volume": 2 if bench.quick else 4})
    images = torch.rand(recipe.patches_per_volume, 1, *recipe.patch_size, device=bench.device)
    labels = torch.randint(recipe.cohort.classes, images.shape, device=bench.device, dtype=torch.uint8)

    def learner(**finetune: Any) -> SegmentationLearner:
        changed = base.model_copy(update={"finetune": recipe.model_copy(update=finetune)})
        return SegmentationLearner(changed.finetune, changed.network, bench.device, seed=0)

    def step(change: Callable[[SegmentationLearner], Any] = lambda made: None, **finetune: Any) -> Build:
        def build() -> Callable[[], Any]:
            made = learner(**finetune)
            change(made)
            return lambda: made.step(images, labels, 1e-4)

        return build

    def graphed(made: SegmentationLearner) -> None:
        made.objective = torch.cuda.make_graphed_callables(made.objective, (images, labels))

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
        kinds["CUDA graphs"] = step(graphed)
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


def contiguous(made: SegmentationLearner) -> None:
    """The network as it is built."""
    made.network.to(memory_format=torch.contiguous_format)


def plain_attention(made: SegmentationLearner) -> None:
    """Two matrix products, as on a CPU."""
    for block in made.network.modules():
        if isinstance(block, SABlock):
            block.__class__, block.use_flash_attention = SABlock, False
