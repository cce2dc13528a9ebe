"""What a search draws, and that it goes on from its journal as if it had never been killed."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import optuna
import pytest
from studies import small_study

from ssl_ray.config.schema import Search, Study
from ssl_ray.search.cells import JOURNAL, Cell
from ssl_ray.search.proposals import Proposals
from ssl_ray.storage.mirror import Mirror

SPACE: dict[str, Any] = {
    "finetune.optimizer.lr": {"loguniform": [1e-4, 1e-2]},
    "pretrain.task.kind": {"choice": ["restoration", "masked"]},
    "pretrain.task.ratio": {"uniform": [0.5, 0.8]},
    "pretrain.patches_per_volume": {"int": [1, 3]},
}
BASE = Cell.of(2, "random", 1e-3)


def study(search: Mapping[str, Any]) -> Study:
    finetune = {"grid": {"init": ["random"]}, "steps": 900, "validate_every": 100}
    return small_study(pretrain={"patch_size": 32}, finetune=finetune, search=dict(search))


def proposals(folder: Path, seed: int = 0, **search: Any) -> Proposals:
    made = study({"space": SPACE, "samples": 8} | search)
    assert isinstance(made.search, Search)
    return Proposals(made.search, BASE, made.unsearched, folder / JOURNAL, Mirror(folder), "name", seed, 100)


def score(cell: Cell) -> float:
    """Better for a larger learning rate, and for restoration."""
    return cell.lr * 100 - 0.1 * (cell.settings["pretrain.task.kind"] == "masked")


def carried_out(open_again: Callable[[], Proposals], killed: bool) -> list[tuple[Cell, list[tuple[int, bool]]]]:
    """Train every cell that is drawn to its end or its stop; `killed` opens the journal again before every call."""
    found = []
    one = open_again()

    def now() -> Proposals:
        nonlocal one
        one = open_again() if killed else one
        return one

    while cell := now().draw():
        assert now().begin(cell, json.dumps(cell.overrides))
        decisions = []
        for step in range(100, 1000, 100):
            stopped = now().report(cell, step, score(cell) * step / 900)
            decisions.append((step, stopped))
            if stopped:
                break
        now().end(cell, None if decisions[-1][1] else score(cell), stopped=decisions[-1][1])
        found.append((cell, decisions))
    return found


@pytest.mark.parametrize("algorithm", ["random", "optuna"])
def test_a_search_that_is_killed_everywhere_goes_on_as_if_nothing_had_happened(tmp_path: Path, algorithm: str) -> None:
    """The same cells, the same scores and the same ones stopped at the same rungs, whatever had to be read back."""
    options: dict[str, Any] = {"algorithm": algorithm, "scheduler": "asha", "samples": 14}
    for name in ("whole", "killed"):
        (tmp_path / name).mkdir()
    whole = carried_out(lambda: proposals(tmp_path / "whole", **options), killed=False)
    killed = carried_out(lambda: proposals(tmp_path / "killed", **options), killed=True)
    assert killed == whole
    assert len({cell for cell, _ in whole}) == 14
    assert proposals(tmp_path / "whole", seed=1, **options).draw() is None, "enough were drawn"
    counts = proposals(tmp_path / "killed", **options).counts()
    assert counts == {
        "finished": sum(not decisions[-1][1] for _, decisions in whole),
        "stopped": sum(decisions[-1][1] for _, decisions in whole),
        "failed": 0,
        "unfinished": 0,
    }


def test_successive_halving_stops_the_worse_ones(tmp_path: Path) -> None:
    """At 100, 300 and 900 steps only, and never the best one so far."""
    found = carried_out(lambda: proposals(tmp_path, scheduler="asha", samples=18, algorithm="random"), killed=False)
    stops = [decisions[-1][0] for _, decisions in found if decisions[-1][1]]
    assert set(stops) <= {100, 300, 900}
    assert len(stops) > 9
    best = -1.0
    for cell, decisions in found:
        if score(cell) > best:
            best = score(cell)
            assert not any(stopped for _, stopped in decisions), cell.name
    without = carried_out(lambda: proposals(tmp_path / "none", samples=6), killed=False)
    assert not any(stopped for _, decisions in without for _, stopped in decisions)


def test_cells_are_within_the_space_and_have_what_they_read(tmp_path: Path) -> None:
    """A key that the kind does not read is no part of the cell, as is not what the space leaves to the experiment."""
    one = proposals(tmp_path, algorithm="random", samples=30)
    drawn = list(iter(one.draw, None))
    assert len(set(drawn)) == 30
    kinds = {cell.settings["pretrain.task.kind"] for cell in drawn}
    assert kinds == {"restoration", "masked"}
    for cell in drawn:
        settings = cell.settings
        assert 1e-4 <= cell.lr <= 1e-2
        assert float(f"{cell.lr:.4g}") == cell.lr
        assert settings["pretrain.patches_per_volume"] in (1, 2, 3)
        assert ("pretrain.task.ratio" in settings) == (settings["pretrain.task.kind"] == "masked")
        own = cell.experiment(study({"space": SPACE}).unsearched)
        assert (own.pretrain.task.kind, own.finetune.optimizer.lr) == (settings["pretrain.task.kind"], cell.lr)
    assert set(one.open) == set(drawn) == set(proposals(tmp_path, algorithm="random", samples=30).open)


def test_another_seed_draws_other_cells(tmp_path: Path) -> None:
    first = [proposals(tmp_path / str(seed), seed=seed, algorithm="random").draw() for seed in (0, 0, 1)]
    assert first[1] is not None
    assert first[1] != first[0], "the second one of the same journal"
    (tmp_path / "again").mkdir()
    again = proposals(tmp_path / "again", algorithm="random").draw()
    assert again == first[0] != first[2]


def test_a_grid_is_every_combination_once(tmp_path: Path) -> None:
    """In the order of the space, also where it is begun again; whole sections may be chosen."""
    tasks = [{"kind": "restoration"}, {"kind": "masked", "ratio": 0.5}]
    space = {"pretrain.task": {"choice": tasks}, "finetune.optimizer.lr": {"choice": [1e-3, 1e-2]}}
    drawn = []
    for _ in range(6):
        if cell := proposals(tmp_path, algorithm="grid", space=space, samples=1).draw():
            drawn.append((cell.settings["pretrain.task.kind"], cell.settings.get("pretrain.task.ratio"), cell.lr))
    assert drawn == [
        (kind, ratio, lr) for kind, ratio in (("restoration", None), ("masked", 0.5)) for lr in (1e-3, 1e-2)
    ]


@pytest.mark.parametrize(
    ("ended", "status"), [({"value": 0.5}, "finished"), ({"stopped": True}, "stopped"), ({}, "failed")]
)
def test_what_was_trained_is_not_trained_again(tmp_path: Path, ended: dict[str, Any], status: str) -> None:
    """Another cell of the same key ends as the first one did."""
    one = proposals(tmp_path)
    first, second = one.draw(), one.draw()
    assert first
    assert second
    assert one.begin(first, "key")
    one.report(first, 100, 0.4)
    one.end(first, **ended)
    assert not one.begin(second, "key")
    assert not one.open
    assert one.counts()[status] == 2


def test_what_is_being_trained_is_not_begun_a_second_time(tmp_path: Path) -> None:
    """The cell that came first goes on."""
    one = proposals(tmp_path)
    first, second = one.draw(), one.draw()
    assert first
    assert second
    assert one.begin(first, "key")
    assert not one.begin(second, "key")
    again = proposals(tmp_path)
    assert list(again.open) == [first]
    assert again.begin(first, "key")


def test_a_score_that_is_told_again_changes_nothing(tmp_path: Path) -> None:
    """A trial that goes on from a checkpoint repeats its records."""
    one = proposals(tmp_path, scheduler="asha")
    cell = one.draw()
    assert cell
    assert one.begin(cell, "key")
    assert not one.report(cell, 100, 0.4)
    assert not proposals(tmp_path, scheduler="asha").report(cell, 100, 0.1)
    one.end(cell, 0.4)
    (trial,) = one._study.trials
    assert trial.intermediate_values == {100: 0.4}


@pytest.mark.parametrize("torn", [b'{"op_code": 7, "tri', b""])
def test_a_journal_that_was_cut_off_is_read(tmp_path: Path, torn: bytes) -> None:
    """A half line is no record, and a lock is nobody's any more."""
    one = proposals(tmp_path)
    cell = one.draw()
    with (tmp_path / JOURNAL).open("ab") as file:
        file.write(torn)
    (tmp_path / f"{JOURNAL}.lock").symlink_to(tmp_path / JOURNAL)
    again = proposals(tmp_path)
    assert list(again.open) == [cell]
    assert again.draw()
    assert len(proposals(tmp_path).open) == 2


