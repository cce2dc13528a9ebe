"""What a search draws, and that it goes on from its journal as if it had never been killed."""

import json
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from optuna.trial import Trial, TrialState
from studies import small_study

from ssl_ray.config.schema import Study
from ssl_ray.config.search import resolved
from ssl_ray.search.cells import JOURNAL, Cell
from ssl_ray.search.proposals import Proposals
from ssl_ray.storage.mirror import Mirror

SPACE: dict[str, Any] = {
    "finetune.optimizer.lr": {"loguniform": [1e-4, 1e-2]},
    "pretrain.task.kind": {"choice": ["restoration", "masked"]},
    "pretrain.task.ratio": {"uniform": [0.5, 0.8]},
    "pretrain.patches_per_volume": {"int": [1, 3]},
}


def study(inits: Sequence[str] = ("pretrained",), **search: Any) -> Study:
    """Trials of 900 steps, whose first rung is at 100."""
    finetune = {"grid": {"init": list(inits)}, "steps": 900, "validate_every": 100}
    search = {"space": SPACE, "samples": 8} | search
    return small_study(pretrain={"patch_size": 32}, finetune=finetune, search=search)


def proposals(folder: Path, name: str = "name", **options: Any) -> Proposals:
    own = study(**options)
    assert own.search
    return Proposals(own.search, own.finetune, own, folder / JOURNAL, Mirror(folder), name)


def drawn(one: Proposals) -> list[tuple[Trial, Cell]]:
    return [(trial, one.cell(trial)) for trial in iter(one.draw, None)]


def record(cell: Cell, step: int, score: float) -> dict[str, Any]:
    """What Ray Tune gets of a validation."""
    job = SimpleNamespace(config=SimpleNamespace(steps=900))
    metrics = {"validation/dice_foreground": score, "lr": 1.0}
    return {"step": step, "metrics": metrics, "config": {"cell": cell, "job": job}}


def result(score: float) -> dict[str, float]:
    return {"selected/validation/dice_foreground": score}


def score(cell: Cell) -> float:
    """Better for a larger learning rate, and for restoration."""
    return cell.lr * 100 - 0.1 * (cell.settings["pretrain.task.kind"] == "masked")


def carried_out(open_again: Callable[[], Proposals], killed: bool) -> list[tuple[Cell, list[tuple[int, bool]]]]:
    """Train every cell that is drawn to its end or its stop; `killed` opens the journal again before every call."""
    found, one = [], open_again()

    def now() -> Proposals:
        nonlocal one
        if killed:
            one = open_again()
            for trial in one.unfinished():
                assert one.begin(trial, one.cell(trial), json.dumps(one.cell(trial).overrides))
        return one

    while trial := now().draw():
        cell = one.cell(trial)
        assert one.begin(trial, cell, json.dumps(cell.overrides))
        decisions = []
        for step in range(100, 1000, 100):
            stopped = now().stop("", record(cell, step, score(cell) * step / 900))
            decisions.append((step, stopped))
            if stopped:
                break
        now().tell(cell, {} if decisions[-1][1] else result(score(cell)))
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
    assert proposals(tmp_path / "whole", **options).draw() is None, "enough were drawn"
    counts = proposals(tmp_path / "killed", **options).counts()
    stopped = sum(decisions[-1][1] for _, decisions in whole)
    assert counts == {"finished": 14 - stopped, "stopped": stopped}


def test_successive_halving_stops_the_worse_ones(tmp_path: Path) -> None:
    """At 100 and 300 steps only, never the best one so far, and none at its last step, which is a rung, too."""
    found = carried_out(lambda: proposals(tmp_path, scheduler="asha", samples=18, algorithm="random"), killed=False)
    stops = [decisions[-1][0] for _, decisions in found if decisions[-1][1]]
    assert set(stops) <= {100, 300}
    assert len(stops) > 9
    best = -1.0
    for cell, decisions in found:
        if score(cell) > best:
            best = score(cell)
            assert not any(stopped for _, stopped in decisions), cell.name
    (tmp_path / "none").mkdir()
    without = carried_out(lambda: proposals(tmp_path / "none", samples=6), killed=False)
    assert not any(stopped for _, decisions in without for _, stopped in decisions)


def test_records_without_a_score_stop_nothing(tmp_path: Path) -> None:
    one = proposals(tmp_path, scheduler="asha")
    (first, good), (second, bad), *_ = drawn(one)
    assert one.begin(first, good, "good")
    assert one.begin(second, bad, "bad")
    assert not one.stop("", record(good, 100, 0.9))
    given = record(bad, 100, 0.1)
    assert not one.stop("", given | {"metrics": {"loss": 0.1}})
    assert not one.stop("", {"failure": "why", "config": given["config"]})
    assert one.stop("", given)


def test_cells_are_within_the_space_and_have_what_they_read(tmp_path: Path) -> None:
    """A key that the kind does not read is no part of the cell, as is not what the space leaves to the experiment."""
    one = proposals(tmp_path, algorithm="random", samples=30)
    cells = [cell for _, cell in drawn(one)]
    assert len(set(cells)) == 30
    assert {cell.settings["pretrain.task.kind"] for cell in cells} == {"restoration", "masked"}
    for cell in cells:
        settings = cell.settings
        assert 1e-4 <= cell.lr <= 1e-2
        assert float(f"{cell.lr:.4g}") == cell.lr
        assert settings["pretrain.patches_per_volume"] in (1, 2, 3)
        assert ("pretrain.task.ratio" in settings) == (settings["pretrain.task.kind"] == "masked")
        own = resolved(study(), dict(cell.overrides))
        assert (own.pretrain.task.kind, own.finetune.optimizer.lr) == (settings["pretrain.task.kind"], cell.lr)
        assert (own.search, own.finetune.sizes, own.finetune.grid.init) == (None, (2,), ("pretrained",))
    again = proposals(tmp_path, algorithm="random", samples=30)
    assert [again.cell(trial) for trial in again.unfinished()] == cells


