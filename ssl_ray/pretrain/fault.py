"""What a pretraining keeps of a step whose loss or gradient is not finite."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ssl_ray.pretrain.stream import Batch, Feed
from ssl_ray.training import nonfinite
from ssl_ray.training.nonfinite import Fault


def keep(
    fault: Fault[Batch], feed: Feed, rank: int, folder: Path, model: dict[str, Tensor], facts: dict[str, Any]
) -> str:
    """Write what reproduces a fault: patches and weights as safetensors, and where they come from as JSON.

    Args:
        fault: the step; `fault.what.images` (B, X, Y, Z) are the rank's patches before corruption.
        feed: names the volumes.
        rank: whose share of the batch this is.
        folder: gets `step_<n>_rank_<r>.safetensors` and `.json`, for the first three faults.
        model: weights before the step (on a GPU possibly those after the next).
        facts: seed, learning rate and what else the step depends on.

    Returns:
        One line that names step, rank, samples and file.
    """
    batch = fault.what
    samples = [feed.table.sample(int(index)) for index in batch.indices]
    names = sorted({feed.ids[sample.volume] for sample in samples})
    text = (
        f"step {batch.step + 1}, rank {rank}: loss {fault.loss:g}, gradient norm {fault.norm:g}; samples "
        f"{', '.join(str(index) for index in batch.indices.tolist())} of volumes {', '.join(names)}"
    )
    tree = {"step": batch.step + 1, "rank": rank, "loss": str(fault.loss), "gradient_norm": str(fault.norm)}
    places = [
        {
            "sample": int(index),
            "volume": feed.ids[sample.volume],
            "key": feed.keys[sample.volume],
            "origin": sample.origin,
        }
        for index, sample in zip(batch.indices, samples, strict=True)
    ]
    # Copies: the batch lies in Ray's object store, read-only.
    tensors = {"images": torch.from_numpy(batch.images.copy()), "indices": torch.from_numpy(batch.indices.copy())}
    tensors |= {f"model.{name}": value for name, value in model.items()}
    path = folder / f"step_{batch.step + 1:07d}_rank_{rank}.safetensors"
    kept = nonfinite.keep(path, f"step_*_rank_{rank}.json", tensors, tree | facts | {"samples": places})
    return f"{text}; kept in {path}" if kept else text
