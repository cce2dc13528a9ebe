"""What the MLflow run of a cell is told, without Ray."""

from types import SimpleNamespace
from typing import Any

import pytest
from studies import small_study

from ssl_ray.search.callbacks import TrialCallback
from ssl_ray.search.cells import FAILURE, NONFINITE, STOPPED, Cell
from ssl_ray.study.parts import run_params

CELL = Cell.of(6, "pretrained", 2e-3, 1)


class Told:
    """A tracker, its only run and a progress bar: all that they are told."""

    def __init__(self) -> None:
        self.values: dict[str, Any] = {}
        self.labels: dict[str, str] = {}
        self.status = ""

    def open(self, kind: str, key: str, name: str, params: Any, parent: str, tags: dict[str, str]) -> "Told":
        self.params(params)
        self.tags(tags)
        return self

    def params(self, values: dict[str, Any]) -> None:
        self.values |= values

    def tags(self, values: dict[str, str]) -> None:
        self.labels |= values

    def close(self, status: str = "FINISHED") -> None:
        self.status = status

    def logged(self, *_: Any) -> set[int]:
        return set()

    def datasets(self, values: Any) -> None:
        self.read = [(one["context"], one["profile"]["volumes"]) for one in values]

    def started(self, *_: Any) -> None: ...
    def metrics(self, values: Any, *_: Any) -> None: ...
    def text(self, *_: Any) -> None: ...
    def update(self, done: int, *_: Any) -> None:
        self.shown = done


def trial_of(told: Told, **result: Any) -> Any:
    """What Tune has of the cell's trial, whose weights a run has made."""
    config = CELL.apply(small_study(finetune={"optimizer": {"lr": 1e-4}, "steps": 30}).finetune)
    volumes = [SimpleNamespace(key=str(number), subject="") for number in range(3)]
    data = SimpleNamespace(training=volumes[:2], validation=volumes[2:], test=())
    job = SimpleNamespace(config=config, network=small_study().network, data=data, seed=7, made_by="made by", key="key")
    job.clear = lambda: told.labels.update(cleared="yes")
    return SimpleNamespace(trial_id="1", config={"cell": CELL, "job": job}, last_result=result)


def callback_of(told: Told, **changes: Any) -> TrialCallback:
    arguments: Any = (told, "grid", run_params(small_study(), "finetune"), told, 2, 100)
    return TrialCallback(*arguments, **changes)


@pytest.mark.parametrize("nonfinite", [True, False])
def test_a_trial_is_described_and_says_why_it_failed(nonfinite: bool) -> None:
    """Size, start, rate, run, seed, precision and volumes; a loss that was not finite has a tag of its own."""
    told = Told()
    callback = callback_of(told)
    trial = trial_of(told, failure="why", nonfinite=nonfinite)
    callback.on_trial_start(0, [], trial)
    callback.on_trial_result(
        0, [], trial, {"step": 0, "metrics": {"started_at": 0.0}, "precision": "bfloat16", "device": "a GPU"}
    )
    expected = {"size": 6, "init": "pretrained", "lr": 2e-3, "precision": "bfloat16"}
    expected |= {"training_volumes": 2, "validation_volumes": 1, "test_volumes": 0}
    assert expected.items() <= told.values.items()
    expected = {"pretraining_run": "made by", "run": "1", "seed": "7", "device": "a GPU"}
    assert {f"ssl_ray.{name}": value for name, value in expected.items()}.items() <= told.labels.items()
    assert told.read == [("training", 2), ("validation", 1)]
    assert not told.labels[NONFINITE], "of an earlier attempt"
    callback.on_trial_complete(0, [], trial)
    assert told.labels["ssl_ray.failure"] == "why"
    assert told.labels["ssl_ray.nonfinite"] == ("true" if nonfinite else "")
    assert (told.status, callback.failed) == ("FAILED", [CELL.name])


def test_a_stopped_trial_is_no_failed_one() -> None:
    """It ends as killed, with the step, and is over."""
    told, heard = Told(), list[Any]()
    callback = callback_of(told, tell=lambda *what: heard.append(what))
    result = {"step": 10, "metrics": {"validation/dice_foreground": 0.1, "lr": 1e-3}}
    trial = trial_of(told, **result)
    callback.on_trial_start(0, [], trial)
    callback.on_trial_result(0, [], trial, result)
    callback.on_trial_complete(0, [], trial)
    assert heard == [(CELL, {})]
    assert (told.status, told.labels[STOPPED], told.labels[FAILURE]) == ("KILLED", "at step 10", "")
    assert (callback.completed, callback.failed) == (0, [])
    assert told.labels["cleared"] == "yes"


def test_the_bar_counts_a_cell_as_a_whole_however_long_it_is() -> None:
    """A search may give a cell another number of steps than the experiment has, by which the bar counts."""
    told = Told()
    callback, result = callback_of(told), {"step": 15, "metrics": {"loss": 0.1}}
    trial = trial_of(told, **result)
    callback.on_trial_start(0, [], trial)
    callback.on_trial_result(0, [], trial, result)
    assert told.shown == 250, "two cells of 100 before, and half of one"
