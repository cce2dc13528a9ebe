"""The rules of the layout that import-linter does not know; `python tests/house.py` prints all of it."""

import ast
import re
from pathlib import Path

import pytest
from house import (
    FILE_LINES,
    HOPS,
    WAYS,
    circles,
    hops,
    long_functions,
    read_modules,
    rooms,
    takes_study,
    without_exceptions,
)

ROOT = Path(__file__).parents[1]
MODULES = read_modules(ROOT)
WHOLE_STUDY = {"study", "estimate", "report", "cli"}
"""Rooms whose functions may take a whole study; those below take sections of it."""

LONG: dict[str, str] = {}
"""Functions of more than 60 lines that stay, with the reason."""


def test_a_module_can_be_read_at_one_sitting() -> None:
    """No file has more than 300 lines and no function more than 60, docstrings included."""
    assert {name: module.lines for name, module in MODULES.items() if module.lines > FILE_LINES} == {}
    sizes = {(name, function): size for name in MODULES for function, size in long_functions(MODULES[name]).items()}
    assert {place: size for place, size in sizes.items() if place[1] not in LONG} == {}


def test_functions_get_what_they_use() -> None:
    """Below `study/`, `estimate/` and `report/` no function takes a whole study."""
    found = {name: takes_study(module) for name, module in MODULES.items() if module.room not in WHOLE_STUDY}
    assert {name: functions for name, functions in found.items() if functions} == {}


def test_no_import_runs_in_a_circle() -> None:
    """Imports inside functions and for types alone count as well, those that the contracts except only by module."""
    assert circles({name: module.imports for name, module in MODULES.items()}) == []
    assert circles(rooms(without_exceptions(MODULES, ROOT))) == []


@pytest.mark.parametrize("way", WAYS)
def test_a_loss_reaches_mlflow_in_six_hops(way: str) -> None:
    assert len(hops(MODULES, way)) <= HOPS


def test_a_package_imports_nothing_by_itself() -> None:
    """`__init__.py` is a docstring, so that importing one module does not load its neighbours."""
    for module in MODULES.values():
        if module.path.name == "__init__.py":
            assert [type(node) for node in module.tree.body] == [ast.Expr], module.name


def test_the_documents_name_files_that_there_are() -> None:
    """Every Python file in README and docs/ exists: in the tree of the README in the folder of its line."""
    there = {path.name for folder in ("ssl_ray", "tests", "experiments") for path in (ROOT / folder).rglob("*.py")}
    for document in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))):
        named = set(re.findall(r"\b[\w/]+\.py\b", document.read_text()))
        assert {name for name in named if name.rpartition("/")[2] not in there} == set(), document.name
        paths = {name for name in named if name.startswith(("ssl_ray/", "tests/", "experiments/"))}
        assert {name for name in paths if not (ROOT / name).is_file()} == set(), document.name


def test_the_tree_in_the_readme_names_every_module() -> None:
    """A module that is missing there is not found by a newcomer."""
    text = (ROOT / "README.md").read_text()
    names = {module.path.name for module in MODULES.values()} - {"__init__.py", "__main__.py"}
    assert {name for name in names if name not in text} == set()
