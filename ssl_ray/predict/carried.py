"""Our source files in a bundle, for where ssl_ray is not installed: the package `scripts`."""

import re
from collections.abc import Iterable
from importlib.util import find_spec
from pathlib import Path

from ssl_ray.storage.files import write_file

_SCRIPTS = "scripts"
"""The folder of a bundle's own code, which MONAI can import from."""


def carried_name(module: str) -> str:
    """What a module of ours is called in a bundle."""
    return f"{_SCRIPTS}{module.removeprefix('ssl_ray')}"


def carry(modules: Iterable[str], folder: Path) -> None:
    """Copy modules of ours, all others of ours that they import, and their packages, into a bundle's folder."""
    todo, done = set(modules), set[str]()
    while todo:
        module = todo.pop()
        done.add(module)
        spec = find_spec(module)
        assert spec is not None
        assert spec.origin is not None
        source = Path(spec.origin).read_text()
        todo |= {module.rpartition(".")[0], *re.findall(r"^\s*from (ssl_ray[\w.]*) import", source, re.M)} - {*done, ""}
        path = folder.joinpath(*carried_name(module).split("."))
        path = path / "__init__.py" if spec.submodule_search_locations else path.with_suffix(".py")
        write_file(path, re.sub(r"\bssl_ray\.", f"{_SCRIPTS}.", source).encode())
