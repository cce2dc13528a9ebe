"""Ray Data hands every rank exactly the batches of the table."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from ssl_ray.data.patch import read_patch
from ssl_ray.data.store import Store
from ssl_ray.pretrain import stream as streaming
from ssl_ray.pretrain.samples import SampleTable
from ssl_ray.pretrain.stream import Batch, Feed, Segment, batches, segments


@pytest.fixture
def feed(tmp_path: Path) -> Feed:
    """Three stored volumes of known content; the second is shorter than the patch."""
    random = np.random.default_rng(0)
    shapes = [(24, 20, 22), (12, 30, 18), (20, 16, 40)]
    store = Store(tmp_path)
    for key, shape in zip(("aa1", "bb2", "cc3"), shapes, strict=True):
        store.path(key).mkdir(parents=True)
        np.save(store.path(key, "image.npy"), random.integers(0, 256, shape, dtype=np.uint8))
    table = SampleTable(7, np.array(shapes), (16, 16, 16), 2, 4, 10)
    return Feed(table, Store(tmp_path), ("aa1", "bb2", "cc3"), ("a", "b", "c"), "uint8", 255)


def streams(
    feed: Feed, world: int, start: int = 0, block_bytes: float = 3 * 4 * 16**3, held: float = 0.0
) -> tuple[list[Iterator[Batch]], list[Segment]]:
    import ray

    reference = ray.put(feed)
    schedule = segments(feed.table, start, world, block_bytes, 1)
    return [batches(feed.table, reference, schedule, rank, held) for rank in range(world)], schedule


@pytest.mark.parametrize(("world", "held"), [(1, 0), (2, 0), (3, 2)])
def test_every_rank_gets_its_samples_of_the_table(
    ray_cluster: None, feed: Feed, world: int, held: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Over several segments the batches are those of the table, patch by patch, and end with the table.

    Three ranks share a batch of four unevenly; where training holds all CPUs, the patches are read all the same.
    """
    monkeypatch.setattr(streaming, "SEGMENT_BLOCKS", 2)
    ranks, schedule = streams(feed, world, held=held)
    assert len(schedule) > 1
    for step in range(feed.table.steps):
        for rank, stream in enumerate(ranks):
            batch = next(stream)
            assert batch.step == step
            assert batch.indices.tolist() == list(feed.table.rank_samples(step, rank, world))
            for index, image in zip(batch.indices, batch.images, strict=True):
                sample = feed.table.sample(int(index))
                volume = np.load(feed.store.path(feed.keys[sample.volume], "image.npy"))
                np.testing.assert_array_equal(image, read_patch(volume, sample.origin, (16, 16, 16)))
    for stream in ranks:
        with pytest.raises(StopIteration):
            next(stream)


def test_a_stream_from_the_middle_goes_on_where_another_stopped(ray_cluster: None, feed: Feed) -> None:
    """Resuming at a step gives the batches that an undisturbed stream gives from there on."""
    (whole,), _ = streams(feed, 1)
    (rest,), _ = streams(feed, 1, start=6)
    everything = {batch.step: batch for batch in whole}
    resumed = {batch.step: batch for batch in rest}
    assert sorted(resumed) == list(range(6, feed.table.steps))
    for step, batch in resumed.items():
        np.testing.assert_array_equal(batch.images, everything[step].images)
        np.testing.assert_array_equal(batch.indices, everything[step].indices)


def test_blocks_are_not_cut_in_two(ray_cluster: None, feed: Feed, monkeypatch: pytest.MonkeyPatch) -> None:
    """However small Ray Data would like its blocks, every block stays whole and so with its rank."""
    from ray.data import DataContext

    monkeypatch.setattr(DataContext.get_current(), "target_max_block_size", 4 * 16**3)
    ranks, _ = streams(feed, 2)
    for step in range(feed.table.steps):
        for rank, stream in enumerate(ranks):
            assert next(stream).indices.tolist() == list(feed.table.rank_samples(step, rank, 2))


def test_a_failing_read_reaches_the_training_thread(ray_cluster: None, feed: Feed) -> None:
    """A volume that vanished from the store stops the step that needs it, with its name."""
    feed.store.path("cc3", "image.npy").unlink()
    (stream,), _ = streams(feed, 1)
    with pytest.raises(Exception, match="cc3"):
        for _ in stream:
            pass


def test_a_finished_table_gives_nothing(feed: Feed) -> None:
    """A run that resumes after its last step trains no further."""
    assert list(batches(feed.table, None, [], 0, 0)) == []
