"""From an experiment's YAML to a `Study`, with errors that name file, key, rule and value; and back to YAML."""

import difflib
import re
import reprlib
from collections.abc import Hashable, Iterable, Mapping
from io import StringIO
from typing import Any, TypeVar, get_args

import yaml
from pydantic import BaseModel, ValidationError

from ssl_ray.config.common import Section
from ssl_ray.config.schema import Study
from ssl_ray.errors import UserError
from ssl_ray.text import shown, without_password

S = TypeVar("S", bound=BaseModel)


def parse(text: str, name: str, overrides: Iterable[str] = ()) -> Study:
    """Read and validate the YAML of the file `name`.

    Each of `overrides` replaces or adds one value, as `key.of.value=yaml`, e.g. `pretrain.optimizer.lr=2e-4`.

    Raises:
        UserError: with a line for each mistake: file, key, rule and value; for an unknown key, the nearest valid one.
    """
    tree = _read_yaml(text, f"{name}: not valid YAML")
    for override in overrides:
        _override(tree, override)
    try:
        return Study.model_validate(tree)
    except ValidationError as error:
        raise UserError("\n".join(_explain(name, mistake) for mistake in error.errors())) from None


def dump(experiment: BaseModel) -> str:
    """The experiment as YAML, every default written out; `parse` of it gives the same study, but for passwords."""
    return yaml.dump(experiment.model_dump(mode="json"), Dumper=_Clean, sort_keys=False)


class _Clean(yaml.SafeDumper):
    """Writes every text without passwords."""


_Clean.add_representer(str, lambda dumper, text: dumper.represent_str(without_password(text)))


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


def changed(section: S, overrides: Mapping[str, Any]) -> S:
    """The section with other values of some dotted keys, validated, e.g. `{"optimizer.lr": 2e-4}`."""
    tree = section.model_dump()
    for key, value in overrides.items():
        *parents, last = key.split(".")
        node = tree
        for part in parents:
            node = node[part]
        node[last] = value
    return type(section).model_validate(tree)


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
        return yaml.load(StringIO(text), _UniqueKeys)  # of a stream, errors quote nothing: a password may look out
    except Exception as error:  # PyYAML's own, and what Python says of 2024-13-45, !!int '' or !!bool perhaps
        raise UserError(f"{place}: {shown(' '.join(str(error).split()))}") from error


def _override(tree: Any, override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals or not key.strip():
        raise UserError(f"--set {override}: expected key=value, e.g. pretrain.optimizer.lr=2e-4")
    value = _read_yaml(text, f"--set {override}: the value is not valid YAML")
    *parents, last = key.strip().split(".")
    node = tree
    try:
        for part in parents:
            node = node[int(part)] if isinstance(node, list) else node.setdefault(part, {})
        node[int(last) if isinstance(node, list) else last] = value
    except (AttributeError, TypeError, ValueError, IndexError) as error:
        raise UserError(f"--set {override}: no such section, or no such place in a list (they count from 0)") from error


class _Short(reprlib.Repr):
    """A value of any size in a few words, its strings without passwords before they are cut."""

    def repr_str(self, x: str, level: int) -> str:
        return super().repr_str(without_password(x), level)


_NO_KEY = re.compile(r"str|constrained-int|tuple\[.*\]|\[key\]")
"""Parts of a pydantic error's location that name a type of ours instead of a key."""


def _explain(name: str, mistake: Any) -> str:
    """One line about one error of pydantic's."""
    unknown = [str(mistake["loc"][-1])] if mistake["type"] == "extra_forbidden" else []
    keys, section = _located(mistake["loc"][:-1] if unknown else mistake["loc"])
    keys += unknown
    place = f"{name}: {'.'.join(keys)}" if keys else name
    rule = mistake["msg"].removeprefix("Value error, ")
    if unknown:
        valid = list(section.model_fields)
        near = difflib.get_close_matches(unknown[0], valid, n=1, cutoff=0.5)
        rule = f"unknown key; did you mean '{near[0]}'?" if near else f"unknown key; valid keys: {', '.join(valid)}"
    elif mistake["type"] not in ("value_error", "missing"):
        rule = f"{rule[0].lower()}{rule[1:]}, got {shown(_Short().repr(mistake['input']), 80)}"
    return shown(f"{place}: {rule}", 1000)


def _located(location: Iterable[int | str]) -> tuple[list[str], type[BaseModel]]:
    """The keys in the YAML, and the section, that a pydantic error's location leads to."""
    sections = [section for section in Section.__subclasses__() if "kind" in section.model_fields]
    kinds = {get_args(section.model_fields["kind"].annotation)[0]: section for section in sections}
    keys: list[str] = []
    found: type[BaseModel] = Study
    for part in map(str, location):
        if field := found.model_fields.get(part):
            # `Source` of `tuple[Source, ...]`, `PhantomCohort` of `PhantomCohort | None`
            types = (field.annotation, *get_args(field.annotation))
            found = next((kind for kind in types if isinstance(kind, type) and issubclass(kind, BaseModel)), found)
        elif part in kinds or _NO_KEY.fullmatch(part):
            found = kinds.get(part, found)
            continue
        # The short form of a section has its key twice: as the user wrote it, and as that of the section.
        keys += [part] if part.isdecimal() or keys[-1:] != [part] else []
    return keys, found
