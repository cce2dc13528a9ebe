"""Cells: what the grid is made of, what each is trained with and on, and what its key depends on."""

import itertools
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from studies import small_study

from ssl_ray.config import depends
from ssl_ray.config.search import resolved
from ssl_ray.data.datalist import Case
from ssl_ray.data.splits import Splits
from ssl_ray.data.store import Volume
from ssl_ray.finetune.job import TrialJob
from ssl_ray.pretrain.driver import Pretrained
from ssl_ray.search.cells import Cell, cells
from ssl_ray.search.grid import trial_jobs
from ssl_ray.storage.folders import Folders


def volume(name: str) -> Volume:
    matrix = ((1.0, 0.0, 0.0, 0.0),) * 4
    shape, spacing = (16, 16, 16), (9.0, 9.0, 9.0)
    return Volume(name, name, name, name, "", shape, spacing, matrix, "uint8", 255, 1, {}, (), (), shape, {}, 1, {})


def case(name: str, subject: str = "") -> Case:
    return Case(name, Path(name), Path(name), subject)


POOL = [case(f"scan{n}", f"patient{n // 2}") for n in range(16)]
"""Two scans of each of eight patients."""


def pool(cases: list[Case]) -> Splits:
    return Splits({8: tuple(cases)}, (case("v"),), (case("t"),), ("organ",), pool=True)


def jobs(
    finetune: Mapping[str, Any], splits: Splits, weights: int = 1, bad: str = "", **study: Any
) -> tuple[str, dict[Cell, TrialJob]]:
    made = small_study(finetune=dict(finetune), **study)
    config = made.finetune
    volumes = {str(one.image): volume(str(one.image)) for one in splits.cases if one.id != bad}
    pretrained = [Pretrained(Path(f"w{number}"), f"weights {number}") for number in range(weights)]
    return trial_jobs(config, made.network, made.seed, splits, volumes, pretrained, Folders.of("s", "/nowhere"))


LISTS = Splits({2: (case("a"), case("b")), 4: tuple(map(case, "abcd"))}, (case("v"),), (case("t"),), ("organ",))
GRID: dict[str, Any] = {"cohort": {"splits": {2: "2.json", 4: "4.json"}}}


def keys(changes: Mapping[str, Any] | None = None, weights: int = 1, **study: Any) -> dict[str, str]:
    made = jobs({**GRID, **(changes or {})}, LISTS, weights, **study)[1]
    return {cell.name: job.key for cell, job in made.items()}


def test_a_cell_is_a_value() -> None:
    """Equal overrides are one cell; the name tells all of them apart, and the settings are the cell's own."""
    more = {"finetune.augmentation.shift": 0.2, "pretrain.epochs": 7}
    cell = Cell.of(6, "pretrained", 1e-4, 2, **more)
    assert {cell: 1}[Cell.of(6, "pretrained", 1e-4, 2, **dict(reversed(more.items())))] == 1
    assert (cell.size, cell.init, cell.lr, cell.run) == (6, "pretrained", 1e-4, 2)
    assert Cell.of(6, "pretrained", 1e-4).name == "n06-pretrained-lr0.0001-run0"
    assert cell.name == "n06-pretrained-lr0.0001-shift0.2-epochs7-run2"
    assert cell.name != Cell.of(6, "pretrained", 1e-4, 2, **(more | {"pretrain.epochs": 8})).name
    assert cell.settings == Cell.of(6, "random", 1e-4, 2, **more).settings
    applied = cell.apply(small_study().finetune)
    assert (applied.optimizer.lr, applied.augmentation.shift, applied.augmentation.flip_prob) == (1e-4, 0.2, 0.1)


def test_a_cell_is_an_experiment() -> None:
    """With any keys of it changed, and no other cell in its grid: the very one that a study of its own would train."""
    study = small_study(finetune={**GRID, "primary": 4})
    cell = Cell.of(2, "random", 2e-3, **{"network.feature_size": 8, "pretrain.epochs": 7})
    own = resolved(study, dict(cell.overrides))
    assert (own.network.feature_size, own.pretrain.epochs, own.finetune.optimizer.lr) == (8, 7, 2e-3)
    assert cells(own.finetune) == [Cell.of(2, "random", 2e-3)]
    assert own.seed == study.seed


def test_the_folder_of_a_cell_can_be_made_whatever_is_searched(tmp_path: Path) -> None:
    """Fifteen keys with long values, and one with a path: its name is cut there, and stays whole for people."""
    searched = {f"finetune.augmentation.some_key_{number}": 0.123456789 for number in range(15)}
    for more in ({}, searched, {"pretrain.weights": "from/elsewhere.safetensors"}):
        cell = Cell.of(6, "random", 1e-4, **more)
        assert cell.file_name == cell.name.replace("/", "_")[:246]
        folder = tmp_path / f"{cell.file_name}-01234567"
        folder.mkdir()
        assert folder.parent == tmp_path
        assert (cell.file_name == cell.name) == (not more)
    assert "some_key_14" in Cell.of(6, "random", 1e-4, **searched).name


