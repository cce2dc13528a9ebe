"""Work that threads do ahead of the caller: the results of `map`, in order, few at a time."""

import threading
import time
from collections.abc import Iterator

import pytest

from ssl_ray.training.prefetch import ahead


@pytest.mark.parametrize("threads", [0, 1, 3])
def test_results_are_those_of_map_in_order(threads: int) -> None:
    """However long each takes, and whatever the number of threads."""

    def slow_when_early(item: int) -> int:
        time.sleep(0.002 * (10 - item))
        return item * item

    assert list(ahead(slow_when_early, range(10), threads)) == [item * item for item in range(10)]
    assert list(ahead(slow_when_early, [], threads)) == []


def test_the_next_item_is_in_the_works_while_the_caller_works() -> None:
    """With one thread, the second result is made before it is asked for."""
    made = {item: threading.Event() for item in range(3)}
    results = ahead(lambda item: made[item].set(), range(3), 1)
    next(results)
    assert made[1].wait(10)
    results.close()


@pytest.mark.parametrize("threads", [0, 1, 2])
def test_few_items_are_taken_at_a_time(threads: int) -> None:
    """One more than there are threads, however slowly the results are used: an item may be large."""
    taken = []

    def items() -> Iterator[int]:
        for item in range(20):
            taken.append(item)
            yield item

    for used, _ in enumerate(ahead(lambda item: item, items(), threads)):
        assert len(taken) - used <= threads + 1


@pytest.mark.parametrize("threads", [0, 1, 2])
def test_an_error_comes_in_its_turn_and_ends_all(threads: int) -> None:
    """The results before it are there, the error is the function's own, and no thread runs on."""
    before = threading.active_count()

    def divide(item: int) -> float:
        return 6 / item

    results = ahead(divide, [3, 2, 0, 1, 0], threads)
    assert [next(results), next(results)] == [2, 3]
    with pytest.raises(ZeroDivisionError):
        next(results)
    assert threading.active_count() == before


def test_a_caller_that_stops_leaves_no_thread() -> None:
    """Closed in the middle, what waits is dropped and what runs is waited for."""
    before, started = threading.active_count(), []
    results = ahead(started.append, range(100), 2)
    next(results)
    results.close()
    assert threading.active_count() == before
    assert len(started) <= 4
