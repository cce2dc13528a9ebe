"""SampleTable -> Ray Data -> batches of a rank.

One *block* of a Ray dataset is the batches of one rank over a few consecutive steps, read by one task. Every rank has
a dataset, and so a scheduling loop, of its own: one loop handles some tens of blocks a second, whatever is in them,
which is what one or two fast GPUs consume. As the cost is per block, blocks are sized by bytes, and a long run is
streamed in *segments* of some hundred blocks; the next one is opened while the current one is consumed.
"""

import queue
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any

import numpy as np
import numpy.typing as npt

from ssl_ray.data.patch import open_array, read_patch
from ssl_ray.data.store import Store
from ssl_ray.pretrain.samples import Sample, SampleTable

SEGMENT_BLOCKS = 256
"""Number of blocks in a segment of one rank: start-up costs 2 to 3 ms a block, measured."""


@dataclass(frozen=True)
class Feed:
    """What a data task needs to read any sample: the table, and where its volumes lie, in the table's order.

    `keys` name the volumes in the store, `ids` name them in messages. Voxels are stored as `dtype`, what the network
    sees as 1 as `levels`.
    """

    table: SampleTable
    store: Store
    keys: tuple[str, ...]
    ids: tuple[str, ...]
    dtype: str
    levels: int

    def read(self, samples: Sequence[Sample]) -> npt.NDArray[Any]:
        """Patches as stored: (N, X, Y, Z), or (N, C, X, Y, Z) of several channels."""
        volumes = [open_array(self.store, self.keys[sample.volume]) for sample in samples]
        out = np.empty((len(samples), *volumes[0].shape[:-3], *self.table.patch_size), dtype=self.dtype)
        for row, (volume, sample) in enumerate(zip(volumes, samples, strict=True)):
            read_patch(volume, sample.origin, self.table.patch_size, out=out[row])
        return out

    def place(self, index: int) -> dict[str, Any]:
        """Where sample `index` of the table is from: its volume's name and key, and its origin in voxels."""
        sample = self.table.sample(index)
        volume = sample.volume
        return {"sample": index, "volume": self.ids[volume], "key": self.keys[volume], "origin": sample.origin}


@dataclass(frozen=True)
class Batch:
    """`images` (B, X, Y, Z) as stored, `indices` (B,) of its samples, and the seconds spent waiting for them."""

    step: int
    images: npt.NDArray[Any]
    indices: npt.NDArray[np.int64]
    waited: float


