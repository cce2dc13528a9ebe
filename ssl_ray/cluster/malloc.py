"""What glibc's malloc does with memory that a step frees: by default the next step gets it from the kernel again.

By default a tensor of more than 32 MB is mapped and unmapped by the kernel each time, and every page of it is zeroed
when it is touched first: on a CPU that is half the time of a UNETR's step (6.2 instead of 2.9 s for four patches of
96³), and a tenth of a ViTAutoEnc's. Kept, up to half a gigabyte at the end of the heap, it is there for the next one;
that step's peak is then 3.7 instead of 3.0 GB. Ray runs a training in a thread; threads get arenas of their own, which
cannot hold tensors as large, so that all share the main one. Other C libraries ignore all of this.
"""

import ctypes
import os

_KEPT = {"ARENA_MAX": (-8, 1), "MMAP_THRESHOLD_": (-3, 2_000_000_000), "TRIM_THRESHOLD_": (-1, 500_000_000)}
"""By the end of their environment variables: parameters of mallopt(3), by their numbers in malloc.h, and values."""


def keep_freed() -> None:
    """Have this process keep memory that it frees; for the thread that calls it, and those that are the first."""
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError, TypeError):  # another C library
        return
    for parameter, value in _KEPT.values():
        mallopt(parameter, value)


def environment() -> dict[str, str]:
    """Variables with which a process that is started does the same from its beginning; none that are set already."""
    variables = {f"MALLOC_{name}": str(value) for name, (_, value) in _KEPT.items()}
    return {name: value for name, value in variables.items() if name not in os.environ}
