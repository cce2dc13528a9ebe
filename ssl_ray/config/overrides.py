"""Dotted keys of a section, e.g. `pretrain.optimizer.lr`: which there are, and a section with other values of some."""

from collections.abc import Iterator, Mapping
from typing import Any, TypeVar, get_args

from pydantic import BaseModel

S = TypeVar("S", bound=BaseModel)


def keys(section: type[BaseModel], prefix: str = "") -> Iterator[str]:
    """The dotted key of every value in a section, whatever kinds its parts may be of."""
    for name, field in section.model_fields.items():
        inner = sections(field.annotation)
        yield from (key for part in inner for key in keys(part, f"{prefix}{name}."))
        if not inner:
            yield f"{prefix}{name}"


def changed(section: S, values: Mapping[str, Any]) -> S:
    """The section with other values of some dotted keys, validated, e.g. `{"optimizer.lr": 2e-4}`.

    A `kind` that is not the section's comes with that kind's defaults. Keys that the kinds chosen lack are left out.
    """
    return type(section).model_validate(placed(section, values)[0])


def placed(section: BaseModel, values: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """The section's tree with the values in it, and those of the values that found a place there."""
    tree, found = section.model_dump(), {}
    for key in sorted(values, key=lambda key: not key.endswith(".kind")):  # the kind says which other keys there are
        *parents, last = key.split(".")
        node, model = tree, type(section)
        for part in parents:
            if part not in model.model_fields or not (known := sections(model.model_fields[part].annotation)):
                break
            node[part] = node = node.get(part) or {}
            model = next((one for one in known if node.get("kind") in kinds(one)), known[0])
        else:
            if last == "kind" and node.get("kind") != values[key]:
                node.clear()
            if last in model.model_fields:
                node[last] = found[key] = values[key]
    return tree, found


def sections(annotation: Any) -> list[type[BaseModel]]:
    """The sections that a field of this type may hold: `Source` of `tuple[Source, ...]`, every one of a union."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [section for part in get_args(annotation) for section in sections(part)]


def kinds(section: type[BaseModel]) -> tuple[str, ...]:
    """What `kind` says where this section is meant, if it is one of several kinds."""
    return get_args(section.model_fields["kind"].annotation) if "kind" in section.model_fields else ()
