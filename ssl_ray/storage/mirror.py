"""A local folder that is kept in an object store as well, so that what is written outlives the machine."""

import shutil
from dataclasses import dataclass
from pathlib import Path

from ssl_ray.storage.places import Place, default_scratch


@dataclass(frozen=True)
class Mirror:
    """Programs write to and read from `folder`, and say what is to be kept (`push`) or needed (`pull`).

    Without an origin the folder itself is what is kept, and nothing has to be done. All paths lie below `folder`; every
    method raises `OSError`, in one line, when the object store cannot be reached.
    """

    folder: Path
    origin: Place | None = None

    @classmethod
    def of(cls, text: str | Path, scratch: str | Path | None = None) -> "Mirror":
        """The mirror of a path or URI; that of a URI lies below `scratch`, a folder on this machine's disk."""
        place = Place.parse(text)
        if place.local:
            return cls(place.local)
        return cls(place.scratch(Path(scratch or default_scratch()) / "output"), place)

    def push(self, path: Path) -> None:
        """Keep a file, or a folder with all its files, a `manifest.json` last."""
        if self.origin:
            self._far(path).upload(path)

    def pull(self, path: Path) -> bool:
        """Make a file or folder what was kept, file by file, so that processes may do this at once.

        Returns:
            Whether there is anything.
        """
        if self.origin is None:
            return path.exists()
        far = self._far(path)
        names = far.list()
        found = bool(names) or far.exists()
        if found:
            far.download(path)
        for extra in [path, *path.rglob("*")]:
            if extra.is_file() and not (found and extra == path) and extra.relative_to(path).as_posix() not in names:
                extra.unlink(missing_ok=True)
        return found

    def drop(self, path: Path) -> None:
        """Remove a file or folder, here and where it is kept."""
        if self.origin:
            self._far(path).remove()
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)

    def move(self, path: Path, target: Path) -> bool:
        """Give a file or folder another name, here and where it is kept; returns whether there was anything."""
        found = self.has(path)
        if self.origin and found:
            self._far(path).move(self._far(target))
        if path.exists():
            path.rename(target)
        return found

    def names(self, path: Path) -> set[str]:
        """What a folder holds, as far as it is kept."""
        if self.origin is None:
            return {child.name for child in path.iterdir()} if path.is_dir() else set()
        return {name.partition("/")[0] for name in self._far(path).list()}

    def has(self, path: Path) -> bool:
        """Whether a file or folder is kept."""
        return path.exists() if self.origin is None else self._far(path).exists()

    def _far(self, path: Path) -> Place:
        assert self.origin is not None
        return self.origin / path.relative_to(self.folder).as_posix()
