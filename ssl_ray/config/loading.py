"""YAML -> `config.Study`, with errors that name file, key, rule and value; and back, as YAML and MLflow parameters."""

import difflib
import reprlib
import types
from collections.abc import Hashable, Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, Union, get_args, get_origin

import yaml
from pydantic import BaseModel, ValidationError

from ssl_ray.config.schema import Study
from ssl_ray.storage.files import read_file
from ssl_ray.text import BREAKS, shown

_MOST_BYTES = 2**20
_MOST_VALUES = 20_000
"""Once aliases are followed: a kilobyte of them can stand for any number."""
_MOST_LINES = 20


def load(path: str | Path, overrides: Iterable[str] = ()) -> Study:
    """Read and validate an experiment.

    Args:
        path: the YAML file.
        overrides: `key.of.value=yaml` strings that replace or add single values, e.g. `pretrain.optimizer.lr=2e-4`.

    Raises:
        ValueError: naming the file, the key, the rule and the value; an unknown key with the nearest valid one.
    """
    try:
        text = read_file(Path(path), _MOST_BYTES).decode()
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: cannot read the experiment: {getattr(error, 'strerror', None) or error}") from error
    tree = _parse(text, f"{path}: not valid YAML")
    if not isinstance(tree, dict):
        raise ValueError(f"{path}: an experiment is a mapping of sections, got {type(tree).__name__}")
    for override in overrides:
        _override(tree, override)
    try:
        return Study.model_validate(tree)
    except ValidationError as error:
        found = error.errors(include_url=False)
        # A list whose only item is wrong counts as empty for pydantic, which is not what the user has to mend.
        inner = [details["loc"][:-1] for details in found]
        lines = [
            _explain(str(path), details)
            for details in found[:_MOST_LINES]
            if details["type"] != "too_short" or not any(loc[: len(details["loc"])] == details["loc"] for loc in inner)
        ]
        if len(found) > _MOST_LINES:
            lines.append(f"{path}: and {len(found) - _MOST_LINES} mistakes more")
        raise ValueError("\n".join(shown(line, 1000) for line in lines)) from None


def dump(study: Study) -> str:
    """The resolved experiment as YAML; `load` of it gives the same study."""
    return yaml.safe_dump(study.model_dump(mode="json"), sort_keys=False)


def flatten(section: BaseModel | Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """Dotted keys and values as MLflow parameters, e.g. `{"pretrain.optimizer.lr": "0.0001"}`."""
    tree = section.model_dump(mode="json") if isinstance(section, BaseModel) else section
    flat: dict[str, str] = {}
    for key, value in tree.items():
        if isinstance(value, Mapping):
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = str(value)
    return flat


def _parse(text: str, place: str) -> Any:
    """The value that a YAML text stands for; no code is run, and aliases lead neither in circles nor to a bomb."""
    try:
        loader = _UniqueKeys(text)
        node = loader.get_single_node()
        if node is None:
            return None
        _count(node, {}, set())
        return loader.construct_document(node)
    except Exception as error:  # which one PyYAML raises depends on the tag; RecursionError where it is nested too deep
        raise ValueError(f"{place}: {shown(' '.join(str(error).split()))}") from error


def _count(node: yaml.Node, known: dict[int, int], above: set[int]) -> int:
    """Values below a node with all aliases followed; refuses what no experiment has."""
    if id(node) in known:
        return known[id(node)]

    def refuse(rule: str) -> None:
        raise yaml.constructor.ConstructorError(None, None, rule, node.start_mark)

    if isinstance(node, yaml.ScalarNode):
        if BREAKS.search(node.value):
            refuse(f"no control character is allowed, got {shown(repr(node.value), 80)}")
        if node.tag != "tag:yaml.org,2002:str" and len(node.value) > 40:
            refuse(f"a value of {len(node.value)} characters that is not text")
        return 1
    if id(node) in above:
        refuse("an alias of what it is part of")
    inside = node.value if isinstance(node, yaml.SequenceNode) else [part for pair in node.value for part in pair]
    known[id(node)] = total = 1 + sum(_count(part, known, above | {id(node)}) for part in inside)
    if total > _MOST_VALUES:
        refuse(f"more than {_MOST_VALUES} values, where all aliases are followed")
    return total


class _UniqueKeys(yaml.SafeLoader):
    """Refuses a key that stands twice, of which YAML would silently keep the last."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            name = str(key.value)
            if name in seen:
                rule = f"the key '{shown(name, 80)}' stands twice"
                raise yaml.constructor.ConstructorError(None, None, rule, key.start_mark)
            seen.add(name)
        return super().construct_mapping(node, deep)


def _override(tree: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals or not key.strip():
        raise ValueError(f"--set {override}: expected key=value, e.g. pretrain.optimizer.lr=2e-4")
    *parents, last = key.strip().split(".")
    node: Any = tree
    for parent in parents:
        node = node[_place(node, parent, override)] if isinstance(node, list) else node.setdefault(parent, {})
        if not isinstance(node, dict | list):
            raise ValueError(f"--set {override}: '{parent}' is a value, not a section")
    node[_place(node, last, override)] = _parse(text, f"--set {override}: the value is not valid YAML")


def _place(node: dict[str, Any] | list[Any], part: str, override: str) -> Any:
    """A key of a section, or an index into a list, as in `pretrain.sources.0.root`."""
    if isinstance(node, dict):
        return part
    if not part.isdecimal() or int(part) >= len(node):
        raise ValueError(f"--set {override}: '{part}' is no place in a list of {len(node)}; they count from 0")
    return int(part)


_repr = reprlib.Repr()
_repr.maxlist = _repr.maxtuple = _repr.maxdict = 10
_repr.maxstring = _repr.maxother = 80

_NOT_KEYS = ("str", "tuple[str, ...]", "[key]")
"""Parts of a pydantic error's location that name a type instead of a key."""


def _explain(path: str, details: Any) -> str:
    location = [shown(part, 80) for part in details["loc"] if part not in _NOT_KEYS]
    place = f"{path}: {'.'.join(location)}" if location else path
    if details["type"] == "extra_forbidden":
        valid = _fields_at(Study, details["loc"][:-1])
        near = difflib.get_close_matches(location[-1], valid, n=1, cutoff=0.5)
        hint = f"did you mean '{near[0]}'?" if near else f"valid keys: {', '.join(valid)}"
        return f"{place}: unknown key; {hint}"
    if details["type"] == "missing":
        return f"{place}: this key is required"
    rule = details["msg"].removeprefix("Value error, ")
    if details["type"] == "value_error":
        return f"{place}: {rule}"
    return f"{place}: {rule[0].lower()}{rule[1:]}, got {_repr.repr(details['input'])}"


def _fields_at(model: type[BaseModel], location: Iterable[int | str]) -> list[str]:
    """Valid keys of the section that a pydantic error location points to."""
    for part in location:
        field = model.model_fields.get(str(part))
        if field is not None:
            model = next(iter(_models(field.annotation)), model)
    return list(model.model_fields)


def _models(annotation: Any) -> Iterable[type[BaseModel]]:
    if get_origin(annotation) in (Union, types.UnionType, tuple, Annotated):
        for argument in get_args(annotation):
            yield from _models(argument)
    elif isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
