"""The report from a small study that is written into MLflow as a real one would be."""

import json
import re
import shutil
import subprocess
import sys
import time
import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from mlflow.tracking import MlflowClient
from scipy import stats
from studies import small_study

from ssl_ray.config.loading import dump
from ssl_ray.config.schema import Study
from ssl_ray.errors import UserError
from ssl_ray.evaluate.scores import CaseScores, aggregate
from ssl_ray.pretrain.tasks.restoration.picture import draw_restoration
from ssl_ray.report.answers import answer
from ssl_ray.report.measures import FOREGROUND, HD95
from ssl_ray.report.results import read_results
from ssl_ray.report.statistics import difference, interval
from ssl_ray.report.tables import honest_table, organ_table, published_table
from ssl_ray.report.write import Report, write_report
from ssl_ray.search.cells import FAILURE, Cell, cells
from ssl_ray.study.parts import run_params, tracker_of
from ssl_ray.tracking.tracker import PRETRAINING_RUN, Tracker

ORGANS = ("liver", "spleen")


@pytest.fixture(autouse=True)
def _database(tmp_path: Path, empty_database: Path) -> None:
    """MLflow takes seconds to create its tables: once is enough."""
    shutil.copy(empty_database, tmp_path / "mlflow.db")


@pytest.fixture(scope="module")
def empty_database(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path: Path = tmp_path_factory.mktemp("mlflow") / "mlflow.db"
    MlflowClient(f"sqlite:///{path}").search_experiments()
    return path


def make_study(folder: Path, runs: int = 1, **grid: Any) -> Study:
    grid = {"sizes": [6, 12], "lr": [1e-4, 3e-4]} | grid
    cohort = {"classes": 3, "splits": {size: f"{size}.json" for size in (6, 12, 24)}}
    return small_study(folder, name="fake", finetune={"cohort": cohort, "steps": 400, "grid": grid, "runs": runs})


def case(name: str, dice: Sequence[float | None], background: float = 0.99, hd95: float = 5.0) -> CaseScores:
    """A volume with the same Dice on both grids."""
    organs = tuple(dice)
    distances = tuple(None if score is None else hd95 for score in organs)
    return CaseScores(name, (background, *organs), organs, distances, organs)


def flat(values: Sequence[float], prefix: str = "t") -> list[CaseScores]:
    """Volumes whose organs all have the same Dice."""
    return [case(f"{prefix}{number}", [value] * len(ORGANS)) for number, value in enumerate(values)]


@dataclass
class Outcome:
    """What one trial of the fake study does."""

    validation: Sequence[CaseScores]
    test: Sequence[CaseScores] = ()
    status: str = "FINISHED"
    organs: tuple[str, ...] = ORGANS
    curve: dict[int, float] = field(default_factory=lambda: {200: 0.4, 400: 0.5})
    selected: int = 200
    failure: str = ""
    left_out: int = 0


def record(study: Study, outcomes: dict[Cell, Outcome], folder: Path, pretraining: bool = True) -> Tracker:
    """Write a study into MLflow with the calls of `ssl_ray.pretrain.driver` and `ssl_ray.search.grid`."""
    tracker = tracker_of(study)
    lineage = {}
    if pretraining:
        run = tracker.open("pretraining", "p", "pretrain", run_params(study, "pretrain"))
        for step in range(20, 201, 20):
            validated = {"validation_loss": 2 / step, "validation_identity_loss": 0.2} if step % 40 == 0 else {}
            run.metrics({"loss": 3 / step} | validated, step)
        for step in (40, 200):
            patch = np.random.default_rng(step).random((16, 16, 16))
            path = folder / f"restored_{step:07d}.png"
            draw_restoration(path, patch, patch, patch, f"step {step}")
            run.artifact(path, "pictures")
        run.close()
        lineage[PRETRAINING_RUN] = run.id
    grid = tracker.open("grid", "g", "grid", run_params(study, "finetune"))
    grid.text(dump(study), "experiment.yaml")
    transfer = {"share": 1.0, "loaded": 150, "interpolated": [], "missing": [], "unexpected": ["conv3d_transpose.bias"]}
    grid.text(json.dumps(transfer), "weight_transfer.json")
    grid.text(json.dumps({cell.name: cell.name for cell in outcomes}), "cells.json")
    for cell, outcome in outcomes.items():
        params = {"size": cell.size, "init": cell.init, "lr": cell.lr, "run": cell.run}
        params["training_volumes"] = cell.size - outcome.left_out
        tags = lineage if cell.init == "pretrained" else {}
        run = tracker.open("trial", cell.name, cell.name, params, grid.id, tags)
        for step, value in outcome.curve.items():
            run.metrics({"loss": 1 - value, "lr": cell.lr, "validation/dice_foreground": value}, step)
        if outcome.status == "FINISHED":
            parts = {"validation": outcome.validation, "test": outcome.test}
            metrics = {"selected/step": float(outcome.selected)}
            for name, scored in parts.items():
                means = aggregate(scored, outcome.organs)
                metrics |= {f"selected/{name}/{key}": value for key, value in means.items()}
            run.metrics(metrics, study.finetune.steps)
            tree = {"step": outcome.selected, "organs": list(outcome.organs)}
            tree |= {name: [asdict(one) for one in scored] for name, scored in parts.items()}
            home = folder / cell.name
            home.mkdir(parents=True)
            (home / "evaluation.json").write_text(json.dumps(tree))
            run.artifact(home / "evaluation.json")
        if outcome.failure:
            run.tags({FAILURE: outcome.failure})
        run.close(outcome.status)
    grid.close()
    tracker.settle()
    return tracker


def constant(study: Study, random: float, pretrained: float) -> dict[Cell, Outcome]:
    """Every pretrained cell as good as the next one, likewise every random one; tested on 8 volumes."""
    values = {"random": random, "pretrained": pretrained}
    return {
        cell: Outcome(flat([values[cell.init]] * 2, "v"), flat([values[cell.init]] * 8))
        for cell in cells(study.finetune)
    }


def report_on(study: Study, folder: Path) -> Report:
    """The report as the command writes it, with a tracker of its own."""
    return write_report(study, tracker_of(study, create=False), folder)


class Page(HTMLParser):
    """Collects what could reach out of the page, and checks that tags close in order."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.references: list[str] = []
        self.tags: list[str] = []
        self.open: list[str] = []
        self.text = ""
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.references += [value or "" for name, value in attrs if name in ("src", "href", "srcset", "data")]
        if tag not in ("meta", "img", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def test_tables_show_the_numbers_that_the_trials_logged(tmp_path: Path) -> None:
    """Published: background included, in percent; honest: organs only, as mean over volumes of their organs' mean."""
    study = make_study(tmp_path, sizes=[6], lr=[1e-4])
    random = [case("a", [0.4, None], 0.96), case("b", [0.6, 0.8], 0.98)]
    pretrained = [case("b", [0.7, 0.9], 0.98), case("a", [0.5, None], 0.96)]  # paired by id, not by position
    outcomes = {cell: Outcome([], random if cell.init == "random" else pretrained) for cell in cells(study.finetune)}
    results = read_results(study, record(study, outcomes, tmp_path))
    # volumes with background: (0.96 + 0.4) / 2 = 0.68 and (0.98 + 0.6 + 0.8) / 3 = 0.79333
    assert published_table(results).header[1] == "test volumes"
    assert published_table(results).rows[0][:4] == ["6", "2", "73.67", "79.50"]
    # without: 0.4 and 0.7
    assert honest_table(results).rows[0] == ["Dice", "6", "2", "0.550", "0.650", "+0.100 (+0.100 to +0.100)"]
    found = results.compare(6, FOREGROUND)
    assert found is not None
    np.testing.assert_allclose(found.values, [0.1, 0.1])


def test_learning_rate_is_chosen_on_validation_not_on_test(tmp_path: Path) -> None:
    """The cell that is best on validation is reported, although the other one is better on test."""
    study = make_study(tmp_path, sizes=[6])
    outcomes = {
        cell: Outcome(flat([0.8 if cell.lr == 1e-4 else 0.7]), flat([0.5 if cell.lr == 1e-4 else 0.9]))
        for cell in cells(study.finetune)
    }
    results = read_results(study, record(study, outcomes, tmp_path))
    assert results.arms[6]["random"].lr == 1e-4
    assert honest_table(results).rows[0][3] == "0.500"


def test_a_learning_rate_that_fails_does_not_win_by_its_survivors(tmp_path: Path) -> None:
    """With a failed seed, a higher mean of the other seeds is not enough."""
    study = make_study(tmp_path, sizes=[6], runs=2)
    outcomes = {cell: Outcome(flat([0.9 if cell.lr == 3e-4 else 0.6]), flat([0.5])) for cell in cells(study.finetune)}
    for cell, outcome in outcomes.items():
        if cell.lr == 3e-4 and cell.run == 1:
            outcome.status = "FAILED"
    assert read_results(study, record(study, outcomes, tmp_path)).arms[6]["random"].lr == 1e-4


def test_seeds_are_averaged_before_volumes_are_resampled(tmp_path: Path) -> None:
    """Tables show mean and standard deviation over seeds; the interval is over volumes."""
    study = make_study(tmp_path, sizes=[6], lr=[1e-4], runs=3)
    gains = np.array([0.1, 0.2, 0.15, 0.05, 0.1, 0.12])
    outcomes = {}
    for cell in cells(study.finetune):
        base = 0.5 + 0.1 * cell.run
        values = np.full(6, base) if cell.init == "random" else base + gains * (1 + 0.5 * (cell.run - 1))
        outcomes[cell] = Outcome([], flat(list(values)))
    results = read_results(study, record(study, outcomes, tmp_path))
    assert honest_table(results).rows[0][3] == "0.600 ± 0.100"
    found = results.compare(6, FOREGROUND)
    assert found is not None
    np.testing.assert_allclose(found.values, gains)
    assert "3 seeds" in report_on(study, tmp_path / "report").markdown.read_text()


@pytest.mark.parametrize("going_on", ["RUNNING", "KILLED"])
def test_holes_are_named_where_the_number_would_stand(tmp_path: Path, going_on: str) -> None:
    """Failed, unfinished and missing cells appear in the tables, a failed one with its reason; the others keep their
    numbers."""
    study = make_study(tmp_path, sizes=[6, 12, 24], lr=[1e-4])
    outcomes = constant(study, 0.5, 0.6)
    failed = Cell.of(6, "pretrained", 1e-4, 0)
    outcomes[failed].status, outcomes[failed].failure = "FAILED", "OSError: http://me:secret@server is <gone>"
    outcomes[Cell.of(12, "random", 1e-4, 0)].status = going_on
    del outcomes[Cell.of(24, "pretrained", 1e-4, 0)]
    tracker = record(study, outcomes, tmp_path)
    results = read_results(study, tracker)
    assert [row[2:4] for row in published_table(results).rows] == [
        ["66.33", "failed"],
        ["unfinished", "73.00"],
        ["66.33", "missing"],
    ]
    assert "no answer**: pretrained is failed" in answer(results, 6)
    report = report_on(study, tmp_path / "report")
    page = report.markdown.read_text()
    assert "**3 of 6 cells have no result**" in page
    assert "**failed**" in page
    assert f"`{failed.name}` failed: OSError: http://server is \\<gone>" in page
    assert "failed: OSError: http://server is &lt;gone&gt;" in report.html.read_text()


def test_what_limits_the_numbers_is_said_with_them(tmp_path: Path) -> None:
    """Learning rates at the edge, a late best checkpoint, bad volumes, and a grid of another experiment."""
    study = make_study(tmp_path, sizes=[6], lr=[1e-4, 3e-4, 1e-3])
    outcomes = {cell: Outcome(flat([1 - 100 * cell.lr]), flat([0.5])) for cell in cells(study.finetune)}
    outcomes[Cell.of(6, "random", 3e-4, 0)].left_out = 1
    outcomes[Cell.of(6, "pretrained", 3e-4, 0)].selected = 400
    record(study, outcomes, tmp_path)
    other = study.model_copy(update={"cache": "elsewhere"})
    page = " ".join(report_on(other, tmp_path / "report").markdown.read_text().split())
    for note in (
        "Of 2 chosen learning rates, 2 lay at the edge of what was tried.",
        "In 1 of 6 finished cells the last checkpoint was the best (step 400). Training may have ended",
        "**1 cell trained on fewer volumes than the split says**",
        "n06-random-lr0.0003-run0 on 5.",
        "**This grid was run with another version of the experiment**",
    ):
        assert note in page
    page = report_on(study, tmp_path / "again").markdown.read_text()
    assert "another version" not in page


def test_nothing_but_holes_is_still_a_report(tmp_path: Path) -> None:
    """A grid of which every trial failed."""
    study = make_study(tmp_path)
    outcomes = constant(study, 0.5, 0.6)
    for outcome in outcomes.values():
        outcome.status, outcome.curve = "FAILED", {}
    record(study, outcomes, tmp_path)
    report = report_on(study, tmp_path / "report")
    assert report.table.count("no answer") == 2
    Page(report.html.read_text())


@pytest.mark.parametrize("init", ["random", "pretrained"])
def test_a_grid_of_one_initialisation_reports_it_alone(tmp_path: Path, init: str) -> None:
    """No difference is made up, and the other column says why it is empty."""
    study = make_study(tmp_path, init=[init])
    tracker = record(study, constant(study, 0.5, 0.5), tmp_path)
    row = honest_table(read_results(study, tracker)).rows[0]
    assert sorted(row[3:5]) == ["0.500", "not in the grid"]
    assert row[5] == "n/a"
    report = report_on(study, tmp_path / "report")
    assert f"{init} initialisation reaches foreground Dice 0.500" in report.table
    assert ("Restoring corrupted patches" in report.markdown.read_text()) == (init == "pretrained")


@pytest.mark.parametrize(
    ("gains", "verdict"),
    [
        ([0.05, 0.04, 0.06, 0.07, 0.03, 0.05, 0.04, 0.06], "a clear gain"),
        ([-0.05, -0.04, -0.06, -0.07, -0.03, -0.05, -0.04, -0.06], "a clear loss"),
        ([0.05, -0.04, 0.06, -0.07, 0.03, -0.05, 0.04, -0.01], "no clear difference**."),
        ([0.0] * 8, "no clear difference**."),
        ([0.05, 0.04, 0.06], "no clear difference** (the interval excludes 0"),
        ([0.05], "no conclusion"),
    ],
)
def test_an_answer_is_clear_only_if_the_interval_excludes_zero(
    tmp_path: Path, gains: list[float], verdict: str
) -> None:
    """And if there are volumes enough that chance alone could not have done it."""
    study = make_study(tmp_path, sizes=[6], lr=[1e-4])
    outcomes = {
        cell: Outcome([], flat([0.5 + (gain if cell.init == "pretrained" else 0) for gain in gains]))
        for cell in cells(study.finetune)
    }
    results = read_results(study, record(study, outcomes, tmp_path))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        sentence = answer(results, 6)
    assert verdict in sentence
    assert f"{np.mean(gains):+.3f}" in sentence


def test_interval_covers_the_mean_about_as_often_as_it_says() -> None:
    """Of 100 samples of 40 values, the 95 % intervals of about 95 hold the true mean."""
    random = np.random.default_rng(0)
    bounds = [interval(random.normal(0.03, 0.1, 40)) for _ in range(100)]
    covered = sum(low <= 0.03 <= high for low, high in bounds)
    assert stats.binomtest(covered, 100, 0.95).pvalue > 0.01


def test_three_equal_gains_are_never_clear_and_six_are() -> None:
    """The sign-flip test has 2 of 2^n chances to be as extreme: below 5 % from six volumes on."""
    assert not difference(np.array([0.1, 0.11, 0.12]), np.array([0.11])).clear
    found = difference(np.array([0.1, 0.11, 0.12, 0.13, 0.14, 0.15]), np.array([0.125]))
    assert found.clear
    assert found.p == pytest.approx(2 / 64)


def test_a_gain_that_one_seed_contradicts_is_not_clear(tmp_path: Path) -> None:
    """Volumes agree with each other here, trainings do not."""
    study = make_study(tmp_path, sizes=[6], lr=[1e-4], runs=2)
    gains = {0: 0.1, 1: -0.02}
    outcomes = {
        cell: Outcome([], flat([0.5 + (gains[cell.run] if cell.init == "pretrained" else 0)] * 8))
        for cell in cells(study.finetune)
    }
    assert "but the seeds disagree: +0.100, -0.020" in answer(read_results(study, record(study, outcomes, tmp_path)), 6)


def test_without_a_test_split_validation_is_reported_and_called_so(tmp_path: Path) -> None:
    """The tables' headers and a note say that the same volumes made the selection."""
    study = make_study(tmp_path, sizes=[6])
    outcomes = {cell: Outcome(flat([0.5, 0.7])) for cell in cells(study.finetune)}
    results = read_results(study, record(study, outcomes, tmp_path))
    assert "validation volumes" in honest_table(results).header
    assert "No test split" in report_on(study, tmp_path / "report").markdown.read_text()


def test_organs_have_the_volumes_that_hold_them(tmp_path: Path) -> None:
    """An organ that is absent from a volume does not count there; names that MLflow refuses are found again."""
    study = make_study(tmp_path, sizes=[6], lr=[1e-4])
    scored = [case("a", [0.4, None], hd95=4), case("b", [0.6, 0.8], hd95=8)]
    organs = ("liver (right|left)", "spleen")
    outcomes = {cell: Outcome([], scored, organs=organs) for cell in cells(study.finetune)}
    table = organ_table(read_results(study, record(study, outcomes, tmp_path)), 6)
    assert table.rows[0] == ["liver (right|left)", "2", "0.500", "0.500", "+0.000", "6.0", "6.0", "+0.0"]
    assert table.rows[1][:3] == ["spleen", "1", "0.800"]
    cells_of_row = re.split(r"(?<!\\)\|", str(table).splitlines()[2])
    assert len(cells_of_row) == len(table.header) + 2


@dataclass
class Written:
    """A study of two splits and two learning rates, its MLflow experiment and its report."""

    study: Study
    tracker: Tracker
    report: Report


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory, empty_database: Path) -> Written:
    """Shared by the tests that only look at it."""
    folder = tmp_path_factory.mktemp("written")
    shutil.copy(empty_database, folder / "mlflow.db")
    study = make_study(folder)
    tracker = record(study, constant(study, 0.5, 0.6), folder)
    return Written(study, tracker, report_on(study, folder / "report"))


