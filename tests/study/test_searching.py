"""The rounds of a search, without Ray: weights and trials are made by the test."""

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from studies import small_study

from ssl_ray.config.schema import Study
from ssl_ray.errors import UserError
from ssl_ray.pretrain.driver import Pretrained
from ssl_ray.search.cells import JOURNAL, Cell
from ssl_ray.search.proposals import Proposals
from ssl_ray.storage.mirror import Mirror
from ssl_ray.study import searching
from ssl_ray.study.parts import folders_of
from ssl_ray.study.searching import Rounds, run_search

SPACE: dict[str, Any] = {
    "finetune.optimizer.lr": {"loguniform": [1e-4, 1e-2]},
    "pretrain.epochs": {"choice": [1, 2, 3]},
}


class Made(Rounds):
    """Makes the weights of a number of epochs once; those of `fails` epochs end in an error."""

    fails: dict[int, Exception]
    made: list[int]

    def _job(self, own: Study, make: bool) -> Any:
        epochs = own.pretrain.epochs
        if epochs not in self.made:
            if not make:
                return None
            if epochs in self.fails:
                raise self.fails[epochs]
            self.made.append(epochs)
        key = f"{own.finetune.optimizer.lr!r} {epochs} {own.network}"
        return SimpleNamespace(config=own.finetune, key=key)


def rounds_of(
    folder: Path, fails: dict[int, Exception] | None = None, done: dict[str, float] | None = None, **search: Any
) -> Made:
    """`done`: scores of trials that have finished, by key."""
    finetune = {"grid": {"init": ["pretrained"]}, "steps": 900, "validate_every": 100}
    study = small_study(finetune=finetune, search={"space": SPACE, "samples": 9, "algorithm": "random"} | search)
    assert study.search
    proposals = Proposals(study.search, study.finetune, study, folder / JOURNAL, Mirror(folder), "name")

    def runs(kind: str, key: str) -> Iterator[Any]:
        info = SimpleNamespace(status="FINISHED" if key in (done or {}) else "KILLED")
        metrics = {"selected/validation/dice_foreground": (done or {}).get(key, 0)}
        return iter([SimpleNamespace(info=info, data=SimpleNamespace(metrics=metrics))])

    made: Any = Made(study, proposals, *(SimpleNamespace(runs=runs) for _ in range(3)))
    made.fails, made.made = fails or {}, []
    return made


def train(rounds: Made, places: int = 2) -> list[list[Cell]]:
    """As Tune does: a place is filled as soon as its trial has ended -> the cells of each round."""
    done: list[list[Cell]] = []
    for cells in rounds(places):
        done.append([])
        for cell, job in cells:
            assert dict(cell.overrides)["pretrain.epochs"] in rounds.made
            assert job.config.optimizer.lr == cell.lr
            done[-1].append(cell)
            rounds.proposals.tell(cell, {"selected/validation/dice_foreground": cell.lr})
    return done


def test_weights_are_made_between_rounds_and_shared(tmp_path: Path) -> None:
    """Each once, before the first cell that needs them; a round goes on with cells whose weights are there."""
    rounds = rounds_of(tmp_path)
    done = train(rounds)
    cells = [cell for cells in done for cell in cells]
    assert len(cells) == len(set(cells)) == 9
    assert sorted(rounds.made) == [1, 2, 3]
    assert len(done) < 4, "once all weights are there, one round takes all cells that are left"
    assert rounds.proposals.counts() == {"finished": 9}


def test_a_pretraining_that_fails_ends_its_cells_alone(tmp_path: Path) -> None:
    rounds = rounds_of(tmp_path, {2: FloatingPointError("the loss was not finite")})
    train(rounds)
    counts = rounds.proposals.counts()
    assert counts["finished"] + counts["failed"] == 9
    assert counts["failed"] > 0
    notes = {trial.user_attrs["note"] for trial in rounds.proposals._trials()}
    assert notes == {"", "FloatingPointError: the loss was not finite"}


