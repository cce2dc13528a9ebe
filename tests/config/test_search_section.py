"""The section `search`: what is wrong in it is named when the YAML is read."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError
from studies import small_study, small_tree, write_study

from ssl_ray.config.loading import dump, parse
from ssl_ray.config.search import resolved
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
    """All distributions; numbers that YAML reads as text are numbers."""
    space = {
        "finetune.optimizer.lr": {"loguniform": ["1e-4", 1e-2]},
        "finetune.augmentation.shift": {"uniform": [0, 1]},
        "finetune.optimizer.weight_decay": {"choice": ["1e-5", "1.e2", 1e-4]},
        "pretrain.patches_per_volume": {"int": [1, 4]},
        "pretrain.steps": {"logint": [100, 10_000]},
        "pretrain.task.kind": {"choice": ["restoration", "masked"]},
        "finetune.optimizer.betas": {"choice": [["9e-1", 0.95], [0.9, 0.999]]},
        "pretrain.task.ratio": {"choice": [0.5, 0.75]},
        "init": {"choice": ["random", "pretrained"]},
    }
    study = small_study(pretrain={"patch_size": 32}, finetune={"steps": 9}, search={"space": space, "budget": 2})
    assert study.search
    assert study.search.space["finetune.optimizer.lr"] == {"loguniform": (1e-4, 1e-2)}
    assert study.search.space["finetune.optimizer.weight_decay"] == {"choice": (1e-5, 100.0, 1e-4)}
    assert study.search.space["finetune.optimizer.betas"] == {"choice": ((0.9, 0.95), (0.9, 0.999))}
    assert study.search.space["pretrain.task.kind"] == {"choice": ("restoration", "masked")}
    assert parse(dump(study), "again") == study


@pytest.mark.parametrize(
    ("space", "words"),
    [
        ({"finetune.optimiser.lr": {"uniform": [0.1, 1]}}, "did you mean 'finetune.optimizer.lr'?"),
        ({"pretrain.task.ration": {"uniform": [0.1, 0.5]}}, "did you mean 'pretrain.task.ratio'?"),
        ({"zzz": {"int": [1, 2]}}, "search.space.zzz: not a key that can be searched"),
        ({"tracking.uri": {"choice": ["a", "b"]}}, "search.space.tracking.uri: not a key that can be searched"),
        ({"finetune.cohort.classes": {"int": [2, 3]}}, "not a key that can be searched"),
        ({"finetune.runs": {"int": [1, 3]}}, "not a key that can be searched"),
        ({"pretrain.task": {"choice": ["masked"]}}, "did you mean 'pretrain.task.kind'?"),
        ({"pretrain.task.ratio": {"uniform": [0.1, 0.5]}}, "is read by none of the kinds"),
        ({"finetune.optimizer.lr": {"uniform": [-1, 1]}}, "search.space.finetune.optimizer.lr: -1.0 is refused"),
        ({"network.hidden_size": {"choice": [48, 47]}}, "47 is refused"),
        ({"pretrain.patch_size": {"choice": [16, 20]}}, "20 is refused"),
        ({"pretrain.task.kind": {"choice": ["masked", "mask"]}}, "'mask' is refused"),
        (
            {"pretrain.task.kind": {"choice": ["masked"]}, "pretrain.task.ratio": {"uniform": [0.5, 1.5]}},
            "search.space.pretrain.task.ratio: 1.5 is refused",
        ),
        ({"finetune.encoder.freeze": {"uniform": [1, 8]}}, "int and logint draw whole numbers"),
        ({"pretrain.optimizer.warmup_steps": {"loguniform": [10, 90]}}, "valid integer, got a number with a fract"),
        ({"pretrain.steps": {"loguniform": [100, 10000]}}, "search.space.pretrain.steps: 112.2 is refused"),
        ({"pretrain.steps": {"logint": [0, 10]}}, "one of choice"),
        ({"finetune.cpus_per_trial": {"choice": [1, 2]}}, "not a key that can be searched"),
        ({"pretrain.optimizer.lr": {"loguniform": [1e-4, 1e-2]}}, "pretrain.optimizer.lr: no cell reads it, as none"),
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
    "distribution",
    [
        {},
        {"uniform": [0, 1], "int": [0, 1]},
        {"choice": []},
        {"choice": [1, 2, 1]},
        {"uniform": [1, 0]},
        {"uniform": [0]},
        {"uniform": [0, 1, 2]},
        {"uniform": [0, "much"]},
        {"uniform": [0, [1]]},
        {"uniform": [0, ".inf"]},
        {"loguniform": [0, 1]},
        {"int": [1, 2.5]},
        {"normal": [0, 1]},
    ],
)
def test_a_wrong_distribution_is_named(tmp_path: Path, distribution: dict[str, Any]) -> None:
    message = refusal(tmp_path, {"space": {"finetune.optimizer.lr": distribution}})
    assert ("one of choice" in message) or "normal" in distribution
    assert "search.space.finetune.optimizer.lr" in message


@pytest.mark.parametrize(
    ("search", "finetune", "words"),
    [
        ({"space": {}}, {}, "search.space"),
        ({"space": LR, "algorithm": "grid"}, {}, "with algorithm grid, every key must have a choice"),
        ({"space": LR, "scheduler": "asha", "metric": "original_hd95"}, {}, "asha needs one that every validation"),
        ({"space": LR, "metric": "dice"}, {}, "search.metric"),
        ({"space": LR, "metric": "original_hd95", "mode": "max"}, {}, "mode: of original_hd95 the best is the min"),
        ({"space": LR, "mode": "min"}, {}, "mode: of dice_foreground the best is the max, got min"),
        ({"space": LR, "sampels": 3}, {}, "did you mean 'samples'?"),
        ({"space": LR}, {"runs": 2}, "a search has one run"),
        ({"space": LR}, {"grid": {"init": ["random"], "lr": [1e-3]}}, "grid.lr (0.001,)"),
        ({"space": LR}, {"cohort": {"splits": None, "pool": "pool.json", "sizes": [2], "folds": 3}}, "cohort.folds 3"),
        (
            {"space": LR},
            {"grid": {"init": ["random", "pretrained"]}},
            "search.space.init: must be a choice out of the grid's",
        ),
    ],
    ids=["empty", "grid", "asha", "metric", "far is bad", "overlap is good", "key", "runs", "rates", "folds", "inits"],
)
def test_what_does_not_go_together_is_refused(
    tmp_path: Path, search: dict[str, Any], finetune: dict[str, Any], words: str
) -> None:
    assert words in refusal(tmp_path, search, **finetune)


def test_a_contrastive_loss_may_be_searched_over_workers() -> None:
    """Its negatives are a worker's own patches; no other result depends on their number."""
    pretrain = {"patch_size": 32, "task": {"contrastive": {"enabled": True}}}
    space = {"pretrain.workers": {"choice": [1, 2]}}
    tuned = FINETUNE | {"grid": {"init": ["pretrained"]}}
    assert small_study(pretrain=pretrain, finetune=tuned, search={"space": space}).search


