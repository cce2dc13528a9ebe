"""Where a pretraining worker begins: the newest whole checkpoint, and the stream of batches from its step on.

It loads no MONAI, so that Ray Data's processes start and read while the worker imports that and builds its networks.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import ray
from ray import train
from ray.train.collective import broadcast_from_rank_zero

from ssl_ray.pretrain.job import Job
from ssl_ray.pretrain.stream import Batch, batches, segments
from ssl_ray.training.checkpoint import load_latest


@dataclass(frozen=True)
class Beginning:
    """`step` to go on from, 0 where there is no checkpoint; its whole state on rank 0, and what each rank must know.

    `stream` has the rank's batches from that step on.
    """

    step: int
    state: dict[str, Any]
    stream: Iterator[Batch]


def begin(job: Job) -> Beginning:
    """Find the newest whole checkpoint, which rank 0 reads for all, and open the stream there; all ranks call it."""
    context = train.get_context()
    rank, world = context.get_world_rank(), context.get_world_size()
    found = load_latest(job.checkpoints, job.key, job.mirror) if rank == 0 else None
    plain = {name: found[name] for name in ("step", "best", "row_not_finite")} if found else {"step": 0}
    # One copy of the table for all, and a reference to it, as what is broadcast must stay small.
    plain, feed = broadcast_from_rank_zero([plain, ray.put(job.training) if rank == 0 else None])
    config, table, itemsize = job.recipe.settings, job.training.table, np.dtype(job.training.dtype).itemsize
    row_bytes = config.preparation.channels * itemsize
    schedule = segments(table, plain["step"], world, config.block_megabytes * 2**20, row_bytes)
    stream = batches(table, feed, schedule, rank, world, world * config.cpus_per_worker)
    return Beginning(int(plain["step"]), found or plain, stream)
