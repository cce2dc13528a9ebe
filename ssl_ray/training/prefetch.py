"""Work that threads do while the caller does something else."""

from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

T = TypeVar("T")
R = TypeVar("R")


def ahead(function: Callable[[T], R], items: Iterable[T], threads: int) -> Generator[R, None, None]:
    """`map` that already works on the next items while the caller uses a result; with 0 threads it is `map`.

    Threads, not processes: numpy, scipy, torch and zlib give up Python's lock while they compute, and what they work on
    need not be copied or sent. Items are taken in the caller's thread; at most `threads` + 1 of them and of their
    results are held at once. An error is raised where its result is asked for, and no thread runs on afterwards.
    """
    if threads == 0:
        yield from map(function, items)
        return
    pool = ThreadPoolExecutor(threads)
    waiting: deque[Future[R]] = deque()
    try:
        for item in items:
            waiting.append(pool.submit(function, item))
            if len(waiting) > threads:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)
