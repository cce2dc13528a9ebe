"""Small models that were never trained, as files."""

from pathlib import Path
from typing import Any

import torch
from shaking import shaken
from studies import small_study

from ssl_ray.config.schema import Preparation
from ssl_ray.networks.model_file import MODEL_FILE, Inference, Metadata, model_content, versions
from ssl_ray.networks.registry import build_segmentation
from ssl_ray.predict.model import Model, read_model

NETWORK = small_study().network
PATCH = (16, 16, 16)
PREPARATION = Preparation(spacing=(2.7, 2.3, 3.1), hu_window=(-175, 250))
ORGANS = ("spleen", "left kidney", "right kidney")


def metadata(**changes: Any) -> Metadata:
    facts: dict[str, Any] = {
        "network": NETWORK,
        "patch_size": PATCH,
        "preparation": PREPARATION,
        "preparation_version": 5,
        "organs": ORGANS,
        "flip_axes": (0, 1, 2),
        "inference": Inference(overlap=0.25, batch=4, precision="float32"),
        "surface_tolerance": 2.0,
        "versions": versions(),
        "lineage": {"study": "tiny", "cell": "n02-random", "seed": 0, "step": 4, "fold": None},
        "scores": {"test": {"dice_foreground": 0.1 + 0.2}},
    }
    return Metadata(**(facts | changes))


def write_model(folder: Path, seed: int = 0, **changes: Any) -> Model:
    """A model whose labels are a mixture of all classes, in its folder."""
    told = metadata(**changes)
    torch.manual_seed(seed)
    network = build_segmentation(told.network, told.patch_size, told.preparation.channels, told.classes)
    shaken(network, 0.1)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / MODEL_FILE).write_bytes(model_content(network.state_dict(), told))
    return read_model(str(folder))