def test_the_page_needs_nothing_beside_it(written: Written) -> None:
    """HTML: well-formed, pictures inside, no script, no reference to anything outside. Markdown: relative links."""
    report = written.report
    page = Page(report.html.read_text())
    assert not page.open
    assert not {"script", "link", "iframe", "object"} & set(page.tags)
    assert page.references
    assert all(reference.startswith("data:image/png;base64,") for reference in page.references)
    names = [path.stem for path in report.figures]
    assert names == ["label_efficiency", "organs", "finetuning", "pretraining", "restored"]
    assert len(page.references) == page.tags.count("figcaption") == len(names)
    links = re.findall(r"!\[.*?\]\((.*?)\)", report.markdown.read_text())
    assert {report.markdown.parent / link for link in links} == set(report.figures)
    assert all(path.is_file() for path in report.figures)


def test_listings_are_folded_away_and_groups_of_rows_set_apart(written: Written) -> None:
    """Each listing lies in a `details` under its heading; a line begins each measure of the honest table."""
    html = written.report.html.read_text()
    folded = re.findall(r"<details>\s*<summary>(.*?)</summary>\s*<pre>", html)
    assert folded == ["Experiment (resolved)", "Run ids of the cells"]
    assert html.count("<pre>") == len(folded)
    assert re.findall(r'<tr class="group">\s*<td>(\w+)', html) == ["HD95", "surface", "12"]