def segments(table: SampleTable, start: int, world: int, block_bytes: float, itemsize: int) -> list[range]:
    """The segments of a run from step `start` on: each a range of steps, from one block's first to the next one's."""
    batch_bytes = len(table.rank_samples(0, 0, world)) * int(np.prod(table.patch_size)) * itemsize
    block_steps = max(1, int(block_bytes // batch_bytes))
    length = SEGMENT_BLOCKS * block_steps
    return [range(first, min(first + length, table.steps), block_steps) for first in range(start, table.steps, length)]


def blocks_of(table: SampleTable, segment: range, rank: int, world: int) -> list[list[int]]:
    """Sample indices of each block of a rank, in the order in which it consumes them."""
    steps = [range(first, min(first + segment.step, segment.stop)) for first in segment]
    return [[index for step in block for index in table.rank_samples(step, rank, world)] for block in steps]


def open_segment(table: SampleTable, feed: Any, segment: range, rank: int, world: int, held: float) -> Any:
    """The Ray Data iterator of one rank; `feed` refers to a `Feed` in the object store.

    `held` is the number of CPUs that training workers hold. A rank reads by as many tasks as it has a share of the
    others, by two where it has none. They ask for no CPU: where a node is lost, another job comes, or every node has
    half a CPU left, they would wait for ever; and of a node with fewer CPUs left than there are datasets Ray Data gives
    each none, and then reads nothing ahead.
    """
    import pyarrow as pa
    import ray  # the tasks import this module only to read patches
    from ray.data import DataContext, ExecutionResources, TaskPoolStrategy

    resources = ray.cluster_resources()
    context = DataContext.get_current().copy()
    context.enable_progress_bars = False
    context.custom_execution_callback_classes = [Pace]
    context.target_max_block_size = None  # a block that Ray Data cut in two would not be in the order of the table
    context.execution_options.preserve_order = True
    # Each of the datasets would take half of the whole object store for its own.
    store = resources.get("object_store_memory", 0.0) / 2 / world
    context.execution_options.resource_limits = ExecutionResources.for_limits(object_store_memory=store)
    with DataContext.current(context):
        # Not `ray.data.range`, whose own tasks cannot be told to ask for no CPU.
        blocks = [pa.table({"index": indices}) for indices in blocks_of(table, segment, rank, world)]
        dataset = ray.data.from_blocks(blocks)
        share = int(max(0.0, resources.get("CPU", 0.0) - held) // world)
        pool = TaskPoolStrategy(size=min(len(blocks), share or 2))
        read = partial(_read_block, feed=feed)
        dataset = dataset.map_batches(read, batch_size=None, num_cpus=0, compute=pool)
        return dataset.streaming_split(1)[0]  # unlike `dataset.iterator()`, with its loop outside of this process


class Pace:
    """An execution callback that gives Ray Data's scheduling loop a pause of 10 ms.

    The loop waits for tasks only while one is unfinished. As soon as all blocks that fit are read, which is how it
    should be when training is the bottleneck, it spins and takes up to a whole core from the training.
    """

    def on_execution_step(self, executor: Any) -> None:
        """Called at each turn of the loop."""
        time.sleep(0.01)

    def _nothing(self, *_: Any) -> None:
        pass

    before_execution_starts = after_execution_succeeds = after_execution_fails = _nothing


def batches(
    table: SampleTable, feed: Any, schedule: Sequence[range], rank: int, world: int, held: float
) -> Iterator[Batch]:
    """Batches of one rank, step by step; all ranks must take equally many. `feed` and `held` are as for `open_segment`.

    The first segment is opened and read at once, before anybody asks for a batch. A RuntimeError says that Ray Data did
    not keep the order of blocks, or lost some.
    """
    size = len(table.rank_samples(0, rank, world))
    reading = (_read_ahead(open_segment(table, feed, segment, rank, world, held), size) for segment in schedule)
    return _in_order(table, schedule, rank, world, next(reading, None), reading)


def _in_order(
    table: SampleTable, schedule: Sequence[range], rank: int, world: int, following: Any, reading: Iterator[Any]
) -> Iterator[Batch]:
    """Batches of the segments, of which `following` is opened and `reading` opens the others."""
    for segment in schedule:
        waiting, following = following, None
        for step in range(segment.start, segment.stop):
            if step == (segment.start + segment.stop) // 2:
                following = next(reading, None)  # opens it
            asked = time.perf_counter()
            item = waiting.get()
            waited = time.perf_counter() - asked
            if isinstance(item, BaseException):
                raise item
            if item["index"].tolist() != list(table.rank_samples(step, rank, world)):
                raise RuntimeError(f"rank {rank}, step {step}: Ray Data did not keep the order of blocks")
            yield Batch(step, item["image"], item["index"], waited)


def _read_ahead(iterator: Any, size: int) -> "queue.Queue[Any]":
    """Batches of `size` patches, or an error, from a thread that is two of them ahead of the training step."""
    waiting: queue.Queue[Any] = queue.Queue(2)

    def drain() -> None:
        try:
            for batch in iterator.iter_batches(batch_size=size, batch_format="numpy", prefetch_batches=1):
                waiting.put(batch | {"image": pin(batch["image"])})
            waiting.put(RuntimeError("the stream of a segment ended early"))
        except Exception as error:  # the training thread raises it where it asks for the next batch
            waiting.put(error)

    threading.Thread(target=drain, daemon=True).start()
    return waiting


def pin(array: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """A copy in page-locked memory where this process trains on a GPU, which then fetches it without being waited for.

    Torch keeps such memory for reuse once nothing refers to it: a new allocation costs more than the copy.
    """
    import torch  # the tasks do without

    if not torch.cuda.is_initialized():
        return array
    pinned: npt.NDArray[Any] = torch.from_numpy(array).pin_memory().numpy()
    return pinned


def _read_block(rows: dict[str, npt.NDArray[np.int64]], feed: Any) -> dict[str, npt.NDArray[Any]]:
    source = _feed(feed)
    return rows | {"image": source.read([source.table.sample(int(index)) for index in rows["index"]])}


@lru_cache(maxsize=2)
def _feed(reference: Any) -> Feed:
    """Once a process: with 100,000 volumes it takes as long as reading thirty patches."""
    import ray  # the tasks already have it

    feed: Feed = ray.get(reference)
    return feed
