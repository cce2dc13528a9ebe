"""What Ray Tune is given in the rounds of a search, without Ray: jobs are made by the test."""

import json
import time
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from recorded import flat
from studies import small_study

from ssl_ray.search.cells import JOURNAL, Cell
from ssl_ray.search.proposals import Proposals
from ssl_ray.search.rounds import Rounds
from ssl_ray.storage.mirror import Mirror

SPACE: dict[str, Any] = {
    "finetune.optimizer.lr": {"loguniform": [1e-4, 1e-2]},
    "pretrain.epochs": {"choice": [1, 2, 3]},
}


class Cluster:
    """Makes the weights of a number of epochs once, and jobs of 900 steps."""

    def __init__(
        self, folder: Path, fails: int = 0, error: type[Exception] = FloatingPointError, **search: Any
    ) -> None:
        self.folder, self.fails, self.error = folder, fails, error
        self.made: list[int] = []
        self.asked: list[tuple[Cell, bool]] = []
        self.finished: set[str] = set()
        finetune = {"grid": {"init": ["pretrained"]}, "steps": 900, "validate_every": 100}
        self.study = small_study(
            finetune=finetune, search={"space": SPACE, "samples": 9, "algorithm": "random"} | search
        )

    def rounds(self) -> Rounds:
        search = self.study.search
        assert search
        base, plain = Cell.of(2, "pretrained", 1e-3), self.study.unsearched
        proposals = Proposals(search, base, plain, self.folder / JOURNAL, Mirror(self.folder), "name", 0, 100)
        return Rounds(proposals, self.job_of, self.finished.__contains__)

    def job_of(self, cell: Cell, make: bool) -> Any:
        self.asked.append((cell, make))
        own = cell.experiment(self.study.unsearched)
        epochs = own.pretrain.epochs
        if epochs not in self.made:
            if not make:
                return None
            if epochs == self.fails:
                raise self.error("the loss was not finite")
            self.made.append(epochs)
        key = f"{cell.lr!r} {epochs} {own.network}"
        folder = SimpleNamespace(key=key, pull_evaluation=lambda: self.folder / "evaluation.json")
        return SimpleNamespace(config=own.finetune, folder=folder)


def train(rounds: Rounds, cluster: Cluster, places: int = 2) -> list[list[Cell]]:
    """As Tune does: so many at once, a place is filled as soon as its trial has ended -> the cells of each round."""
    done: list[list[Cell]] = []
    while rounds.fill(places):
        done.append([])
        count = 0
        while (given := rounds.suggest(f"{len(done)}-{count}")) != rounds.FINISHED:
            cell = given["cell"]
            assert cell.experiment(cluster.study.unsearched).pretrain.epochs in cluster.made
            assert given["job"] is rounds.jobs[cell]
            done[-1].append(cell)
            assert rounds.tell(cell, {"selected/validation/dice_foreground": cell.lr})
            count += 1
    return done


def test_weights_are_made_between_rounds_and_shared(tmp_path: Path) -> None:
    """Each once, before the first cell that needs them; a round goes on with cells whose weights are there."""
    cluster = Cluster(tmp_path)
    rounds = cluster.rounds()
    done = train(rounds, cluster)
    cells = [cell for cells in done for cell in cells]
    assert len(cells) == len(set(cells)) == 9
    assert sorted(cluster.made) == [1, 2, 3]
    assert len(done) < 6, "once all weights are there, one round takes all cells that are left"
    assert rounds.proposals.counts() == {"finished": 9, "stopped": 0, "failed": 0, "unfinished": 0}


def test_a_pretraining_that_fails_ends_its_cells_alone(tmp_path: Path) -> None:
    cluster = Cluster(tmp_path, fails=2)
    rounds = cluster.rounds()
    train(rounds, cluster)
    failed = [cell for cell, make in cluster.asked if make and cell.settings["pretrain.epochs"] == 2]
    assert rounds.proposals.counts() == {
        "finished": 9 - len(failed),
        "stopped": 0,
        "failed": len(failed),
        "unfinished": 0,
    }
    assert failed
    notes = {trial.user_attrs["note"] for trial in rounds.proposals._study.trials}
    assert notes == {"", "FloatingPointError: the loss was not finite"}


def test_a_pretraining_that_fails_otherwise_is_tried_again_by_the_next_command(tmp_path: Path) -> None:
    """A full disk says nothing about its settings."""
    cluster = Cluster(tmp_path, fails=2, error=RuntimeError)
    train(cluster.rounds(), cluster)
    left = cluster.rounds().proposals.open
    assert left
    assert {cell.settings["pretrain.epochs"] for cell in left} == {2}
    cluster.fails = 0
    again = cluster.rounds()
    done = [cell for cells in train(again, cluster) for cell in cells]
    assert set(done) == set(left)
    assert again.proposals.counts() == {"finished": 9, "stopped": 0, "failed": 0, "unfinished": 0}


