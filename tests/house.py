"""How the package is laid out: `python tests/house.py [CHECKOUT]` prints it, for this checkout or for another one.

Imports are read from the source, those inside functions and under TYPE_CHECKING included.
"""

import ast
import itertools
import sys
import tomllib
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from pathlib import Path

PACKAGE = "ssl_ray"
FILE_LINES, FUNCTION_LINES, HOPS = 300, 60, 6
WAYS = {
    way: f"{told} > tracking.run.Run.metrics > tracking.run.Run.append | tracking.delivery.Delivery._deliver"
    for way, told in {
        "pretraining": "pretrain.worker.train_loop > pretrain.worker._Reporter.record | "
        "pretrain.collector.Collector._collect",
        "trial": "finetune.trial.Trial.train | search.grid.tune_cells.trainable | "
        "search.callbacks.TrialCallback.on_trial_result",
    }.items()
}
"""The functions that a loss passes between where it becomes a number and where `log_batch` is called.

`>` is a call; at `|` it is handed over in another way: yielded, or through a queue to another process or thread.
"""


@dataclass(frozen=True)
class Module:
    """One file of the package: its dotted name, its lines, and what it imports of the package."""

    name: str
    path: Path
    lines: int
    tree: ast.Module
    imports: frozenset[str]

    @property
    def room(self) -> str:
        """The package or root module that it belongs to."""
        return self.name.split(".")[1] if "." in self.name else PACKAGE

    def functions(self) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
        """Every function and method."""
        for node in ast.walk(self.tree):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                yield node


def read_modules(checkout: Path) -> dict[str, Module]:
    """All modules of the package by name."""
    sources = {_name(path.relative_to(checkout)): path for path in sorted((checkout / PACKAGE).rglob("*.py"))}
    modules = {}
    for name, path in sources.items():
        text = path.read_text()
        tree = ast.parse(text)
        imports = frozenset(_imports(tree, sources)) - {name}
        modules[name] = Module(name, path.relative_to(checkout), len(text.splitlines()), tree, imports)
    return modules


def circles(graph: Mapping[str, frozenset[str]]) -> list[list[str]]:
    """Groups of nodes that reach each other (Tarjan, 1972)."""
    order: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []
    found: list[list[str]] = []

    def visit(node: str) -> None:
        order[node] = low[node] = len(order)
        stack.append(node)
        for other in graph[node]:
            if other not in order:
                visit(other)
                low[node] = min(low[node], low[other])
            elif other in stack:
                low[node] = min(low[node], order[other])
        if low[node] == order[node]:
            group = stack[stack.index(node) :]
            del stack[stack.index(node) :]
            if len(group) > 1:
                found.append(sorted(group))

    for node in graph:
        if node not in order:
            visit(node)
    return found


def without_exceptions(modules: Mapping[str, Module], checkout: Path) -> dict[str, Module]:
    """The modules without the imports that the contracts in the checkout's pyproject.toml name as no climb upward."""
    contracts = tomllib.loads((checkout / "pyproject.toml").read_text())["tool"].get("importlinter", {})
    excepted = {line for contract in contracts.get("contracts", []) for line in contract.get("ignore_imports", [])}
    patterns = [tuple(line.split(" -> ")) for line in excepted]

    def counts(module: str, other: str) -> bool:
        return not any(fnmatchcase(module, above) and fnmatchcase(other, below) for above, below in patterns)

    return {
        name: replace(module, imports=frozenset(other for other in module.imports if counts(name, other)))
        for name, module in modules.items()
    }


def rooms(modules: Mapping[str, Module]) -> dict[str, frozenset[str]]:
    """Imports between rooms."""
    graph: dict[str, set[str]] = defaultdict(set)
    for module in modules.values():
        graph[module.room] |= {modules[other].room for other in module.imports} - {module.room}
    return {room: frozenset(others) for room, others in graph.items()}


def levels(graph: Mapping[str, frozenset[str]]) -> dict[str, int]:
    """How many rooms lie below each one on the longest way down, itself included; a circle counts as one."""
    known: dict[str, int] = {}

    def level(node: str, above: frozenset[str] = frozenset()) -> int:
        if node not in known:
            below = (level(other, above | {node}) for other in graph[node] - above)
            known[node] = 1 + max(below, default=0)
        return known[node]

    return {node: level(node) for node in graph}