def test_text_from_outside_is_shown_as_it_is(tmp_path: Path) -> None:
    """An organ's name and an error may look like HTML or Markdown: the page shows them, and nothing is loaded."""
    study = make_study(tmp_path, sizes=[6], lr=[1e-4])
    organs = ("<script>x</script>", "[a](http://b) | ![c](http://d)")
    outcomes = constant(study, 0.5, 0.6)
    for outcome in outcomes.values():
        outcome.organs = organs
    failure = r"a <b> *c* `d` __e__ ![f](http://g) <http://h> \[i\] &amp; "
    failed = Cell.of(6, "random", 1e-4, 0)
    outcomes[failed].status, outcomes[failed].failure = "FAILED", failure
    record(study, outcomes, tmp_path)
    page = Page(report_on(study, tmp_path / "report").html.read_text())
    assert "script" not in page.tags
    assert all(reference.startswith("data:image/png;base64,") for reference in page.references)
    for text in (*organs, f"failed: {failure.strip()}"):
        assert text in page.text


def test_writing_it_again_gives_the_same_bytes(written: Written, tmp_path: Path) -> None:
    """Bootstrap, figures and text depend on MLflow's content alone."""
    first, second = written.report, report_on(written.study, tmp_path / "report")
    assert first.table == second.table
    assert first.markdown.read_bytes() == second.markdown.read_bytes()
    assert first.html.read_bytes() == second.html.read_bytes()


