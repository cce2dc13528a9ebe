"""Ray Data hands every rank exactly the batches of the table."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from runs import wait_for

from ssl_ray.data.patch import read_patch
from ssl_ray.data.store import Store
from ssl_ray.pretrain import stream as streaming
from ssl_ray.pretrain.samples import SampleTable
from ssl_ray.pretrain.stream import Batch, Feed, batches, segments


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
) -> tuple[list[Iterator[Batch]], list[range]]:
    import ray

    reference = ray.put(feed)
    schedule = segments(feed.table, start, world, block_bytes, 1)
    return [batches(feed.table, reference, schedule, rank, world, held) for rank in range(world)], schedule


@pytest.mark.parametrize(("world", "held"), [(2, 0), (3, 2)])
def test_every_rank_gets_its_samples_of_the_table(
    ray_cluster: None, feed: Feed, world: int, held: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Over several segments the batches are those of the table, patch by patch, and end with the table.

    However small Ray Data would like its blocks, every block stays whole and so with its rank. Three ranks share a
    batch of four unevenly; where training holds all CPUs, the patches are read all the same.
    """
    from ray.data import DataContext

    monkeypatch.setattr(streaming, "SEGMENT_BLOCKS", 2)
    monkeypatch.setattr(DataContext.get_current(), "target_max_block_size", 4 * 16**3)
    ranks, schedule = streams(feed, world, held=held)
    assert len(schedule) > 1
    for step in range(feed.table.steps):
        for rank, stream in enumerate(ranks):
            batch = next(stream)
            assert batch.step == step
            assert batch.indices.tolist() == list(feed.table.rank_samples(step, rank, world))
            for index, image in zip(batch.indices, batch.images, strict=True):
                np.testing.assert_array_equal(image, patch(feed, int(index)))
    for stream in ranks:
        with pytest.raises(StopIteration):
            next(stream)


def test_every_rank_reads_ahead_where_another_job_holds_all_cpus(
    ray_cluster: None, feed: Feed, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All blocks of a segment that fit into memory are read before anybody takes the first batch."""
    import ray

    class Job:
        def ready(self) -> None: ...

    another = ray.remote(num_cpus=2)(Job).remote()
    ray.get(another.ready.remote())
    read, marks = streaming._read_block, tmp_path / "marks"
    marks.mkdir()

    def marking(rows: dict[str, Any], feed: Any) -> dict[str, Any]:
        (marks / str(rows["index"].min())).touch()
        return read(rows, feed)

    monkeypatch.setattr(streaming, "_read_block", marking)
    try:
        ranks, schedule = streams(feed, 3, block_bytes=1)
        (segment,) = schedule
        wait_for(lambda: len(list(marks.iterdir())) == 3 * len(segment), "the blocks of three ranks", 90)
        assert all(len(list(stream)) == feed.table.steps for stream in ranks)
    finally:
        ray.kill(another)


def patch(feed: Feed, index: int) -> np.ndarray:
    """What the table says that the sample is."""
    sample = feed.table.sample(index)
    volume = np.load(feed.store.path(feed.keys[sample.volume], "image.npy"))
    return read_patch(volume, sample.origin, (16, 16, 16))


def test_a_stream_from_the_middle_goes_on_where_another_stopped(ray_cluster: None, feed: Feed) -> None:
    """Resuming at a step gives the batches of the table, which an undisturbed stream gives from there on."""
    (rest,), _ = streams(feed, 1, start=6)
    resumed = list(rest)
    assert [batch.step for batch in resumed] == list(range(6, feed.table.steps))
    for batch in resumed:
        assert batch.indices.tolist() == list(feed.table.rank_samples(batch.step, 0, 1))
        for index, image in zip(batch.indices, batch.images, strict=True):
            np.testing.assert_array_equal(image, patch(feed, int(index)))


def test_a_failing_read_reaches_the_training_thread(ray_cluster: None, feed: Feed) -> None:
    """A volume that vanished from the store stops the step that needs it, with its name."""
    feed.store.path("cc3", "image.npy").unlink()
    (stream,), _ = streams(feed, 1)
    with pytest.raises(Exception, match="cc3"):
        for _ in stream:
            pass


def test_a_finished_table_gives_nothing(feed: Feed) -> None:
    """A run that resumes after its last step trains no further."""
    assert list(batches(feed.table, None, [], 0, 1, 0)) == []