def test_settings_that_do_not_go_together_end_their_cell(tmp_path: Path) -> None:
    """Each value was checked when the YAML was read, their combinations were not."""
    space = {"network.num_heads": {"choice": [3, 4]}, "network.hidden_size": {"choice": [48, 51]}}
    cluster = Cluster(tmp_path, space=space, algorithm="grid")
    rounds = cluster.rounds()
    train(rounds, cluster)
    assert rounds.proposals.counts() == {"finished": 3, "stopped": 0, "failed": 1, "unfinished": 0}


def test_a_killed_driver_goes_on_with_the_cells_that_it_had_drawn(tmp_path: Path) -> None:
    """First those that were open; one whose trial has finished meanwhile is not trained, its scores are on disk."""
    cluster = Cluster(tmp_path)
    first = cluster.rounds()
    assert first.fill(2)
    begun = [first.suggest("a")["cell"], first.suggest("b")["cell"]]
    scores = [asdict(case) for case in flat([0.25, 0.35], "v")]
    (tmp_path / "evaluation.json").write_text(json.dumps({"validation": scores, "organs": ["liver", "spleen"]}))
    cluster.finished = {first.jobs[begun[0]].folder.key}
    again = cluster.rounds()
    assert again.fill(1)
    assert again.suggest("c")["cell"] == begun[1]
    (trial,) = [one for one in again.proposals._study.trials if one.value is not None]
    assert trial.value == pytest.approx(0.3)
    assert begun[0] not in again.proposals.open


def test_a_trial_is_stopped_by_its_validations_and_never_at_its_last_step(tmp_path: Path) -> None:
    """Records without a score, of failures and of the last step stop nothing; a stopped cell is told as such."""
    rounds = Cluster(tmp_path, scheduler="asha").rounds()
    assert rounds.fill(3)
    cells = {name: rounds.suggest(name)["cell"] for name in ("good", "bad", "late")}

    def stop(name: str, step: int, score: float) -> bool:
        return rounds.stop(name, {"step": step, "metrics": {"validation/dice_foreground": score, "lr": 1.0}})

    assert not any(stop("good", step, step / 1000) for step in (100, 200, 300, 900))
    assert not rounds.stop("bad", {"step": 50, "metrics": {"loss": 1.0}})
    assert not rounds.stop("bad", {"failure": "why"})
    assert stop("bad", 100, 0.05)
    assert rounds.tell(cells["bad"], {})
    assert not any(stop("late", step, 0.8) for step in (100, 300, 800))
    assert not stop("late", 900, 0.1), "worse, and done"
    for name, score in {"good": 0.9, "late": 0.8}.items():
        assert rounds.tell(cells[name], {"selected/validation/dice_foreground": score})
    assert rounds.proposals.counts() == {"finished": 2, "stopped": 1, "failed": 0, "unfinished": 0}


def test_the_budget_ends_a_search_that_goes_on_with_more(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing begins any more, trials stop at their next record, and both go on when there is more."""
    seconds = 0.0
    real = time.monotonic
    monkeypatch.setattr("time.monotonic", lambda: real() + seconds)
    cluster = Cluster(tmp_path, budget=1)
    rounds = cluster.rounds()
    assert rounds.fill(1)
    cell = rounds.suggest("a")["cell"]
    record = {"step": 50, "metrics": {"loss": 1.0}}
    assert not rounds.stop("a", record)
    seconds = 3700
    assert rounds.stop("a", record)
    assert not rounds.tell(cell, {}), "not for good"
    assert rounds.suggest("b") == rounds.FINISHED
    assert not rounds.fill(1)
    assert list(rounds.proposals.open) == [cell]
    rounds.proposals._keep()
    again = Cluster(tmp_path, budget=2).rounds()
    assert 0 < again.proposals.left < 3600
    assert again.fill(1)
    assert again.suggest("c")["cell"] == cell


def test_a_pretraining_ends_with_the_budget(tmp_path: Path) -> None:
    """As after Ctrl-C, but the search says why; the cell stays open for a larger budget."""
    cluster = Cluster(tmp_path, budget=0.3 / 3600)

    def endless(cell: Cell, make: bool) -> Any:
        time.sleep(60)

    rounds = cluster.rounds()
    rounds._job_of = endless
    begun = time.monotonic()
    assert not rounds.fill(1)
    assert time.monotonic() - begun < 30
    assert len(cluster.rounds().proposals.open) == 1


def test_ctrl_c_is_no_end_of_the_budget(tmp_path: Path) -> None:
    def interrupted(cell: Cell, make: bool) -> Any:
        raise KeyboardInterrupt

    rounds = Cluster(tmp_path, budget=1).rounds()
    rounds._job_of = interrupted
    with pytest.raises(KeyboardInterrupt):
        rounds.fill(1)