def test_the_grid_run_keeps_the_report(written: Written) -> None:
    """Page, Markdown and the figures it refers to are its artifacts; the run stays as it ended."""
    tracker, report = written.tracker, written.report
    (grid,) = tracker.runs(kind="grid")
    assert tracker.files(grid.info.run_id, "report") == ["report/report.html", "report/report.md"]
    assert tracker.read(grid.info.run_id, "report/report.html") == report.html.read_bytes()
    assert len(tracker.files(grid.info.run_id, "report/figures")) == len(report.figures)
    assert grid.info.status == "FINISHED"


def test_newest_run_of_a_cell_counts_and_strangers_do_not(tmp_path: Path) -> None:
    """A repeated cell replaces the older one; trials that the study's grid does not name are left out."""
    study = make_study(tmp_path, sizes=[6], lr=[1e-4])
    outcomes = constant(study, 0.5, 0.6)
    outcomes[Cell.of(6, "random", 1e-2, 0)] = Outcome(flat([0.99]), flat([0.99]))
    tracker = record(study, outcomes, tmp_path)
    repeated = Cell.of(6, "random", 1e-4, 0).name
    tracker.open("trial", repeated, repeated, {}).close("FAILED")
    results = read_results(study, tracker)
    assert results.arms[6]["random"].hole == "failed"
    assert {trial.cell.lr for trial in results.trials} == {1e-4}


