"""The table is a pure function of (seed, index)."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ssl_ray.pretrain.samples import SampleTable
from ssl_ray.pretrain.stream import blocks_of, segments

SHAPES = np.array([[40, 50, 60], [20, 90, 33], [16, 16, 16], [70, 40, 48], [33, 34, 35]])


def table(**changes) -> SampleTable:
    values = {"seed": 3, "shapes": SHAPES, "patch_size": (32, 32, 32), "patches_per_volume": 2, "batch_size": 4}
    return SampleTable(**{**values, "epochs": 6, **changes})


def test_every_epoch_visits_every_volume_once_in_a_new_order():
    """Each epoch holds n patches of every volume, and two epochs order the volumes differently."""
    orders = []
    for epoch in range(6):
        volumes = [table().sample(index).volume for index in range(epoch * 10, (epoch + 1) * 10)]
        assert volumes[::2] == volumes[1::2], "patches of one volume stand side by side"
        assert sorted(volumes[::2]) == list(range(5))
        orders.append(tuple(volumes))
    assert len(set(orders)) > 1


@given(st.integers(0, 59), st.integers(0, 2**32))
def test_origins_lie_inside_the_padded_volume(index, seed):
    """A patch never leaves its volume, padded where the volume is shorter than the patch."""
    drawn = table(seed=seed)
    sample = drawn.sample(index)
    room = np.maximum(SHAPES[sample.volume] - 32, 0)
    assert (np.array(sample.origin) >= 0).all()
    assert (np.array(sample.origin) <= room).all()


def test_origins_are_uniform():
    """Over many epochs every origin of an axis is drawn about equally often."""
    drawn = table(shapes=np.array([[41, 32, 32]]), epochs=3000, patches_per_volume=1)
    counts = np.bincount([drawn.sample(index).origin[0] for index in range(3000)], minlength=10)
    assert counts.shape == (10,)
    assert abs(counts - 300).max() < 5 * np.sqrt(300)


def test_a_sample_depends_on_seed_and_index_alone():
    """The same sample comes out of any batch size, number of epochs and order of asking; another seed differs."""
    ours = [table().sample(index) for index in range(60)]
    assert [table(batch_size=10, epochs=90).sample(index) for index in reversed(range(60))] == ours[::-1]
    assert [table(seed=4).sample(index) for index in range(60)] != ours


def test_validation_patches_are_the_same_for_every_seed():
    """Validation is comparable from run to run."""
    assert list(table().validation()) == list(table(seed=99, epochs=1).validation())
    assert [sample.volume for sample in table().validation()] == [0, 0, 1, 1, 2, 2, 3, 3, 4, 4]


@pytest.mark.parametrize("world", [1, 2, 4])
def test_ranks_share_a_step_without_overlap(world):
    """The ranks' parts of a step, in order, are the step's samples, whatever the number of ranks."""
    parts = [index for rank in range(world) for index in table().rank_samples(5, rank, world)]
    assert parts == list(range(20, 24))


def test_boundaries_are_ceilings_of_epochs_and_end_with_the_run():
    """Validation follows the step in which an epoch is completed, and the last step."""
    drawn = table()  # 10 samples an epoch, 4 a step: epochs end within steps 3, 5, 8, 10, 13, 15
    assert drawn.steps == 15
    assert drawn.boundaries(1) == [3, 5, 8, 10, 13, 15]
    assert drawn.boundaries(4) == [10, 15]
    assert table(epochs=1, batch_size=400).steps == 1


@given(st.integers(1, 40), st.integers(1, 5))
def test_a_run_of_so_many_steps_is_the_beginning_of_one_of_epochs(limit, every):
    """The same samples, whatever the epochs; it validates at those that it completes, and at its end."""
    drawn, whole = table(limit=limit, epochs=1), table(epochs=30)
    assert drawn.steps == limit
    assert drawn.boundaries(every) == sorted({step for step in whole.boundaries(every) if step <= limit} | {limit})
    assert [drawn.sample(index) for index in range(8)] == [whole.sample(index) for index in range(8)]


@given(
    st.integers(0, 14), st.sampled_from([1, 2, 4]), st.floats(1, 2e6), st.integers(1, 40).map(lambda epochs: epochs * 2)
)
def test_windows_and_blocks_cover_the_rest_of_a_run_exactly(start, world, block_bytes, epochs):
    """From any step, with any block size, each rank gets exactly its samples, in order, in equal numbers of blocks."""
    drawn = table(epochs=epochs)
    start = min(start, drawn.steps)
    for rank in range(world):
        found = [
            index
            for segment in segments(drawn, start, world, block_bytes, 1)
            for block in blocks_of(drawn, segment, rank, world)
            for index in block
        ]
        assert found == [i for step in range(start, drawn.steps) for i in drawn.rank_samples(step, rank, world)]


def test_blocks_are_sized_by_bytes():
    """A block holds as many steps as fit into the bytes asked for, at least one."""
    patch = 32**3
    assert segments(table(), 0, 2, 5 * 2 * patch, 1)[0].step == 5
    assert segments(table(), 0, 2, 5 * 2 * patch, 2)[0].step == 2
    assert segments(table(), 0, 2, 1, 1)[0] == range(15)


def test_a_plan_of_100_000_volumes_and_300_epochs_costs_next_to_nothing():
    """Any sample of a run of 60 million is at hand without the ones before it."""
    drawn = table(shapes=np.full((100_000, 3), 200), epochs=300, batch_size=64)
    assert drawn.steps == 937_500
    last = drawn.sample(300 * 200_000 - 1)
    assert 0 <= last.volume < 100_000
    assert len(segments(drawn, 0, 8, 64 * 2**20, 1)) < 2000
