"""A local folder that is kept in an object store as well, so that what is written outlives the machine."""

from dataclasses import dataclass
from pathlib import Path

from ssl_ray.storage.object_store import Place, default_scratch


@dataclass(frozen=True)
class Mirror:
    """Programs write to and read from `folder`; they push what is to be kept, and pull what they need.

    Without an origin, the folder is itself where things are kept, and there is nothing to push or pull. All paths lie
    below `folder`. Every method raises `OSError`, in one line, when the object store cannot be reached.
    """

    folder: Path
    origin: Place | None = None

    @classmethod
    def of(cls, text: str | Path, scratch: str | Path | None = None, kind: str = "output") -> "Mirror":
        """The mirror of a path or URI; the folder of a URI lies in `<scratch>/<kind>`, on this machine's disk."""
        place = Place.parse(text)
        if place.local:
            return cls(place.local)
        return cls(Path(scratch or default_scratch()) / kind / place.digest, place)

    def kept(self, path: Path) -> Place:
        """Where a file or folder is kept: its place in the object store, or else its own path."""
        if self.origin is None:
            return Place(str(path))
        return self.origin / path.relative_to(self.folder).as_posix()

    def push(self, path: Path) -> None:
        """Keep a file, or a folder with all its files, a `manifest.json` last."""
        if self.origin:
            self.kept(path).upload(path)

    def pull(self, path: Path) -> bool:
        """Replace a local file or folder by its copy in the object store, file by file; returns whether there is any.

        Several processes may do this at once. Files that the object store does not have are removed.
        """
        if self.origin is None:
            return path.exists()
        names = self.kept(path).list()
        for name in names:
            (self.kept(path) / name).download(path / name)
        for old in (path, *path.rglob("*")):
            if old.is_file() and old.relative_to(path).as_posix() not in names:
                old.unlink(missing_ok=True)
        return bool(names)

    def drop(self, path: Path) -> None:
        """Remove a file or folder, here and where it is kept."""
        self.kept(path).remove()
        Place(str(path)).remove()

    def move(self, path: Path, target: Path) -> bool:
        """Give a file or folder another name, here and where it is kept; returns whether it was kept."""
        if found := self.kept(path).list():
            self.kept(path).move(self.kept(target))
        if self.origin and path.exists():
            path.rename(target)
        return bool(found)

    def names(self, path: Path) -> set[str]:
        """Names of the files and folders that are kept in a folder."""
        return self.kept(path).names()
