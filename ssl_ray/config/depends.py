"""What the result of each stage depends on, and nothing else: the one place that knows.

Keys are digests of what these functions give, together with the content of the volumes, and a study that goes on is
compared by them. A key holds the setting (`precision: auto`), never what it comes to on some machine. Every field of a
section counts, a new one too, unless it is named here or in `ssl_ray.config.common`.
"""

import hashlib
import json
from collections.abc import Mapping
from typing import Any, Literal

from ssl_ray.config.common import FINETUNE_HOW, PRETRAIN_HOW
from ssl_ray.config.schema import Finetune, Network, Preparation, Pretrain

Stage = Literal["pretrain", "finetune"]

VERSION: dict[Stage, int] = {"pretrain": 1, "finetune": 3}
"""Of the code that trains. Raise it where the same settings and volumes give other weights or scores
(`tests/test_versions.py` sees it); that of the preparation is in `ssl_ray.data.normalise`."""

_PRETRAIN_APART = {"sources", "pretrainings", "weights"}
_FINETUNE_APART = {"cohort", "grid", "runs", "margin", "primary", "weights"}
"""Fields whose part in a result is counted apart: volumes and weights by their content, a run by its seed and draw, a
cell by its overrides. The margin and the primary size are the report's."""


def preparation(settings: Preparation, version: int, sources: Mapping[str, str]) -> dict[str, Any]:
    """What a stored volume depends on; `sources` are the digests of its files."""
    return {"version": version, "preparation": settings.model_dump(mode="json"), **sources}


def pretraining(settings: Pretrain, network: Network) -> dict[str, Any]:
    """What the pretrained weights depend on, beside the volumes and the seed."""
    tree = settings.model_dump(mode="json", exclude=PRETRAIN_HOW | _PRETRAIN_APART)
    if settings.task.compares_patches:
        tree["workers"] = settings.worker_range[1]  # negatives are the worker's own patches
    elif "contrastive" in tree["task"]:
        tree["task"]["contrastive"] = {"enabled": False}
    del tree["epochs" if settings.steps else "steps"]
    read = network.model_dump(mode="json", exclude=set(network.segmentation_only))
    return {"pretrain": {"version": VERSION["pretrain"], **tree}, "network": read}


def finetuning(settings: Finetune, network: Network) -> dict[str, Any]:
    """What a trial with these settings depends on, beside the volumes, the seed and the weights it starts from."""
    tree = settings.model_dump(mode="json", exclude=FINETUNE_HOW | _FINETUNE_APART)
    tree |= {"version": VERSION["finetune"], "cohort": {"classes": settings.cohort.classes}}
    if settings.encoder.freeze == "all":
        del tree["encoder"]["layer_decay"]
    return {"finetune": tree, "network": network.model_dump(mode="json")}


def grid(settings: Finetune, network: Network) -> dict[str, Any]:
    """What all cells of a grid depend on: learning rates may be added, as each cell counts its own."""
    tree = finetuning(settings, network)
    del tree["finetune"]["optimizer"]["lr"]
    return tree


def digest(*parts: Any) -> str:
    """Short digest of values that JSON can hold; as a key it stands for all that a result depends on."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()[:16]