def test_the_grid_is_every_combination_in_every_run() -> None:
    """Without rates of its own, it has the optimizer's."""
    changes = {**GRID, "runs": 3, "optimizer": {"lr": 5e-4}}
    config = small_study(finetune=changes).finetune
    assert len(cells(config)) == len(set(cells(config))) == 2 * 2 * 3
    assert {cell.lr for cell in cells(config)} == {5e-4}
    assert {job.config.optimizer.lr for job in jobs(changes, LISTS)[1].values()} == {5e-4}


def test_the_arms_of_a_pair_share_seed_and_draw() -> None:
    """Runs differ in both; only the pretrained arm has weights, with one pretraining or with one for each run.

    And the arms share what settles their precision.
    """
    for weights in (1, 3):
        made = jobs({"cohort": {"splits": None, "pool": "p", "sizes": [2, 4]}, "runs": 3}, pool(POOL), weights)[1]
        pairs: dict[tuple[int, float, int], list[TrialJob]] = {}
        for cell, job in made.items():
            pairs.setdefault((cell.size, cell.lr, cell.run), []).append(job)
            start = f"w{cell.run if weights > 1 else 0}" if cell.init == "pretrained" else None
            assert job.weights == (start and Path(start))
        assert len(pairs) == 6
        for random, pretrained in pairs.values():
            assert (random.seed, random.data.training) == (pretrained.seed, pretrained.data.training)
            assert random.settled == pretrained.settled != random.folder
        assert len({job.settled for job in made.values()}) == 6
        assert len({job.seed for job in made.values()}) == 3
        assert len({tuple(one.id for one in job.data.training) for cell, job in made.items() if cell.size == 4}) == 3


def test_draws_are_of_subjects_and_nested() -> None:
    """A draw holds all scans of its patients, a larger one holds the smaller ones, and runs and seeds differ."""
    splits, usable = pool(POOL), {str(one.image) for one in POOL}
    places = itertools.product(range(1, 9), (0, 1), (0, 1))
    draws = {(n, seed, run): splits.draw(n, seed, run, usable) for n, seed, run in places}
    for (n, seed, run), drawn in draws.items():
        assert len({one.subject for one in drawn}) == n
        assert len(drawn) == 2 * n
        assert set(drawn) <= set(draws[min(8, n + 1), seed, run])
    assert len({draws[4, seed, run] for seed in (0, 1) for run in (0, 1)}) == 4
    assert set(draws[8, 0, 0]) == set(draws[8, 1, 1]) == set(POOL)


def test_a_draw_depends_on_subjects_alone() -> None:
    """Not on the order of the list; a patient who cannot be used makes room for the next and moves no other."""
    usable = {str(one.image) for one in POOL}
    drawn = pool(POOL).draw(4, 0, 1, usable)
    assert set(pool(POOL[::-1]).draw(4, 0, 1, usable)) == set(drawn)
    lost = {str(one.image) for one in POOL if one.subject == drawn[0].subject}
    less = pool(POOL).draw(4, 0, 1, usable - lost)
    assert len({one.subject for one in less}) == 4
    assert {one for one in drawn if str(one.image) not in lost} <= set(less)


def test_published_splits_are_the_same_in_all_runs() -> None:
    """A bad volume is left out of its split."""
    assert LISTS.draw(2, 0, 0, "abcd") == LISTS.draw(2, 1, 5, "abcd") == (case("a"), case("b"))
    assert LISTS.draw(2, 0, 0, "bcd") == (case("b"),)


@pytest.mark.parametrize(
    "changes",
    [
        {"sliding_window_batch": 1},
        {"precision": "float32", "gpus_per_trial": 1},
        {"cpus_per_trial": 3, "max_concurrent_trials": 1, "compile": True},
        {"cohort": {"splits": GRID["cohort"]["splits"], "root": "/moved"}},
        {"margin": 0.05, "primary": 4, "weights": "moved.safetensors"},
        {"optimizer": {"lr": 7e-4, "weight_decay": 1e-5}, "grid": {"lr": [1e-4]}},
    ],
    ids=lambda changes: ", ".join(changes),
)
def test_what_a_trial_does_not_depend_on_is_not_in_its_key(changes: dict[str, Any]) -> None:
    """Memory, devices, places and the report's settings; the optimizer's rate where the grid has its own."""
    assert keys(changes) == keys()


