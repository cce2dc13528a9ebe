"""The page of a study that is still running."""

import time
from pathlib import Path

import numpy as np
import pytest
from journals import begin, begin_cells, train
from studies import small_study

from ssl_ray.config.schema import Study
from ssl_ray.errors import UserError
from ssl_ray.pretrain.picture import draw_picture
from ssl_ray.study import live, runner
from ssl_ray.study.live import LivePage
from ssl_ray.study.lock import only_one
from ssl_ray.study.parts import folders_of


@pytest.fixture
def study(tmp_path: Path) -> Study:
    cohort = {"splits": {2: "a.json", 4: "b.json"}}
    return small_study(tmp_path, pretrain={"batch_size": 4}, finetune={"cohort": cohort, "steps": 100})


def test_it_grows_with_the_study(study: Study, monkeypatch: pytest.MonkeyPatch) -> None:
    """The step of the pretraining, its newest picture, every training with its scores: the page has what there is."""
    monkeypatch.setattr(live, "_SECONDS", 0.05)
    folders = folders_of(study)
    page = folders.study / "report.html"

    def shows(*words: str) -> None:
        deadline = time.monotonic() + 20
        while not page.exists() or not all(word in page.read_text() for word in words):
            assert time.monotonic() < deadline, words
            time.sleep(0.05)

    with only_one(folders), LivePage(study, folders):
        weights = begin(folders, "pretraining", "p", steps=200, run=0)
        train(weights, 50, rate=40)
        shows("step 50 of 200", 'http-equiv="refresh"')
        patch = np.zeros((8, 8, 8), np.float32)
        draw_picture(folders.study / "pretrain-p/pictures/patch_0000050.png", {"truth": patch}, "step 50", (1, 1, 1))
        shows("data:image/png;base64,")
        weights.close()
        trials = [begin(folders, "trial", key, name) for key, name in begin_cells(study, folders).items()]
        train(trials[0], 100, rate=40)
        trials[0].metrics({"validation/dice_foreground": 0.512, "dice": 0.487}, 100)
        shows("0.512", "0.487", "running")
    for trial in trials:
        trial.close()


def test_it_says_that_the_study_was_stopped(study: Study, monkeypatch: pytest.MonkeyPatch) -> None:
    """A page that went on renewing itself would let somebody wait who has to start it again."""
    monkeypatch.setattr(live, "_SECONDS", 0.05)
    folders = folders_of(study)

    def train_until_stopped() -> None:
        with only_one(folders), LivePage(study, folders):
            weights = begin(folders, "pretraining", "p", steps=200, run=0)
            train(weights, 50, rate=40)
            while not (folders.study / "report.html").exists():
                time.sleep(0.05)
            weights.close("KILLED")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train_until_stopped()
    page = (folders.study / "report.html").read_text()
    assert "small: stopped" in page
    assert "the same ssl-ray run goes on" in page
    assert "http-equiv" not in page
    assert "running" not in page


def test_it_says_that_the_report_failed(study: Study, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is the last step that writes the page; one that cannot be written leaves the page that was there."""
    monkeypatch.setattr(live, "_SECONDS", 0.05)
    page = folders_of(study).study / "report.html"

    def train_it(*_: object) -> tuple[str, ...]:
        while not page.exists():
            time.sleep(0.05)
        return ()

    def report(*_: object) -> None:
        before = page.stat().st_mtime_ns
        time.sleep(0.3)
        assert page.stat().st_mtime_ns == before, "nothing else writes it meanwhile"
        raise UserError("MLflow does not answer")

    for name in ("read_cohorts", "connect", "_meanwhile"):
        monkeypatch.setattr(runner, name, lambda *_: None)
    monkeypatch.setattr("ssl_ray.study.stages.carry_out_stages", train_it)
    monkeypatch.setattr("ssl_ray.study.reporting.report", report)
    with pytest.raises(UserError, match="MLflow does not answer"):
        runner.carry_out(study, "report")
    assert "small: stopped" in page.read_text()
    assert "http-equiv" not in page.read_text()


def test_a_report_stays_until_there_is_a_new_one(study: Study, monkeypatch: pytest.MonkeyPatch) -> None:
    """A study that is carried on, e.g. with more runs, does not lose its answer meanwhile."""
    monkeypatch.setattr(live, "_SECONDS", 0.01)
    folders = folders_of(study)
    folders.study.mkdir(parents=True)
    for name in ("report.md", "report.html"):
        (folders.study / name).write_text("the answer")
    with LivePage(study, folders):
        time.sleep(0.3)
    assert (folders.study / "report.html").read_text() == "the answer"