def test_a_cell_that_another_grid_finished_is_found_by_its_key(tmp_path: Path) -> None:
    """A grid with new pretrained weights does not train its random cells again; their runs lie under the older grid."""
    study = make_study(tmp_path, sizes=[6], lr=[1e-4])
    tracker = record(study, constant(study, 0.5, 0.6), tmp_path)
    random, pretrained = Cell.of(6, "random", 1e-4, 0).name, Cell.of(6, "pretrained", 1e-4, 0).name
    time.sleep(0.01)
    grid = tracker.open("grid", "h", "grid", run_params(study, "finetune"))
    grid.text(dump(study), "experiment.yaml")
    grid.text(json.dumps({random: random, pretrained: "not yet"}), "cells.json")
    grid.close()
    results = read_results(study, tracker)
    assert results.grid.info.run_id == grid.id
    assert results.arms[6]["random"].trials
    assert results.arms[6]["pretrained"].hole == "missing"


def test_provenance_names_runs_and_config_without_passwords(tmp_path: Path) -> None:
    """Run ids, the weight transfer, the resolved experiment, and how to open MLflow."""
    study = make_study(tmp_path, sizes=[6], lr=[1e-4])
    secret = study.model_copy(update={"cache": "s3://user:secret@store/cache"})
    tracker = record(secret, constant(secret, 0.5, 0.6), tmp_path)
    report = report_on(secret, tmp_path / "report")
    for text in (report.markdown.read_text(), report.html.read_text()):
        assert all(
            run.info.run_id in text for kind in ("grid", "pretraining", "trial") for run in tracker.runs(kind=kind)
        )
        assert "conv3d_transpose.bias" in text
        assert f"mlflow ui --backend-store-uri {tracker_of(study).uri}" in text
        assert "secret" not in text
    config = re.search(r"### Experiment \(resolved\)\n\n```\n(.*?)```", report.markdown.read_text(), re.DOTALL)
    assert config is not None
    assert yaml.safe_load(config[1])["name"] == "fake"


