"""The section `search`: what is wrong in it is named when the YAML is read."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from studies import small_study, small_tree, write_study

from ssl_ray.config.loading import dump, parse
from ssl_ray.errors import UserError
from ssl_ray.study.experiment import load

FINETUNE: dict[str, Any] = {"grid": {"init": ["random"]}, "steps": 9}
LR = {"finetune.optimizer.lr": {"loguniform": [1e-4, 1e-2]}}


def refusal(folder: Path, search: Mapping[str, Any], **finetune: Any) -> str:
    tree = small_tree(pretrain={"patch_size": 32}, finetune=FINETUNE | finetune) | {"search": dict(search)}
    with pytest.raises(UserError) as caught:
        load(write_study(folder / "study.yaml", tree))
    return str(caught.value)


def test_a_search_survives_dump() -> None:
    """All distributions; ends that YAML reads as text are numbers, and sections may be chosen."""
    chosen = [{"kind": "restoration", "corruption": {"inpaint_boxes": 3}}, {"kind": "masked", "ratio": 0.5}]
    space = {
        "finetune.optimizer.lr": {"loguniform": ["1e-4", 1e-2]},
        "finetune.augmentation.shift": {"uniform": [0, 1]},
        "pretrain.patches_per_volume": {"int": [1, 4]},
        "pretrain.task": {"choice": chosen},
        "pretrain.task.ratio": {"choice": [0.5, 0.75]},
        "init": {"choice": ["random", "pretrained"]},
    }
    study = small_study(pretrain={"patch_size": 32}, finetune={"steps": 9}, search={"space": space, "budget": 2})
    assert study.search
    assert study.search.space["finetune.optimizer.lr"] == {"loguniform": (1e-4, 1e-2)}
    assert parse(dump(study), "again") == study


@pytest.mark.parametrize(
    ("space", "words"),
    [
        ({"finetune.optimiser.lr": {"uniform": [0.1, 1]}}, "did you mean 'finetune.optimizer.lr'?"),
        ({"pretrain.task.ration": {"uniform": [0.1, 0.5]}}, "did you mean 'pretrain.task.ratio'?"),
        ({"zzz": {"int": [1, 2]}}, "search.space.zzz: unknown key"),
        ({"tracking.uri": {"choice": ["a", "b"]}}, "search.space.tracking.uri: unknown key"),
        ({"finetune.cohort.classes": {"int": [2, 3]}}, "is the same for all cells"),
        ({"finetune.runs": {"int": [1, 3]}}, "is the same for all cells"),
        ({"pretrain.task.ratio": {"uniform": [0.1, 0.5]}}, "is read by none of the kinds"),
        ({"finetune.optimizer.lr": {"uniform": [-1, 1]}}, "search.space.finetune.optimizer.lr: -1.0 is refused"),
        ({"network.hidden_size": {"choice": [48, 47]}}, "47 is refused"),
        ({"pretrain.patch_size": {"choice": [16, 20]}}, "20 is refused"),
        ({"pretrain.task.kind": {"choice": ["masked", "mask"]}}, "'mask' is refused"),
        (
            {"pretrain.task.kind": {"choice": ["masked"]}, "pretrain.task.ratio": {"uniform": [0.5, 1.5]}},
            "search.space.pretrain.task.ratio: 1.5 is refused",
        ),
        ({"size": {"choice": [2, 4]}}, "must be a choice out of the grid's [2]"),
        ({"size": {"int": [1, 2]}}, "must be a choice out of the grid's [2]"),
        ({"init": {"choice": ["pretrained"]}}, "must be a choice out of the grid's ['random']"),
    ],
    ids=lambda case: ", ".join(case) if isinstance(case, dict) else "",
)
def test_a_wrong_key_or_value_is_named(tmp_path: Path, space: dict[str, Any], words: str) -> None:
    """With the nearest valid key, or with the rule that the value breaks, also of a kind that is only drawn."""
    message = refusal(tmp_path, {"space": space})
    assert words in message
    assert "study.yaml" in message


@pytest.mark.parametrize(
    ("distribution", "words"),
    [
        ({}, "exactly one of"),
        ({"uniform": [0, 1], "int": [0, 1]}, "exactly one of"),
        ({"choice": []}, "at least one value"),
        ({"choice": [1, 2, 1]}, "none twice"),
        ({"uniform": [1, 0]}, "the lower one first, got [1, 0]"),
        ({"uniform": [0]}, "two numbers"),
        ({"uniform": [0, "much"]}, "two numbers"),
        ({"uniform": [0, ".inf"]}, "two numbers"),
        ({"loguniform": [0, 1]}, "two positive numbers"),
        ({"int": [1, 2.5]}, "two whole numbers"),
        ({"normal": [0, 1]}, "normal"),
    ],
)
def test_a_wrong_distribution_is_named(tmp_path: Path, distribution: dict[str, Any], words: str) -> None:
    message = refusal(tmp_path, {"space": {"finetune.optimizer.lr": distribution}})
    assert words in message
    assert "search.space.finetune.optimizer.lr" in message


@pytest.mark.parametrize(
    ("search", "finetune", "words"),
    [
        ({"space": {}}, {}, "search.space"),
        ({"space": LR, "algorithm": "grid"}, {}, "must be a choice with algorithm grid"),
        ({"space": LR, "scheduler": "asha", "metric": "original_hd95"}, {}, "asha needs one that every validation"),
        ({"space": LR, "metric": "dice"}, {}, "search.metric"),
        ({"space": LR, "sampels": 3}, {}, "did you mean 'samples'?"),
        ({"space": LR}, {"runs": 2}, "finetune.runs: must be 1 in a search"),
        ({"space": LR}, {"grid": {"init": ["random"], "lr": [1e-3]}}, "finetune.grid.lr"),
        ({"space": LR}, {"grid": {"init": ["random", "pretrained"]}}, "one init, unless search.space.init draws it"),
    ],
    ids=["empty", "grid", "asha", "metric", "key", "runs", "rates", "inits"],
)
def test_what_does_not_go_together_is_refused(
    tmp_path: Path, search: dict[str, Any], finetune: dict[str, Any], words: str
) -> None:
    assert words in refusal(tmp_path, search, **finetune)
