"""The page of a search that is written into MLflow as a real one would be."""

import re
from pathlib import Path
from typing import Any

import pytest
from optuna.trial import TrialState
from studies import place_database, small_study

from ssl_ray.config.loading import dump
from ssl_ray.config.schema import Study
from ssl_ray.config.search import resolved
from ssl_ray.errors import UserError
from ssl_ray.report.search import write_search_report
from ssl_ray.report.write import Report
from ssl_ray.search.cells import JOURNAL, Cell
from ssl_ray.search.proposals import Proposals
from ssl_ray.storage.mirror import Mirror
from ssl_ray.study.experiment import load
from ssl_ray.study.parts import tracker_of

SPACE: dict[str, Any] = {
    "finetune.optimizer.lr": {"loguniform": [1e-4, 1e-2]},
    "pretrain.task.kind": {"choice": ["restoration", "masked"]},
    "pretrain.task.ratio": {"choice": [0.5, 0.75]},
    "pretrain.patches_per_volume": {"int": [1, 4]},
    "finetune.optimizer.betas": {"choice": [[0.9, 0.95], [0.9, 0.999]]},
}


def study_of(folder: Path, **search: Any) -> Study:
    place_database(folder / "mlflow.db")
    finetune = {"grid": {"init": ["pretrained"]}, "steps": 90, "validate_every": 10}
    given = {"space": SPACE, "samples": 24, "algorithm": "random", "scheduler": "asha"} | search
    return small_study(folder, name="fake", pretrain={"patch_size": 32}, finetune=finetune, search=given)


def score(cell: Cell) -> float:
    """Only the learning rate matters."""
    return 0.9 - abs(cell.lr - 5e-3) * 100


def record(folder: Path, study: Study, count: int, stopped: int = 0, tested: bool = True) -> list[Cell]:
    """A search of so many finished and stopped cells, one that repeats another, and one that is going on."""
    tracker = tracker_of(study)
    assert study.search
    proposals = Proposals(study.search, study.finetune, study, folder / JOURNAL, Mirror(folder), "the search")
    parent = tracker.open("search", "the search", "search", {})
    parent.text(dump(study), "experiment.yaml")
    cells = []
    for place in range(count + stopped + 1):
        trial = proposals.draw()
        assert trial
        cell = proposals.cell(trial)
        assert proposals.begin(trial, cell, f"key{place}")
        trial.report(score(cell) / 2, 10)
        run = tracker.open("trial", f"key{place}", cell.name, {}, parent.id)
        if place < count:
            run.metrics({"selected/test/original_dice_foreground": 0.1 + score(cell)} if tested else {"loss": 1.0}, 90)
            proposals.end(trial, TrialState.COMPLETE, score(cell))
            cells.append(cell)
        elif place < count + stopped:
            proposals.tell(cell, {})
        run.close()
    if repeated := proposals.draw():
        proposals.begin(repeated, proposals.cell(repeated), "key0")
    parent.artifact(folder / JOURNAL)
    parent.close()
    tracker.settle()
    tracker.stop()
    return cells


def report_on(study: Study, folder: Path) -> Report:
    return write_search_report(study, tracker_of(study, create=False), folder / "report")


def test_the_best_cell_is_shown_without_a_verdict_and_can_be_run(tmp_path: Path) -> None:
    """Its score, its test score as exploratory, and a YAML of which it is the only cell."""
    study = study_of(tmp_path)
    cells = record(tmp_path, study, 12, stopped=4)
    best = max(cells, key=score)
    written = report_on(study, tmp_path)
    text = written.markdown.read_text()
    assert f"**Best on validation**: number {cells.index(best)}, `dice_foreground` {score(best):.3f}." in text
    assert f"{0.1 + score(best):.3f}. **Exploratory**" in text
    assert "no verdict" in text
    assert re.search(r"18 cells .*:\n12 finished, 4 stopped, 1 unfinished, 1 repeated\.", text)
    assert "Importances are shown from 20 finished cells on." in text
    assert f"| {best.lr:.4g} |" in re.sub(" +", " ", text)
    for words in ("clear", "p <", "interval"):
        assert words not in text
    *figures, yaml = written.files
    assert [path.name for path in figures] == ["search.png", "search_dark.png"]
    own = load(yaml)
    assert (own.name, own.search) == ("fake-best", None)
    assert own == resolved(study, dict(best.overrides)).model_copy(update={"name": "fake-best"})
    assert own.finetune.optimizer.lr == best.lr
    page = written.html.read_text()
    assert page.count("<img") == 1
    assert "data:image/png" in page
    tracker = tracker_of(study, create=False)
    (parent,) = tracker.runs(kind="search")
    assert {Path(name).name for name in tracker.files(parent.info.run_id, "report")} == {
        *("report.md", "report.html", "best.yaml"),
    }


def test_what_mattered_is_told_from_twenty_cells_on(tmp_path: Path) -> None:
    """The learning rate, which the scores are made of, has the largest share by far; a choice of one has none."""
    space = SPACE | {"finetune.optimizer.weight_decay": {"choice": [0.01]}}
    study = study_of(tmp_path, samples=60, space=space)
    record(tmp_path, study, 50)
    text = report_on(study, tmp_path).markdown.read_text()
    shares = {key: float(share) for key, share in re.findall(r"^- `(.*)`: (\d+) %$", text, re.MULTILINE)}
    assert shares.keys() == SPACE.keys()
    assert sum(shares.values()) == pytest.approx(100, abs=2)
    assert max(shares, key=lambda key: shares[key]) == "finetune.optimizer.lr"
    assert shares["finetune.optimizer.lr"] > 50


def test_the_smallest_is_best_where_the_mode_says_so(tmp_path: Path) -> None:
    study = study_of(tmp_path, mode="min", scheduler="none", metric="original_hd95")
    cells = record(tmp_path, study, 5, tested=False)
    text = report_on(study, tmp_path).markdown.read_text()
    worst = min(cells, key=score)
    assert f"number {cells.index(worst)}, `original_hd95` {score(worst):.3f}" in text
    assert "There are no test volumes" in text


def test_a_search_without_a_finished_cell_has_a_page(tmp_path: Path) -> None:
    study = study_of(tmp_path)
    record(tmp_path, study, 0)
    written = report_on(study, tmp_path)
    assert "No cell has finished." in written.markdown.read_text()
    assert written.files == ()


def test_a_larger_search_reads_the_smaller_one(tmp_path: Path) -> None:
    """The page says what was run, not what was given now."""
    study = study_of(tmp_path)
    record(tmp_path, study, 3)
    larger = study_of(tmp_path, samples=99, budget=5)
    text = report_on(larger, tmp_path).markdown.read_text()
    assert "samples: 24" in text
    assert "3 finished" in text


def test_a_study_without_a_search_yet_says_so(tmp_path: Path) -> None:
    study = study_of(tmp_path)
    tracker = tracker_of(study)
    tracker.stop()
    with pytest.raises(UserError, match="no fine-tuning search yet"):
        report_on(study, tmp_path)


def test_what_a_cell_does_not_read_is_not_shown(tmp_path: Path) -> None:
    """The ratio of restoration is a dash."""
    study = study_of(tmp_path)
    cells = record(tmp_path, study, 10)
    rows = [line for line in report_on(study, tmp_path).table.splitlines() if re.match(r"\| +\d", line)]
    assert len(rows) == 12
    for row, cell in zip(rows, cells, strict=False):
        kind, ratio = (part.strip() for part in row.split("|")[4:6])
        assert kind == cell.settings["pretrain.task.kind"]
        assert ratio == str(cell.settings.get("pretrain.task.ratio", "-"))
