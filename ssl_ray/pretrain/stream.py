"""Plan -> Ray Data -> batches of a rank.

One row of the Ray dataset is one *block*: the batches of one rank over a few consecutive steps, read by one task.
Block *j* belongs to rank `j mod world`, which is how `streaming_split(equal=True)` deals out equal blocks in order.
Ray Data's cost is per block (its scheduling loop handles some tens a second), so blocks are sized by bytes, and a long
run is streamed in *windows* of some hundred blocks; the next one is opened while the current one is being consumed.
"""

import queue
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any

import numpy as np
import numpy.typing as npt

from ssl_ray.cohort.store import Store, open_array, read_patch
from ssl_ray.pretrain.plan import Plan, Sample

WINDOW_BLOCKS = 256
"""Blocks a window over all ranks: start-up costs 2 to 3 ms a block, measured."""

_DEPTH = 2
"""Batches that wait in front of the training step, beyond the block that Ray Data has already fetched."""


@dataclass(frozen=True)
class Feed:
    """What a data task needs to read any sample: the plan, and where its volumes lie."""

    plan: Plan
    store: Store
    keys: tuple[str, ...]
    ids: tuple[str, ...]
    dtype: str
    levels: int

    def read(self, samples: Sequence[Sample]) -> npt.NDArray[Any]:
        """Patches (N, X, Y, Z) as stored."""
        out = np.empty((len(samples), *self.plan.patch_size), dtype=self.dtype)
        for row, sample in enumerate(samples):
            read_patch(
                open_array(self.store, self.keys[sample.volume]), sample.origin, self.plan.patch_size, out=out[row]
            )
        return out