def test_of_a_distance_the_lowest_is_the_best() -> None:
    """Unless it is said, as if it were said."""
    for metric, mode in (("original_hd95", "min"), ("original_surface_dice", "max")):
        study = small_study(pretrain={"patch_size": 32}, finetune=FINETUNE, search={"space": LR, "metric": metric})
        assert study.search
        assert study.search.mode == mode
        assert parse(dump(study), "again") == study


def test_a_value_is_refused_only_where_it_fits_with_nothing_that_may_be_drawn(tmp_path: Path) -> None:
    """A DynUNet takes no patch of 32 and no pretrained weights, but some cells have neither."""
    space: dict[str, Any] = {
        "network.kind": {"choice": ["unetr", "dynunet"]},
        "finetune.patch_size": {"choice": [32, 64]},
        "init": {"choice": ["random", "pretrained"]},
    }
    grid = {"grid": {"init": ["random", "pretrained"]}, "patch_size": 32}
    small_study(pretrain={"patch_size": 32}, finetune=FINETUNE | grid, search={"space": space})
    del space["finetune.patch_size"]
    message = refusal(tmp_path, {"space": space}, **grid)
    assert "search.space.network.kind: 'dynunet' is refused" in message


@pytest.mark.parametrize("kind", ["unetr", "primus", "dynunet"])
def test_a_cell_is_checked_as_an_experiment_of_its_own(kind: str) -> None:
    """What does not fit the network that a cell has is refused, whatever the experiment's own network takes."""
    study = small_study(pretrain={"patch_size": 32}, finetune=FINETUNE, search={"space": LR})
    values = {"size": 2, "init": "random", "network.kind": kind, "finetune.patch_size": 24}
    if kind == "primus":
        assert resolved(study, values).network.kind == kind
    else:
        with pytest.raises(ValidationError, match=r"finetune\.patch_size"):
            resolved(study, values)
