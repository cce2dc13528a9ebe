"""What the processes of `test_storage` do; apart from the tests, as a new process has to import it."""

import os
from typing import Any

import numpy as np

from ssl_ray.data.normalise import CanonicalVolume
from ssl_ray.data.patch import open_array
from ssl_ray.data.store import Store, Volume
from ssl_ray.storage.object_store import Place


def put_and_die(store: Store, volume: Volume, prepared: CanonicalVolume, survive: int) -> None:
    """Put a volume, and end as after SIGKILL when `survive` of its files are uploaded."""
    write, done = Place.write_bytes, iter(range(10))

    def die(self: Place, content: Any) -> None:
        if next(done) == survive:
            os._exit(9)
        write(self, content)

    Place.write_bytes = die  # type: ignore[method-assign]
    store.put(volume, prepared)


def open_at_once(store: Store, key: str, names: tuple[Any, ...], start: Any, answers: Any) -> None:
    """Open the arrays of a volume when all processes are there."""
    start.wait()
    answers.put({name: np.array(open_array(store, key, name)).tobytes() for name in names})