def takes_study(module: Module) -> list[str]:
    """Functions with a whole `Study` among their arguments, and classes that hold one."""
    found = []
    for node in module.functions():
        arguments = (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs)
        if any(_is_study(argument.annotation) for argument in arguments):
            found.append(node.name)
    for node in ast.walk(module.tree):
        if isinstance(node, ast.ClassDef):
            fields = (child for child in node.body if isinstance(child, ast.AnnAssign))
            found += [node.name for field in fields if _is_study(field.annotation)]
    return found


def long_functions(module: Module) -> dict[str, int]:
    """Functions of more than 60 lines, with their lines."""
    sizes = {node.name: (node.end_lineno or 0) - node.lineno + 1 for node in module.functions()}
    return {name: size for name, size in sizes.items() if size > FUNCTION_LINES}


def hops(modules: Mapping[str, Module], way: str) -> list[str]:
    """The functions on a loss's way to MLflow; a LookupError names one that is gone or does not call the next."""
    names = WAYS[way].replace("|", ">").split(" > ")
    for name, following in itertools.pairwise([*names, ""]):
        file = max((module for module in modules if f"{PACKAGE}.{name}.".startswith(f"{module}.")), key=len)
        scope: ast.AST = modules[file].tree
        for part in f"{PACKAGE}.{name}".removeprefix(f"{file}.").split("."):
            scope = next((node for node in ast.walk(scope) if getattr(node, "name", None) == part), ast.Pass())
        called = {getattr(node, "attr", getattr(node, "id", "")) for node in ast.walk(scope)}
        if isinstance(scope, ast.Pass) or (f"{name} > {following}" in WAYS[way] and _last(following) not in called):
            raise LookupError(f"{name} is not there or does not call {following}")
    return names


def describe(checkout: Path) -> str:
    """The whole layout as text."""
    modules = read_modules(checkout)
    graph = rooms(without_exceptions(modules, checkout))
    level = levels(graph)
    lines, files = Counter[str](), Counter[str]()
    for module in modules.values():
        lines[module.room] += module.lines
        files[module.room] += 1
    text = [f"{'level':>5}  {'room':<14}{'files':>6}{'lines':>7}"]
    text += [
        f"{level[room]:>5}  {room:<14}{files[room]:>6}{lines[room]:>7}"
        for room in sorted(graph, key=lambda room: (-level[room], room))
    ]
    text.append(f"{'all':>5}  {'':<14}{len(modules):>6}{lines.total():>7}")
    flat = [module for module in modules.values() if len(module.path.parts) == 2]
    text.append(f"files at the root: {len(flat)}")
    text.append(f"imports between rooms: {sum(map(len, graph.values()))} on {max(level.values())} levels")
    inside = circles({name: module.imports for name, module in modules.items()})
    text += [f"circle: {', '.join(group)}" for group in inside] or ["no circle of modules"]
    text += [f"circle of rooms: {', '.join(group)}" for group in circles(graph)] or ["no circle of rooms"]
    whole = {module.name: takes_study(module) for module in modules.values()}
    text.append(f"take a whole Study: {sum(map(len, whole.values()))}")
    text += [f"  {name}: {', '.join(names)}" for name, names in whole.items() if names]
    text += [f"over {FILE_LINES} lines: {module.path} {module.lines}" for module in modules.values() if _long(module)]
    for module in modules.values():
        text += [f"over {FUNCTION_LINES} lines: {module.path} {n} {size}" for n, size in long_functions(module).items()]
    for way in WAYS:
        try:
            text.append(f"hops from the loss of a {way} to MLflow: {len(hops(modules, way))}")
        except LookupError as error:
            text.append(f"hops from the loss of a {way} to MLflow: another way than today's ({error})")
    return "\n".join(text)


def _last(name: str) -> str:
    return name.rpartition(".")[2]


def _long(module: Module) -> bool:
    return module.lines > FILE_LINES


def _name(path: Path) -> str:
    parts = path.with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def _imports(tree: ast.Module, known: Mapping[str, Path]) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name in known)
        elif isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == PACKAGE:
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                yield inner if inner in known else node.module


def _is_study(annotation: ast.expr | None) -> bool:
    return annotation is not None and "Study" in {
        node.id for node in ast.walk(annotation) if isinstance(node, ast.Name)
    }


if __name__ == "__main__":
    print(describe(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parents[1]))