@dataclass(frozen=True)
class Window:
    """Steps `[start, stop)` in blocks of `block_steps` steps for each of `world` ranks."""

    start: int
    stop: int
    block_steps: int
    world: int

    @property
    def blocks(self) -> int:
        """Number of blocks, a multiple of the number of ranks."""
        return -(-(self.stop - self.start) // self.block_steps) * self.world

    def share(self, plan: Plan) -> int:
        """Rows that a block has for each step: the largest share of a batch."""
        return len(plan.rank_samples(self.start, 0, self.world))

    def samples(self, plan: Plan, block: int) -> list[int]:
        """Sample indices of a block, in the order in which its rank consumes them.

        A rank with a smaller share than others gets -1 in its place: `streaming_split` makes the *rows* of all ranks
        equal, not the blocks.
        """
        group, rank = divmod(block, self.world)
        first = self.start + group * self.block_steps
        steps = range(first, min(first + self.block_steps, self.stop))
        shares = [list(plan.rank_samples(step, rank, self.world)) for step in steps]
        return [index for share in shares for index in share + [-1] * (self.share(plan) - len(share))]


@dataclass(frozen=True)
class Batch:
    """`images` (B, X, Y, Z) as stored, `indices` (B,) of its samples, and the seconds spent waiting for them."""

    step: int
    images: npt.NDArray[Any]
    indices: npt.NDArray[np.int64]
    waited: float


def windows(plan: Plan, start: int, world: int, block_bytes: float, itemsize: int) -> list[Window]:
    """The windows of a run from step `start` on."""
    batch_bytes = len(plan.rank_samples(0, 0, world)) * int(np.prod(plan.patch_size)) * itemsize
    block_steps = max(1, int(block_bytes // batch_bytes))
    length = max(1, WINDOW_BLOCKS // world) * block_steps
    return [
        Window(first, min(first + length, plan.steps), block_steps, world) for first in range(start, plan.steps, length)
    ]


def open_window(feed: Any, plan: Plan, window: Window, held: float) -> list[Any]:
    """One Ray Data iterator a rank.

    Args:
        feed: reference to a `Feed` in the object store.
        plan: of the run.
        window: the steps to stream.
        held: CPUs that the training workers hold. Where they leave none, e.g. after a node was lost, the reading tasks
            ask for none and run beside them: they would wait for ever.
    """
    import pyarrow as pa
    import ray  # the tasks import this module only to read patches
    from ray.data import DataContext, TaskPoolStrategy

    context = DataContext.get_current().copy()
    context.enable_progress_bars = False
    context.custom_execution_callback_classes = [Pace]
    context.target_max_block_size = None  # a block that Ray Data cut in two would shift all later ones to other ranks
    context.execution_options.preserve_order = True
    with DataContext.current(context):
        # Not `ray.data.range`, whose own tasks cannot be told to ask for no CPU.
        dataset = ray.data.from_blocks([pa.table({"id": [block]}) for block in range(window.blocks)])
        spare = ray.cluster_resources().get("CPU", 0.0) - held >= 1
        how = (
            {"num_cpus": 1}
            if spare
            else {"num_cpus": 0, "compute": TaskPoolStrategy(size=min(window.blocks, 2 * window.world))}
        )
        dataset = dataset.map_batches(partial(_read_block, feed=feed, window=window), batch_size=None, **how)
        iterators: list[Any] = dataset.streaming_split(window.world, equal=True)
        return iterators


class Pace:
    """An execution callback that gives Ray Data's scheduling loop a pause of 10 ms.

    The loop waits for tasks only while one is unfinished. As soon as all blocks that fit are read, which is how it
    should be when training is the bottleneck, it spins and takes up to a whole core from the training.
    """

    def on_execution_step(self, executor: Any) -> None:
        """Called at each turn of the loop."""
        time.sleep(0.01)

    def before_execution_starts(self, executor: Any) -> None:
        """Nothing."""

    def after_execution_succeeds(self, executor: Any) -> None:
        """Nothing."""

    def after_execution_fails(self, executor: Any, error: Exception) -> None:
        """Nothing."""


class Stream:
    """Batches of one rank from a step on; iterate it step by step on all ranks alike."""

    def __init__(
        self, plan: Plan, rank: int, schedule: Sequence[Window], opener: Callable[[Window], Sequence[Any]]
    ) -> None:
        """Args:
        plan: of the run.
        rank: whose batches.
        schedule: windows to stream, in order.
        opener: gives the iterators of all ranks for a window; called on every rank at the same step.
        """
        self._plan, self._rank, self._schedule, self._open = plan, rank, list(schedule), opener
        self._step = schedule[0].start if schedule else plan.steps
        self._current = self._start_next()
        self._next: _Reader | None = None

    def __iter__(self) -> "Stream":
        return self

    def __next__(self) -> Batch:
        if self._current is None:
            raise StopIteration
        window = self._current.window
        if self._next is None and self._schedule and self._step >= (window.start + window.stop) // 2:
            self._next = self._start_next()
        images, indices, waited = self._current.get()
        share = self._plan.rank_samples(self._step, self._rank, window.world)
        images, indices = images[: len(share)], indices[: len(share)]
        if indices.tolist() != list(share):
            raise RuntimeError(
                f"rank {self._rank} got samples {indices[0]}..{indices[-1]} at step {self._step}, the plan has "
                f"{share[0]}..{share[-1]}: Ray Data did not keep the order of blocks"
            )
        batch = Batch(self._step, images, indices, waited)
        self._step += 1
        if self._step == window.stop:
            self._current, self._next = self._next or self._start_next(), None
        return batch

    def _start_next(self) -> "_Reader | None":
        if not self._schedule:
            return None
        window = self._schedule.pop(0)
        return _Reader(window, self._open(window)[self._rank], window.share(self._plan))


class _Reader:
    """Drains one window's iterator in a thread, a few batches ahead of the training step."""

    def __init__(self, window: Window, iterator: Any, batch_size: int) -> None:
        self.window = window
        self._queue: queue.Queue[Any] = queue.Queue(_DEPTH)
        threading.Thread(target=self._drain, args=(iterator, batch_size), daemon=True).start()

    def get(self) -> tuple[npt.NDArray[Any], npt.NDArray[np.int64], float]:
        start = time.perf_counter()
        item = self._queue.get()
        if isinstance(item, BaseException):
            raise item
        return item["image"], item["index"], time.perf_counter() - start

    def _drain(self, iterator: Any, batch_size: int) -> None:
        try:
            for batch in iterator.iter_batches(batch_size=batch_size, batch_format="numpy", prefetch_batches=1):
                self._queue.put(batch | {"image": _pin(batch["image"])})
            self._queue.put(RuntimeError(f"the stream of steps {self.window.start} to {self.window.stop} ended early"))
        except Exception as error:  # the training thread raises it where it asks for the next batch
            self._queue.put(error)


def _pin(array: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """A copy in page-locked memory where this process trains on a GPU, which then fetches it without being waited for.

    Torch keeps such memory for reuse once nothing refers to it: getting it anew costs more than the copy.
    """
    import torch  # the tasks do without

    if not torch.cuda.is_initialized():
        return array
    source = torch.from_numpy(array)
    pinned: npt.NDArray[Any] = torch.empty_like(source, pin_memory=True).copy_(source).numpy()
    return pinned


def _read_block(rows: dict[str, npt.NDArray[Any]], feed: Any, window: Window) -> dict[str, npt.NDArray[Any]]:
    source = _feed(feed)
    indices = [index for block in rows["id"] for index in window.samples(source.plan, int(block))]
    return {
        "image": source.read([source.plan.sample(max(0, index)) for index in indices]),
        "index": np.array(indices, dtype=np.int64),
    }


@lru_cache(maxsize=2)
def _feed(reference: Any) -> Feed:
    """Once a process: with 100,000 volumes it takes as long as reading thirty patches."""
    import ray  # the tasks already have it

    feed: Feed = ray.get(reference)
    return feed
