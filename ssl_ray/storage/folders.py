"""Where a study keeps what it writes, out of the places that its experiment names."""

from dataclasses import dataclass, field
from os.path import normpath
from pathlib import Path
from typing import Any

from ssl_ray.errors import UserError
from ssl_ray.storage.mirror import Mirror
from ssl_ray.storage.object_store import Place
from ssl_ray.text import check_encoded

_SHARED = "artifacts", "cache", "mlflow.db"
"""In the output folder: MLflow's, and where prepared volumes lie unless the experiment says otherwise."""


@dataclass(frozen=True)
class Folders:
    """The folders of one study.

    `output` is the folder that studies share, on this machine, and where it is kept if it is in an object store;
    `cache` is the store of prepared volumes, an absolute path or a URI; `scratch` is a folder on each machine's own
    disk for what is read from an object store.
    """

    name: str
    output: Mirror
    cache: Path | str = field(repr=False)  # it may hold a password
    scratch: str | None = None

    @classmethod
    def of(cls, name: str, output: str, cache: str | None = None, scratch: str | None = None) -> "Folders":
        """The folders that an experiment's keys of these names stand for; a URI that is none of ours is a UserError."""
        for key, text in {"output": output, "cache": cache or output}.items():
            check_encoded(key, text)
            try:
                Place.parse(text)
            except UserError as error:
                raise UserError(f"{key}: {error}") from error
        if "@" in Place.parse(output).store:  # Tune pickles the filesystem of its storage
            rule = "Ray would write user and password into its own files there; give them in the environment"
            raise UserError(f"output: {rule}, as AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY")
        place = Place.parse(cache) if cache else Place.parse(output) / "cache"
        own = Place.parse(output) / name
        if name.lower() in _SHARED or (own.store == place.store and normpath(own.path) == normpath(place.path)):
            rule = "the study's folder in output would be one that all studies share; give it another name"
            raise UserError(f"name: {rule}, got {name!r}")
        return cls(name, Mirror.of(output, scratch), place.local or place.uri, scratch)

    @property
    def study(self) -> Path:
        """`<output>/<name>` on this machine: all that the study writes but for the cache and MLflow's own files."""
        return self.output.folder / self.name

    @property
    def ray_storage(self) -> dict[str, Any]:
        """Where Ray keeps the state of a run: arguments of its `RunConfig`."""
        place = self.output.kept(self.study) / "ray"
        return {"storage_path": place.path} | ({} if place.local else {"storage_filesystem": place.filesystem})

    def check_writable(self) -> None:
        """Write to every folder, before anything expensive starts; a UserError names the place and the reason."""
        output = self.output.kept(self.output.folder)
        for place in dict.fromkeys((output, Place.parse(self.cache), Place.parse(self.study))):
            place.check_writable()