@pytest.mark.parametrize("device", [0, 1])
def test_a_key_holds_the_setting_auto(device: int) -> None:
    """Whatever it comes to: `gpus_per_trial` changes no key."""
    auto = {"precision": "auto"}
    assert keys(auto | {"gpus_per_trial": device}) == keys(auto)
    assert set(keys(auto).values()).isdisjoint(keys().values())


def test_a_wider_grid_keeps_the_keys_it_had() -> None:
    """More rates, runs, sizes and pretrainings leave the cells that there are, and the grid's own key."""
    before = keys()
    wider = keys({"runs": 3, "grid": {"lr": [1e-4, 1e-3]}}, 3)
    assert before.items() <= wider.items()
    assert len(set(wider.values())) == len(wider) == 24
    assert jobs(GRID, LISTS)[0] == jobs(GRID | {"runs": 3, "grid": {"lr": [1e-3]}}, LISTS, 3)[0]


def test_what_a_trial_depends_on_is_in_its_key(monkeypatch: pytest.MonkeyPatch) -> None:
    """Settings, the network, the study's seed (beyond run 0, which has it as it is), volumes and the code's version."""
    before = set(keys().values())
    changes: list[dict[str, Any]] = [{"steps": 7}, {"augmentation": {"shift": 0.3}}, {"surface_tolerance": 1}]
    for other in (*(keys(change) for change in changes), keys(seed=1), keys(network={"feature_size": 8})):
        assert before.isdisjoint(other.values())
    less = {cell.name: job.key for cell, job in jobs(GRID, LISTS, bad="c")[1].items()}
    assert {name for name, key in less.items() if key not in before} == {name for name in less if "n04" in name}
    monkeypatch.setitem(depends.VERSION, "finetune", 99)
    assert before.isdisjoint(keys().values())


FOLDED: dict[str, Any] = {"cohort": {"splits": None, "pool": "p", "sizes": [2, 4], "folds": 4}, "runs": 2}
WHOLE = Splits({8: tuple(POOL)}, (), (), ("organ",), pool=True, folds=4)


def test_a_run_in_folds_is_a_cell_for_each() -> None:
    """The arms of a fold share seed and volumes; the folds of a run share the seed, and score every scan once."""
    made = jobs(FOLDED, WHOLE)[1]
    assert len(made) == len({job.key for job in made.values()}) == 2 * 2 * 2 * 4
    by_fold: dict[tuple[int, int, int | None], list[TrialJob]] = {}
    for cell, job in made.items():
        by_fold.setdefault((cell.size, cell.run, cell.fold), []).append(job)
        assert cell.name.endswith(f"-run{cell.run}-fold{cell.fold}")
        assert "fold" not in cell.settings
    for random, pretrained in by_fold.values():
        assert (random.seed, random.data) == (pretrained.seed, pretrained.data)
    for size, run in itertools.product((2, 4), (0, 1)):
        folds = [by_fold[size, run, fold][0] for fold in range(4)]
        assert len({job.seed for job in folds}) == len({job.settled for job in folds}) == 1
        assert sorted(one.id for job in folds for one in job.data.test) == sorted(one.id for one in POOL)
    unfolded = {**FOLDED, "cohort": {**FOLDED["cohort"], "folds": None}}
    assert {replace(cell, fold=None) for cell in made} == set(jobs(unfolded, pool(POOL))[1])


def test_another_number_of_folds_is_another_grid() -> None:
    """Cells of the same names would be others."""
    other = jobs({**FOLDED, "cohort": {**FOLDED["cohort"], "folds": 5}}, replace(WHOLE, folds=5))
    assert other[0] != jobs(FOLDED, WHOLE)[0]


def test_the_control_starts_from_the_pretrained_weights() -> None:
    """Under a key of its own; those of the other arms are as without it."""
    before, arms = keys(), {"grid": {"init": ["random", "pretrained", "permuted"]}}
    made = jobs({**GRID, **arms}, LISTS)[1]
    assert before.items() <= {cell.name: job.key for cell, job in made.items()}.items()
    for cell, job in made.items():
        assert job.permuted == (cell.init == "permuted")
        assert (job.weights is None) == (cell.init == "random")
    assert len({job.key for job in made.values()}) == len(made)


@pytest.mark.parametrize("freeze", ["none", 5, "all"])
def test_what_a_frozen_encoder_does_not_read_is_not_in_the_key(freeze: Any) -> None:
    """Its learning rates, where it is never trained."""
    one, other = (keys({"encoder": {"freeze": freeze, "layer_decay": decay}}) for decay in (1.0, 0.7))
    assert (one == other) == (freeze == "all")
    assert set(one.values()).isdisjoint(keys().values()) == (freeze != "none")
