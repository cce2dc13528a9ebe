"""From an experiment's YAML to a `Study`, with errors that name file, key, rule and value; and back to YAML."""

import math
import re
from collections.abc import Hashable, Iterable, Mapping
from io import StringIO
from itertools import chain
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

from ssl_ray.config.overrides import kinds, sections
from ssl_ray.config.schema import Study
from ssl_ray.config.search import DISTRIBUTIONS
from ssl_ray.errors import UserError
from ssl_ray.text import did_you_mean, shown, without_password


def parse(text: str, name: str, overrides: Iterable[str] = ()) -> Study:
    """Read and validate the YAML of the file `name`.

    Each of `overrides` replaces or adds one value, as `key.of.value=yaml`, e.g. `pretrain.optimizer.lr=2e-4`. A
    UserError has a line for each mistake: file, key, rule and value; for an unknown key, the nearest valid one.
    """
    tree = read_yaml(text, f"{name}: not valid YAML")
    if not isinstance(tree, dict):
        raise UserError(f"{name}: an experiment is a mapping of sections, got {type(tree).__name__}")
    for override in overrides:
        _override(tree, override)
    try:
        return Study.model_validate(tree)
    except ValidationError as error:
        raise UserError("\n".join(_explain(name, mistake) for mistake in error.errors())) from None


def dump(experiment: BaseModel) -> str:
    """The experiment as YAML, every default written out; `parse` of it gives the same study, but for passwords."""
    return without_password(yaml.safe_dump(experiment.model_dump(mode="json"), sort_keys=False))


def flatten(section: BaseModel | Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """Dotted keys and values as MLflow parameters, e.g. `{"pretrain.optimizer.lr": "0.0001"}`; without passwords."""
    tree = section.model_dump(mode="json") if isinstance(section, BaseModel) else section
    flat: dict[str, str] = {}
    for key, value in tree.items():
        if isinstance(value, Mapping):
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = without_password(str(value))
    return flat


_MOST = 1_000_000
"""Characters and values of a YAML with every alias written out: a few hundred bytes of them can make billions."""


class _Loader(yaml.SafeLoader):
    """Refuses aliases without bound, and a key that appears twice in a mapping, of which YAML would keep the last."""

    def get_single_node(self) -> yaml.Node | None:
        node = super().get_single_node()
        if node is not None and self._length(node, {}) > _MOST:
            rule = f"with its aliases written out it has more than {_MOST:,} characters, or no end"
            raise yaml.composer.ComposerError(None, None, rule, node.start_mark)
        return node

    def _length(self, node: yaml.Node, known: dict[int, float]) -> float:
        """Characters of a node and its inner ones, and one for each of them; infinite where one of them is itself."""
        if isinstance(node, yaml.ScalarNode):
            return 1 + len(node.value)
        if id(node) not in known:
            known[id(node)] = math.inf
            inner = chain.from_iterable(node.value) if isinstance(node, yaml.MappingNode) else node.value
            known[id(node)] = 1 + sum(self._length(one, known) for one in inner)
        return known[id(node)]

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            name = str(key.value)
            if name in seen:
                rule = f"the key '{name}' appears twice"
                raise yaml.constructor.ConstructorError(None, None, rule, key.start_mark)
            seen.add(name)
        return super().construct_mapping(node, deep)


def read_yaml(text: str, place: str) -> Any:
    """What a YAML says; a UserError that begins with `place` where it is not valid."""
    try:
        return yaml.load(StringIO(text), _Loader)  # of a stream, errors quote nothing: a password may look out
    except Exception as error:  # PyYAML's own, and what Python says of 2024-13-45, !!int '' or !!bool perhaps
        raise UserError(f"{place}: {shown(' '.join(str(error).split()))}") from error


def _override(tree: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals or not key.strip():
        raise UserError(f"--set {override}: expected key=value, e.g. pretrain.optimizer.lr=2e-4")
    value = read_yaml(text, f"--set {override}: the value is not valid YAML")
    parents, last = _parts(key.strip())
    node: Any = tree
    known: list[type[BaseModel]] = [Study]
    try:
        for part in parents:
            at: Any = int(part) if isinstance(node, list) else part
            inner = node[at] if isinstance(node, list) else node.setdefault(part, {})
            fields = [one.model_fields[part] for one in known if part in one.model_fields]
            known = known if isinstance(node, list) else [one for field in fields for one in sections(field.annotation)]
            if isinstance(inner, str) and any(map(kinds, known)):
                inner = node[at] = {"kind": inner}  # for which `task: masked` is short
            node = inner
        node[int(last) if isinstance(node, list) else last] = value
    except (AttributeError, TypeError, ValueError, IndexError) as error:
        raise UserError(f"--set {override}: no such section, or no such place in a list (they count from 0)") from error


def _parts(key: str) -> tuple[list[str], str]:
    """The sections of a dotted key, and its last part; in a search's space, a dotted key is one name."""
    *parents, last = key.split(".")
    if parents[:2] != ["search", "space"]:
        return parents, last
    inner = parents[2:]
    if inner and last in DISTRIBUTIONS:
        return [*parents[:2], ".".join(inner)], last
    return parents[:2], ".".join([*inner, last])


_NO_KEY = re.compile(r"str|constrained-(int|float)|literal\[.*\]|tuple\[.*\]|\[key\]")
"""Parts of a pydantic error's location that name a type of ours instead of a key."""


def _explain(name: str, mistake: Any) -> str:
    """One line about one error of pydantic's."""
    keys, valid = _follow(mistake["loc"])
    place = f"{name}: {'.'.join(keys)}" if keys else name
    rule = mistake["msg"].removeprefix("Value error, ")
    if mistake["type"] == "extra_forbidden":
        meant = did_you_mean(str(mistake["loc"][-1]), valid)
        rule = f"unknown key; {meant or 'valid keys: ' + ', '.join(valid)}"
    elif mistake["type"] == "union_tag_invalid":
        tag, kinds_of = mistake["ctx"]["tag"], mistake["ctx"]["expected_tags"]
        meant = did_you_mean(tag, kinds_of.replace("'", "").split(", "))
        rule = f"must be one of {kinds_of}; {meant}{' ' if meant else ''}got {shown(repr(tag), 80)}"
    elif mistake["type"] == "missing":
        rule = "this key is required"
    elif mistake["type"] != "value_error":
        rule = f"{rule[0].lower()}{rule[1:]}, got {shown(repr(mistake['input']), 80)}"
    return shown(f"{place}: {rule}", 1000)


def _follow(location: Iterable[int | str]) -> tuple[list[str], list[str]]:
    """The keys in a pydantic error's location, which names types and kinds too, and the valid keys of its section."""
    known: list[type[BaseModel]] = [Study]
    keys = []
    for part in map(str, location):
        if chosen := [one for one in known if part in kinds(one)]:
            known = chosen
        elif not _NO_KEY.fullmatch(part):
            keys.append(part)
            if field := known[0].model_fields.get(part):
                known = sections(field.annotation) or known
    return keys, list(known[0].model_fields)
