"""The rules of the layout that import-linter does not know; `python tests/house.py` prints all of it."""

import ast
from pathlib import Path

import pytest
from house import FILE_LINES, Module, circles, long_functions, read_modules, takes_study

ROOT = Path(__file__).parents[1]
MODULES = read_modules(ROOT)
WHOLE_STUDY = {"study", "estimate", "report", "cli"}
"""Rooms whose functions may take a whole study; those below take sections of it."""

LONG: dict[str, str] = {}
"""Functions of more than 60 lines that stay, with the reason."""


@pytest.mark.parametrize("module", MODULES.values(), ids=MODULES)
def test_a_module_can_be_read_at_one_sitting(module: Module) -> None:
    """No file has more than 300 lines and no function more than 60, docstrings included."""
    assert module.lines <= FILE_LINES
    assert {name: size for name, size in long_functions(module).items() if name not in LONG} == {}


def test_functions_get_what_they_use() -> None:
    """Below `study/`, `estimate/` and `report/` no function takes a whole study."""
    found = {name: takes_study(module) for name, module in MODULES.items() if module.room not in WHOLE_STUDY}
    assert {name: functions for name, functions in found.items() if functions} == {}


def test_no_import_runs_in_a_circle() -> None:
    """Imports inside functions and for types alone count as well."""
    assert circles({name: module.imports for name, module in MODULES.items()}) == []


def test_a_package_imports_nothing_by_itself() -> None:
    """`__init__.py` is a docstring, so that importing one module does not load its neighbours."""
    for module in MODULES.values():
        if module.path.name == "__init__.py":
            assert [type(node) for node in module.tree.body] == [ast.Expr], module.name
