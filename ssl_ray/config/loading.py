"""From an experiment's YAML to a `Study`, with errors that name file, key, rule and value; and back to YAML."""

import difflib
import re
import types
from collections.abc import Hashable, Iterable, Iterator, Mapping
from typing import Annotated, Any, Union, get_args, get_origin

import yaml
from pydantic import BaseModel, ValidationError

from ssl_ray.config.schema import Study
from ssl_ray.errors import UserError
from ssl_ray.text import shown


def parse(text: str, name: str, overrides: Iterable[str] = ()) -> Study:
    """Read and validate the text of an experiment.

    Args:
        text: YAML.
        name: of its file, for messages.
        overrides: `key.of.value=yaml` strings that replace or add single values, e.g. `pretrain.optimizer.lr=2e-4`.

    Raises:
        UserError: with a line for each mistake: file, key, rule and value; for an unknown key, the nearest valid one.
    """
    tree = _read_yaml(text, f"{name}: not valid YAML")
    if not isinstance(tree, dict):
        raise UserError(f"{name}: an experiment is a mapping of sections, got {type(tree).__name__}")
    for override in overrides:
        _override(tree, override)
    try:
        return Study.model_validate(tree)
    except ValidationError as error:
        mistakes = error.errors(include_url=False)
        # pydantic counts a list whose only item is wrong as empty too, which is not what the user has to mend.
        parents = {mistake["loc"][:length] for mistake in mistakes for length in range(len(mistake["loc"]))}
        lines = [
            _explain(name, mistake)
            for mistake in mistakes
            if mistake["type"] != "too_short" or mistake["loc"] not in parents
        ]
        raise UserError("\n".join(lines)) from None


def dump(study: Study) -> str:
    """The experiment as YAML, every default written out; `parse` of it gives the same study."""
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


class _UniqueKeys(yaml.SafeLoader):
    """Refuses a key that appears twice in a mapping, of which YAML would silently keep the last."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            name = str(key.value)
            if name in seen:
                rule = f"the key '{name}' appears twice"
                raise yaml.constructor.ConstructorError(None, None, rule, key.start_mark)
            seen.add(name)
        return super().construct_mapping(node, deep)


def _read_yaml(text: str, place: str) -> Any:
    try:
        return yaml.load(text, _UniqueKeys)
    except Exception as error:  # PyYAML's own, and what Python says of 2024-13-45, !!int '' or !!bool perhaps
        raise UserError(f"{place}: {shown(' '.join(str(error).split()))}") from error


def _override(tree: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals or not key.strip():
        raise UserError(f"--set {override}: expected key=value, e.g. pretrain.optimizer.lr=2e-4")
    *parents, last = key.strip().split(".")
    node: Any = tree
    for parent in parents:
        node = node[_place(node, parent, override)] if isinstance(node, list) else node.setdefault(parent, {})
        if not isinstance(node, dict | list):
            raise UserError(f"--set {override}: '{parent}' is a value, not a section")
    node[_place(node, last, override)] = _read_yaml(text, f"--set {override}: the value is not valid YAML")


def _place(node: dict[str, Any] | list[Any], part: str, override: str) -> Any:
    """A key of a section, or an index into a list, as in `pretrain.sources.0.root`."""
    if isinstance(node, dict):
        return part
    if not part.isdecimal() or int(part) >= len(node):
        raise UserError(f"--set {override}: '{part}' is no place in a list of {len(node)}; they count from 0")
    return int(part)


_NO_KEY = re.compile(r"str|constrained-int|tuple\[.*\]|\[key\]")
"""Parts of a pydantic error's location that name a type of ours instead of a key."""


def _explain(name: str, mistake: Any) -> str:
    """One line about one error of pydantic's."""
    keys = [str(part) for part in mistake["loc"] if not _NO_KEY.fullmatch(str(part))]
    place = f"{name}: {'.'.join(keys)}" if keys else name
    rule = mistake["msg"].removeprefix("Value error, ")
    if mistake["type"] == "extra_forbidden":
        valid = _keys_of(Study, mistake["loc"][:-1])
        near = difflib.get_close_matches(str(mistake["loc"][-1]), valid, n=1, cutoff=0.5)
        text = f"unknown key; did you mean '{near[0]}'?" if near else f"unknown key; valid keys: {', '.join(valid)}"
    elif mistake["type"] == "missing":
        text = "this key is required"
    elif mistake["type"] == "value_error":
        text = rule
    else:
        text = f"{rule[0].lower()}{rule[1:]}, got {shown(repr(mistake['input']), 80)}"
    return shown(f"{place}: {text}", 1000)


def _keys_of(model: type[BaseModel], location: Iterable[int | str]) -> list[str]:
    """Valid keys of the section that a pydantic error's location leads to."""
    for part in location:
        field = model.model_fields.get(str(part))
        if field is not None:
            model = next(_sections_in(field.annotation), model)
    return list(model.model_fields)


def _sections_in(annotation: Any) -> Iterator[type[BaseModel]]:
    if get_origin(annotation) in (Union, types.UnionType, tuple, Annotated):
        for argument in get_args(annotation):
            yield from _sections_in(argument)
    elif isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
