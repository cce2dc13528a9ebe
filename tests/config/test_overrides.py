"""Values by dotted key, also where a section is one of several kinds."""

from typing import Annotated, Any, Literal

import pytest
from pydantic import BaseModel, Field, ValidationError
from studies import small_study

from ssl_ray.config.overrides import changed, keys, placed
from ssl_ray.config.schema import Study


class Square(BaseModel, extra="forbid"):
    kind: Literal["square"] = "square"
    side: float = Field(1.0, gt=0)
    colour: str = "red"


class Corner(BaseModel, extra="forbid"):
    angle: float = 90.0


class Triangle(BaseModel, extra="forbid"):
    kind: Literal["triangle"] = "triangle"
    base: float = 2.0
    corner: Corner = Corner()


class Page(BaseModel, extra="forbid"):
    shape: Annotated[Square | Triangle, Field(discriminator="kind")] = Square()
    width: int = 10


def test_keys_are_those_of_every_kind() -> None:
    expected = ["shape.kind", "shape.side", "shape.colour", "shape.kind", "shape.base", "shape.corner.angle", "width"]
    assert list(keys(Page)) == expected
    assert {"finetune.optimizer.lr", "network.hidden_size", "pretrain.optimizer.schedule"} <= set(keys(Study))


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({"width": 3}, {"width": 3, "shape": {"kind": "square", "side": 5.0, "colour": "blue"}}),
        ({"shape.side": 2.0}, {"width": 10, "shape": {"kind": "square", "side": 2.0, "colour": "blue"}}),
        ({"shape.kind": "square"}, {"width": 10, "shape": {"kind": "square", "side": 5.0, "colour": "blue"}}),
        (
            {"shape.base": 7.0, "shape.kind": "triangle", "shape.side": 2.0},
            {"width": 10, "shape": {"kind": "triangle", "base": 7.0, "corner": {"angle": 90.0}}},
        ),
        (
            {"shape.corner.angle": 30.0, "shape.kind": "triangle"},
            {"width": 10, "shape": {"kind": "triangle", "base": 2.0, "corner": {"angle": 30.0}}},
        ),
    ],
    ids=lambda case: ", ".join(case),
)
def test_another_kind_has_its_own_defaults(values: dict[str, Any], expected: dict[str, Any]) -> None:
    """The kind that is there keeps what it has; what a kind does not read is left out, whatever the order."""
    page = Page(shape=Square(side=5.0, colour="blue"))
    assert changed(page, values).model_dump() == expected
    assert page.shape.model_dump() == {"kind": "square", "side": 5.0, "colour": "blue"}


def test_only_what_is_read_is_named() -> None:
    values = {"shape.side": 2.0, "shape.base": 7.0, "width": 3}
    assert placed(Page(), values)[1] == {"shape.side": 2.0, "width": 3}
    other = {"shape.kind": "triangle"}
    assert placed(Page(), values | other)[1] == {"shape.base": 7.0, "width": 3} | other


def test_a_wrong_value_is_refused() -> None:
    with pytest.raises(ValidationError, match="greater than 0"):
        changed(Page(), {"shape.side": -1.0})


def test_a_whole_experiment_is_changed() -> None:
    """Every section of it, with the checks across sections."""
    study = small_study()
    other = changed(study, {"finetune.optimizer.betas": (0.8, 0.9), "network.hidden_size": 96, "pretrain.epochs": 3})
    assert (other.finetune.optimizer.betas, other.network.hidden_size, other.pretrain.epochs) == ((0.8, 0.9), 96, 3)
    assert other.finetune.cohort == study.finetune.cohort
    with pytest.raises(ValidationError, match="multiple of num_heads"):
        changed(study, {"network.hidden_size": 47})