@pytest.mark.parametrize("error", [RuntimeError("a full disk"), UserError("no such file")])
def test_what_fails_otherwise_is_tried_again_by_the_next_command(tmp_path: Path, error: Exception) -> None:
    """It says nothing about the settings."""
    first = rounds_of(tmp_path, {2: error})
    train(first)
    left = [first.proposals.cell(trial) for trial in first.proposals.unfinished()]
    assert {cell.settings["pretrain.epochs"] for cell in left} == {2}
    again = rounds_of(tmp_path)
    assert [cell for cells in train(again) for cell in cells] == left
    assert again.proposals.counts() == {"finished": 9}


def test_a_round_makes_no_weights_that_are_gone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Trials hold the CPUs that a pretraining would wait for, so that it comes before the next round."""
    weights = tmp_path / "best.safetensors"
    monkeypatch.setattr(searching, "known_pretraining", lambda *_: Pretrained(weights, "key", "finished"))
    monkeypatch.setattr(searching, "pretrain", lambda *_: pytest.fail("a pretraining begins"))
    monkeypatch.setattr(searching, "trial_jobs", lambda *_: ("grid", {"cell": "a job"}))
    rounds: Any = rounds_of(tmp_path)
    there = SimpleNamespace(training=(), validation=(), probed=None, splits=None, labelled={})
    rounds._volumes = {searching._preparations(rounds.study): there}
    rounds.folders = SimpleNamespace(output=Mirror(tmp_path))
    own = rounds.study.model_copy(update={"search": None})
    assert Rounds._job(rounds, own, make=False) is None
    weights.touch()
    with pytest.raises(pytest.fail.Exception, match="a pretraining begins"):  # which finds that it is done
        Rounds._job(rounds, own, make=False)


def test_settings_that_do_not_go_together_end_their_cell(tmp_path: Path) -> None:
    """Each value was checked when the YAML was read, their combinations were not."""
    space = {
        "network.num_heads": {"choice": [3, 4]},
        "network.hidden_size": {"choice": [48, 51]},
        "pretrain.epochs": {"choice": [1]},
    }
    rounds = rounds_of(tmp_path, space=space, algorithm="grid")
    train(rounds)
    assert rounds.proposals.counts() == {"finished": 3, "failed": 1}


def test_a_killed_driver_goes_on_with_the_cells_that_it_had_drawn(tmp_path: Path) -> None:
    """First those that were open; one whose trial has finished meanwhile is not trained again, its score counts."""
    first = rounds_of(tmp_path)
    begun = [next(cells) for cells in (next(first(2)),) for _ in range(2)]
    again = rounds_of(tmp_path, done={begun[0][1].key: 0.3})
    assert next(next(again(1)))[0] == begun[1][0]
    assert [trial.value for trial in again.proposals._trials() if trial.value is not None] == [0.3]
    assert begun[0][0] not in again.proposals.open


def test_nothing_begins_once_the_budget_is_used_up(tmp_path: Path) -> None:
    rounds = rounds_of(tmp_path, budget=1)
    rounds.proposals._began -= 3601
    assert train(rounds) == []
    assert rounds.proposals.counts() == {}


def test_a_pretraining_that_is_cut_off_has_used_up_its_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Otherwise every start of the command would have the whole budget again."""
    now, left = 1000.0, list[float]()

    class Pretraining(Rounds):
        def __call__(self, places: int) -> Any:
            nonlocal now
            left.append(self.proposals.left)
            now += 3601
            raise KeyboardInterrupt

    monkeypatch.setattr("time.monotonic", lambda: now)
    monkeypatch.setattr(searching, "Rounds", Pretraining)
    monkeypatch.setattr(searching.ray, "cluster_resources", lambda: {"CPU": 2.0})
    study = small_study(tmp_path, finetune={"grid": {"init": ["pretrained"]}}, search={"space": SPACE, "budget": 1})
    folders = folders_of(study)
    folders.study.mkdir(parents=True)
    run = SimpleNamespace(id="", text=lambda *_: None, artifact=lambda _: None, close=lambda *_: None)
    tracker: Any = SimpleNamespace(open=lambda *_: run)
    prepared: Any = None
    for _ in range(2):
        run_search(study, folders, tracker, prepared, (), {})
    assert left == [3600, -1]