def test_a_draw_that_was_cut_off_is_completed(tmp_path: Path) -> None:
    """Optuna writes a trial before its values, one by one."""
    one = proposals(tmp_path)
    trial = one._study.ask()
    trial.suggest_float("finetune.optimizer.lr", 1e-4, 1e-2, log=True)
    (cell,) = proposals(tmp_path).open
    assert cell.settings.keys() >= {"finetune.optimizer.lr", "pretrain.task.kind", "pretrain.patches_per_volume"}
    assert cell.lr == pytest.approx(trial.params["finetune.optimizer.lr"], rel=1e-3)
    assert list(proposals(tmp_path).open) == [cell]


def test_the_budget_is_of_all_restarts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = 1000.0
    monkeypatch.setattr("time.monotonic", lambda: now)
    one = proposals(tmp_path, budget=1.0)
    now += 1800
    assert one.left == 1800
    one.draw()
    now += 5000  # nobody works on it
    again = proposals(tmp_path, budget=1.0)
    assert again.left == 1800
    now += 1801
    assert again.left < 0
    assert proposals(tmp_path, budget=2.0).left == 5400
    assert proposals(tmp_path).left == float("inf")


def test_optuna_learns_from_what_is_known(tmp_path: Path) -> None:
    """Late cells are better than early ones, which were drawn at random."""
    found = [score(cell) for cell, _ in carried_out(lambda: proposals(tmp_path, samples=40), killed=False)]
    assert sum(found[-15:]) / 15 > sum(found[:10]) / 10
    assert optuna.__version__ >= "5"