def test_a_study_without_a_grid_says_so(tmp_path: Path) -> None:
    """No experiment, or none with a grid: something to mend, not a traceback."""
    study = make_study(tmp_path)
    with pytest.raises(ValueError, match="MLflow experiment 'fake' does not exist"):
        report_on(study, tmp_path / "report")
    tracker_of(study)
    with pytest.raises(UserError, match="no fine-tuning grid yet"):
        report_on(study, tmp_path / "report")


def test_hd95_difference_of_shared_volumes_is_in_millimetres(tmp_path: Path) -> None:
    """Pretrained minus random, so that less is better."""
    study = make_study(tmp_path, sizes=[6], lr=[1e-4])
    outcomes = {
        cell: Outcome([], [case(f"t{n}", [0.5, 0.5], hd95=9.0 if cell.init == "random" else 6.5) for n in range(6)])
        for cell in cells(study.finetune)
    }
    results = read_results(study, record(study, outcomes, tmp_path))
    found = results.compare(6, HD95)
    assert found is not None
    assert found.mean == pytest.approx(-2.5)
    assert honest_table(results).rows[1][3:] == ["9.0", "6.5", "-2.5 (-2.5 to -2.5)"]


def test_the_report_loads_neither_torch_nor_ray() -> None:
    """They take seconds to import, and a report needs nothing of them."""
    code = "import sys, ssl_ray.report.write; print(sorted({'torch', 'ray', 'monai'} & set(sys.modules)))"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"