def test_random_weights_read_nothing_of_a_pretraining(tmp_path: Path) -> None:
    inits = "random", "pretrained"
    one = proposals(tmp_path, inits=inits, space=SPACE | {"init": {"choice": list(inits)}})
    read = {(cell.init, any(key.startswith("pretrain.") for key in cell.settings)) for _, cell in drawn(one)}
    assert read == {("random", False), ("pretrained", True)}


def test_another_search_draws_other_cells(tmp_path: Path) -> None:
    """E.g. that of another seed; they lie side by side in one journal."""
    (tmp_path / "again").mkdir()
    places = (tmp_path, "one"), (tmp_path / "again", "one"), (tmp_path, "another")
    found = [[cell for _, cell in drawn(proposals(*place, algorithm="random"))] for place in places]
    assert len(found[0]) == 8
    assert found[0] == found[1] != found[2]


def test_a_grid_is_every_combination_once(tmp_path: Path) -> None:
    """In the order of the space, also where it is begun again; lists may be chosen."""
    space = {
        "finetune.optimizer.betas": {"choice": [[0.9, 0.95], [0.9, 0.999]]},
        "finetune.optimizer.lr": {"choice": [1e-3, 1e-2]},
    }
    found = []
    for _ in range(6):
        one = proposals(tmp_path, algorithm="grid", space=space, samples=1)
        if trial := one.draw():
            cell = one.cell(trial)
            found.append((cell.settings["finetune.optimizer.betas"], cell.lr))
            assert resolved(study(), dict(cell.overrides)).finetune.optimizer.betas == found[-1][0]
    assert found == [(betas, lr) for betas in ((0.9, 0.95), (0.9, 0.999)) for lr in (1e-3, 1e-2)]


@pytest.mark.parametrize(
    ("metrics", "status"), [(result(0.5), "finished"), ({}, "stopped"), (None, "failed"), ("open", "unfinished")]
)
def test_what_was_trained_is_not_trained_again(tmp_path: Path, metrics: Any, status: str) -> None:
    """A cell of the same key is a repeated one, whatever became of the first one, and after a fault as well."""
    one = proposals(tmp_path)
    (first, cell), (second, other), *_ = drawn(one)
    assert one.begin(first, cell, "key")
    one.stop("", record(cell, 100, 0.4))
    if metrics != "open":
        one.tell(cell, metrics)
    second.set_user_attr("key", "key")  # killed here
    one = proposals(tmp_path)
    for trial in one.unfinished():
        if trial.number < 2:
            assert one.begin(trial, one.cell(trial), "key") == (trial.number == 0)
    assert one.counts() == Counter(["unfinished"] * 6 + [status, "repeated"])
    assert other not in one.open


def test_a_score_that_is_told_again_changes_nothing(tmp_path: Path) -> None:
    """A trial that goes on from a checkpoint repeats its records."""
    one = proposals(tmp_path, scheduler="asha", samples=1)
    ((trial, cell),) = drawn(one)
    assert one.begin(trial, cell, "key")
    assert not one.stop("", record(cell, 100, 0.4))
    again = proposals(tmp_path, scheduler="asha", samples=1)
    assert again.begin(*again.unfinished(), cell, "key")
    assert not again.stop("", record(cell, 100, 0.1))
    again.tell(cell, result(0.4))
    (kept,) = again._trials()
    assert kept.intermediate_values == {100: 0.4}


@pytest.mark.parametrize("torn", [b'{"op_code": 7, "tri', b""])
def test_a_journal_that_was_cut_off_is_read(tmp_path: Path, torn: bytes) -> None:
    """A half line is no record, and a lock is nobody's any more."""
    one = proposals(tmp_path)
    trial = one.draw()
    assert trial
    cell = one.cell(trial)
    with (tmp_path / JOURNAL).open("ab") as file:
        file.write(torn)
    (tmp_path / f"{JOURNAL}.lock").symlink_to(tmp_path / JOURNAL)
    again = proposals(tmp_path)
    assert list(map(again.cell, again.unfinished())) == [cell]
    assert again.draw()
    assert len(proposals(tmp_path).unfinished()) == 2


def test_a_draw_that_was_cut_off_is_completed(tmp_path: Path) -> None:
    """Optuna writes a trial before its values, one by one."""
    trial = proposals(tmp_path).draw()
    assert trial
    lr = trial.suggest_float("finetune.optimizer.lr", 1e-4, 1e-2, log=True)
    again = proposals(tmp_path)
    (cell,) = map(again.cell, again.unfinished())
    assert cell.settings.keys() >= {"finetune.optimizer.lr", "pretrain.task.kind", "pretrain.patches_per_volume"}
    assert cell.lr == pytest.approx(lr, rel=1e-3)
    third = proposals(tmp_path)
    assert list(map(third.cell, third.unfinished())) == [cell]


def test_the_budget_is_of_all_restarts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = 1000.0
    monkeypatch.setattr("time.monotonic", lambda: now)
    one = proposals(tmp_path, budget=1.0)
    ((trial, _), *_) = drawn(one)
    now += 1800
    assert one.left == 1800
    one.end(trial, TrialState.FAIL)
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
