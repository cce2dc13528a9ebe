"""The report from a small study that is written into MLflow as a real one would be."""

import json
import re
import sqlite3
import subprocess
import sys
import tarfile
import time
from contextlib import closing
from dataclasses import dataclass
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import yaml
from matplotlib.image import imread
from mlflow.entities import Metric
from mlflow.exceptions import MlflowException
from mlflow.tracking import MlflowClient
from recorded import Outcome, case, constant, flat, make_study, record
from store import keep, restore
from studies import place_database

from ssl_ray.config.loading import dump
from ssl_ray.config.schema import Study
from ssl_ray.errors import UserError
from ssl_ray.evaluate.planes import Planes, cut
from ssl_ray.report.answers import answer
from ssl_ray.report.examples import read_examples
from ssl_ray.report.results import read_results
from ssl_ray.report.tables import effort_table, honest_table, organ_table, published_table
from ssl_ray.report.write import Report, write_report
from ssl_ray.search.cells import Cell, cells
from ssl_ray.study.parts import run_params, tracker_of
from ssl_ray.tracking.client import DEVICE, Client
from ssl_ray.tracking.tracker import Tracker


@pytest.fixture(autouse=True)
def _database(tmp_path: Path) -> None:
    place_database(tmp_path / "mlflow.db")


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
        self.alternatives: list[str] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.references += [value or "" for name, value in attrs if name in ("src", "href", "srcset", "data")]
        self.alternatives += [value or "" for name, value in attrs if name == "alt"]
        if tag not in ("meta", "img", "br", "source"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def small_planes() -> Planes:
    """Of a volume in which something was missed."""
    image, truth = np.random.default_rng(0).random((8, 9, 7)), np.zeros((8, 9, 7), np.uint8)
    truth[2:5, 3:7, 2:4] = 2
    return cut(image, np.zeros_like(truth), truth, np.diag([2.0, 2, 3, 1]))


def test_tables_show_the_numbers_that_the_trials_logged(tmp_path: Path) -> None:
    """Published: background included, in percent; honest: organs only, as mean over volumes of their organs' mean."""
    study = make_study(tmp_path, sizes=[6], lr=[1e-4])
    random = [case("a", [0.4, None], 0.96), case("b", [0.6, 0.8], 0.98)]
    pretrained = [case("b", [0.7, 0.9], 0.98), case("a", [0.5, None], 0.96)]  # paired by id, not by position
    outcomes = {cell: Outcome([], random if cell.init == "random" else pretrained) for cell in cells(study.finetune)}
    results = read_results(study, record(study, outcomes, tmp_path))
    # volumes with background: (0.96 + 0.4) / 2 = 0.68 and (0.98 + 0.6 + 0.8) / 3 = 0.79333
    assert published_table(results).header[2] == "test volumes"
    assert published_table(results).rows[0] == ["6", "1", "2", "73.67", "79.50", "+5.83"]
    # without: 0.4 and 0.7
    assert honest_table(results).rows[0] == ["Dice", "6", "1", "2", "0.550", "0.650", "+0.100"]
    np.testing.assert_allclose(results.comparisons[6].differences, [[0.1, 0.1]])


def test_learning_rate_is_chosen_on_validation_not_on_test(tmp_path: Path) -> None:
    """The cell that is best on validation is reported, although the other one is better on test."""
    study = make_study(tmp_path, sizes=[6])
    outcomes = {
        cell: Outcome(flat([0.8 if cell.lr == 1e-4 else 0.7]), flat([0.5 if cell.lr == 1e-4 else 0.9]))
        for cell in cells(study.finetune)
    }
    results = read_results(study, record(study, outcomes, tmp_path))
    assert results.arms[6]["random"].lr == 1e-4
    assert honest_table(results).rows[0][4] == "0.500"


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
    assert [row[3:5] for row in published_table(results).rows] == [
        ["66.33", "failed"],
        ["unfinished", "73.00"],
        ["66.33", "missing"],
    ]
    assert "no answer**: no pretrained run is finished (failed)" in answer(results, 6)
    report = report_on(study, tmp_path / "report")
    page = report.markdown.read_text()
    assert "**3 of 6 cells have no result**" in page
    assert "**failed**" in page
    assert f"`{failed.name}` failed: OSError: http://server is \\<gone>" in page
    assert "failed: OSError: http://server is &lt;gone&gt;" in report.html.read_text()


@pytest.mark.slow
def test_what_limits_the_numbers_is_said_with_them(tmp_path: Path) -> None:
    """Learning rates at the edge, a late best checkpoint, bad volumes, and a grid of another experiment."""
    study = make_study(tmp_path, sizes=[6], lr=[1e-4, 3e-4, 1e-3])
    outcomes = {cell: Outcome(flat([1 - 100 * cell.lr]), flat([0.5])) for cell in cells(study.finetune)}
    outcomes[Cell.of(6, "pretrained", 3e-4, 0)].selected = 400
    bad = [("training", "img0003"), ("test", "img0041"), ("test", "img0042")]
    record(study, outcomes, tmp_path, [{"part": part, "id": name} for part, name in bad])
    other = study.model_copy(update={"finetune": study.finetune.model_copy(update={"margin": 0.03})})
    page = " ".join(report_on(other, tmp_path / "report").markdown.read_text().split())
    for note in (
        "Of 2 chosen learning rates, 2 lay at the edge of what was tried.",
        "In 1 of 6 finished cells the last checkpoint was the best (step 400). Training may have ended",
        "**1 training volume could not be used** and is left out everywhere: img0003.",
        "**2 test volumes could not be used** and are left out everywhere: img0041, img0042.",
        "**This grid was run with another version of the experiment**",
    ):
        assert note in page
    for same in (study, study.model_copy(update={"cache": "elsewhere"})):
        assert "another version" not in report_on(same, tmp_path / "again").markdown.read_text()


def test_nothing_but_holes_is_still_a_report(tmp_path: Path) -> None:
    """A grid of which every trial failed."""
    study = make_study(tmp_path)
    outcomes = constant(study, 0.5, 0.6)
    for outcome in outcomes.values():
        outcome.status, outcome.curve = "FAILED", {}
    record(study, outcomes, tmp_path)
    report = report_on(study, tmp_path / "report")
    assert report.table.count("there is no answer") == 2
    Page(report.html.read_text())


@pytest.mark.parametrize("init", ["random", "pretrained"])
def test_a_grid_of_one_initialisation_reports_it_alone(tmp_path: Path, init: str) -> None:
    """No difference is made up, and the other column says why it is empty."""
    study = make_study(tmp_path, init=[init])
    tracker = record(study, constant(study, 0.5, 0.5), tmp_path)
    row = honest_table(read_results(study, tracker)).rows[0]
    assert sorted(row[4:6]) == ["0.500", "not in the grid"]
    assert row[6] == "n/a"
    report = report_on(study, tmp_path / "report")
    assert f"{init} initialisation reaches foreground Dice 0.500" in report.table
    assert ("Restoring corrupted patches" in report.markdown.read_text()) == (init == "pretrained")


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
    assert table.header[5:] == [
        f"{name} {init}"
        for name in ("missed (%)", "HD95 (mm)", "false positive (%)")
        for init in ("random", "pretrained")
    ]
    assert table.rows[0] == [
        "liver (right|left)",
        "2",
        "0.500",
        "0.500",
        "+0.000",
        "0.0",
        "0.0",
        "6.0",
        "6.0",
        "n/a",
        "n/a",
    ]
    assert table.rows[1] == ["spleen", "1", "0.800", "0.800", "+0.000", "0.0", "0.0", "8.0", "8.0", "0.0", "0.0"]
    cells_of_row = re.split(r"(?<!\\)\|", str(table).splitlines()[2])
    assert len(cells_of_row) == len(table.header) + 2


@dataclass
class Written:
    """A study of two sizes and three runs, its MLflow experiment and its report."""

    study: Study
    tracker: Tracker
    report: Report


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Written:
    """Pretrained is better by 0.1, give or take 0.01; shared by the tests that only look at it."""
    folder = tmp_path_factory.mktemp("written")
    place_database(folder / "mlflow.db")
    study = make_study(folder, lr=[1e-4], runs=3)
    random, outcomes = np.random.default_rng(0), {}
    curves = {"liver": {200: 0.4, 400: 0.6}, "spleen": {200: 0.5, 400: 0.2}}
    for cell in cells(study.finetune):
        scores = flat(list(0.5 + (cell.init == "pretrained") * random.normal(0.1, 0.01, 8)))
        planes = {one.case: small_planes() for one in scores}
        outcomes[cell] = Outcome(scores[:2], scores, organ_curves=curves, planes=planes)
    tracker = record(study, outcomes, folder)
    return Written(study, tracker, report_on(study, folder / "report"))


def test_the_page_needs_nothing_beside_it(written: Written) -> None:
    """HTML: well-formed, pictures inside, no script, no reference to anything outside. Markdown: relative links."""
    report = written.report
    page = Page(report.html.read_text())
    assert not page.open
    assert not {"script", "link", "iframe", "object"} & set(page.tags)
    assert page.references
    assert all(reference.startswith("data:image/png;base64,") for reference in page.references)
    names = ["label_efficiency", "finetuning", "organ_map", "organ_curves", "pretraining"]
    pictures = ["examples_random", "examples_pretrained", "restored"]
    assert {path.stem for path in report.files} == {*names, *(f"{name}_dark" for name in names), *pictures}
    links = re.findall(r"!\[.*?\]\((.*?)\)", report.markdown.read_text())
    assert sorted(links) == sorted(f"figures/{name}.png" for name in [*names, *pictures])
    assert all(path.is_file() for path in report.files)
    assert page.tags.count("img") == page.tags.count("figcaption") == len(links)
    assert len(page.references) == len(report.files), "a dark twin for each figure, and none for what is dark itself"


def test_every_picture_is_told_in_words_and_drawn_for_a_small_screen(written: Written) -> None:
    """Alternative texts with numbers; letters of ten points in figures of 4.8 inches are 11 pixels high in 380."""
    page = Page(written.report.html.read_text())
    assert len(set(page.alternatives)) == page.tags.count("img")
    assert min(len(text.split()) for text in page.alternatives) > 5
    assert any(
        re.search(r"with 6, random 0\.\d+ ± 0\.\d+, pretrained 0\.\d+ ± .*; with 12,", text)
        for text in page.alternatives
    )
    widths = {path.stem: imread(path).shape[1] for path in written.report.files if path.stem != "restored"}
    assert set(widths.values()) == {960}


def test_examples_are_the_best_the_median_and_the_worst_patient(tmp_path: Path) -> None:
    """By the mean over runs; of a patient with two volumes, the worse one; what a run did not keep is left out."""
    study = make_study(tmp_path, sizes=[6], lr=[1e-4], runs=2)
    dice = {"a": (0.9, 0.1), "b": (0.6, 0.6), "c": (0.2, 0.6), "d": (0.8, 0.8), "e": (0.7, 0.7)}  # of two runs
    outcomes = {}
    for cell in cells(study.finetune):
        scores = [
            case(f"{name}{n}", [both[cell.run] + n / 10] * 2, subject=name)
            for name, both in dice.items()
            for n in (0, 1)
        ]
        planes = {one.case: small_planes() for one in scores if cell.init == "random" or one.subject != "d"}
        outcomes[cell] = Outcome([], scores, planes=planes)
    tracker = record(study, outcomes, tmp_path)
    examples = read_examples(read_results(study, tracker), tracker)
    ranks = [(one.rank, one.case, round(one.dice, 3)) for one in examples["random"]]
    assert ranks == [("best", "d0", 0.85), ("median", "b0", 0.65), ("worst", "c0", 0.45)]
    assert [one.rank for one in examples["pretrained"]] == ["median", "worst"]
    assert {one.cell for one in examples["random"]} == {Cell.of(6, "random", 1e-4, 0).name}


def test_an_organ_that_rose_and_fell_is_named(written: Written) -> None:
    """In every run in which it did, with its best, and where it ended."""
    text = written.report.markdown.read_text()
    rows = [line for line in text.splitlines() if re.match(r"\| spleen +\| +\d+ +\| (random|pretrained) ", line)]
    assert len(rows) == 12
    assert all("0.500 at step 200" in row and row.rstrip(" |").endswith("0.200") for row in rows)
    assert "In 12 cases **an organ's Dice on validation rose" in text


def test_hours_are_those_in_which_a_training_ran(tmp_path: Path) -> None:
    """What lies between a stop and the next start does not count; half a GPU for an hour is half a GPU hour."""
    study = make_study(tmp_path, sizes=[6], lr=[1e-4])
    tracker = tracker_of(study)
    trial = tracker.open("trial", "a", "a", {"finetune.gpus_per_trial": "0.5", "finetune.cpus_per_trial": "3.0"})
    pretraining = tracker.open("pretraining", "p", "p", {"pretrain.gpu": "False", "pretrain.cpus_per_worker": "2.0"})
    never = tracker.open("trial", "b", "b", {"finetune.gpus_per_trial": "0.0", "finetune.cpus_per_trial": "1.0"})
    tracker.settle()
    at = {"system/started_at": ((0, 0), (5, 1)), "lr": ((1, 10), (6, 20)), "selected/step": ((6.5, 20),)}
    for run in (trial, pretraining):
        run.tags({DEVICE: "some kind"})
        points = [Metric(name, 4, int(hour * 3.6e6), step) for name, values in at.items() for hour, step in values]
        tracker.client.log_batch(run.id, [*points, Metric("system/workers", 4, 0, 0)])
    runs: Any = SimpleNamespace(
        pretraining=[SimpleNamespace(run=tracker.client.get_run(pretraining.id))],
        trials=[SimpleNamespace(run_id=one) for one in (trial.id, never.id, None)],
    )
    assert effort_table(runs, tracker).rows == [
        ["pretraining", "some kind", "1", "2.50", "20.00 core hours"],
        ["fine-tuning", "some kind", "1", "2.50", "1.25 GPU hours"],
    ]


def test_listings_are_folded_away(written: Written) -> None:
    """Each lies in a `details` under its heading."""
    html = written.report.html.read_text()
    folded = re.findall(r"<details>\s*<summary>(.*?)</summary>\s*<pre>", html)
    assert folded == ["Experiment (resolved)", "Run ids of the cells"]
    assert html.count("<pre>") == len(folded)


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
    volume = "![a](http:&sol;&sol;b&sol;c.png)"
    command = "ssl-ray run a.yaml --set 'name=` ![x](http://y/z.png) `'"
    tracker = record(study, outcomes, tmp_path, [{"part": "training", "id": volume, "reason": "empty"}])
    grid = read_results(study, tracker).grid.info.run_id
    MlflowClient(str(study.tracking.uri)).set_tag(grid, "mlflow.source.name", command)
    report = report_on(study, tmp_path / "report")
    page = Page(report.html.read_text())
    assert "script" not in page.tags
    assert page.tags.count("img") == len(re.findall(r"^!\[", report.markdown.read_text(), re.MULTILINE))
    assert all(reference.startswith("data:image/png;base64,") for reference in page.references)
    for text in (*organs, volume, command, f"failed: {failure.strip()}"):
        assert text in page.text


@pytest.mark.slow
def test_writing_it_again_gives_the_same_bytes(written: Written, tmp_path: Path) -> None:
    """Figures and text depend on MLflow's content alone."""
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
    assert len(tracker.files(grid.info.run_id, "report/figures")) == len(report.files)
    assert grid.info.status == "FINISHED"


def test_the_grid_run_has_the_answers_as_metrics_and_tags(written: Written) -> None:
    """The numbers of the claim by size, and the verdicts in words."""
    (grid,) = written.tracker.runs(kind="grid")
    found = read_results(written.study, written.tracker).comparisons
    metrics, tags = grid.data.metrics, grid.data.tags
    assert metrics["answer/n06/difference"] == pytest.approx(float(found[6].found.mean))
    assert metrics["answer/n06/low"] < metrics["answer/n06/difference"] < metrics["answer/n06/high"]
    assert metrics["answer/n12/p_holm"] == pytest.approx(found[12].adjusted)
    assert (metrics["answer/n06/runs"], metrics["answer/n06/patients"]) == (3, 8)
    assert tags["answer"] == tags["answer/n06"] == "a clear gain for this pretraining, for these labelled volumes"


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


def test_a_grid_of_another_study_in_the_same_experiment_is_not_reported(tmp_path: Path) -> None:
    """It is newer, and has cells of the same names that began with other weights."""
    study = make_study(tmp_path, sizes=[6], lr=[1e-4])
    tracker = record(study, constant(study, 0.5, 0.6), tmp_path)
    (own,) = tracker.runs(kind="grid")
    time.sleep(0.01)
    tracker.facts["ssl_ray.study"] = "other"
    other = tracker.open("grid", "h", "grid", run_params(study, "finetune"))
    other.text(dump(study.model_copy(update={"name": "other"})), "experiment.yaml")
    other.text(
        json.dumps({Cell.of(6, init, 1e-4, 0).name: "theirs" for init in ("random", "pretrained")}), "cells.json"
    )
    other.close()
    asked = study.model_copy(update={"finetune": study.finetune.model_copy(update={"margin": 0.05})})
    results = read_results(asked, tracker)
    assert results.grid.info.run_id == own.info.run_id
    assert results.arms[6]["pretrained"].trials


def test_provenance_names_runs_and_config_without_passwords(tmp_path: Path) -> None:
    """Run ids, the weight transfer, the resolved experiment, and how to open MLflow."""
    study = make_study(tmp_path, sizes=[6], lr=[1e-4])
    secret = study.model_copy(update={"cache": "s3://user:secret@store/cache"})
    tracker = record(secret, constant(secret, 0.5, 0.6), tmp_path)
    (grid,) = tracker.runs(kind="grid")
    command = "a command --set cache=s3://user:secret@store/cache"
    tracker.conclude(grid.info.run_id, {}, {"mlflow.source.name": command, "mlflow.source.git.commit": "c0ffee" * 5})
    report = report_on(secret, tmp_path / "report")
    for text in (report.markdown.read_text(), report.html.read_text()):
        assert all(
            run.info.run_id in text for kind in ("grid", "pretraining", "trial") for run in tracker.runs(kind=kind)
        )
        assert "conv3d_transpose.bias" in text
        assert "a command --set cache=s3://store/cache" in text
        assert f"commit {'c0ffee' * 5}" in text
        assert f"mlflow ui --backend-store-uri {tracker_of(study).uri}" in text
        assert "secret" not in text
    config = re.search(r"### Experiment \(resolved\)\n\n```\n(.*?)```", report.markdown.read_text(), re.DOTALL)
    assert config is not None
    assert yaml.safe_load(config[1])["name"] == "fake"


def test_the_store_of_an_earlier_version_is_still_reported(tmp_path: Path) -> None:
    """`golden.tar.xz`: SQL and artifacts as they were first written with runs, patients and a cell that went astray.

    12 trials of two sizes, three runs, one learning rate; four patients with two volumes each, one without a spleen.
    """
    restore(Path(__file__).with_name("golden.tar.xz"), tmp_path / "output")
    (tmp_path / "output" / "mlflow.db").replace(tmp_path / "mlflow.db")
    study = make_study(tmp_path, lr=[1e-4], runs=3)
    try:
        MlflowClient(study.tracking.uri).search_experiments()
    except MlflowException:  # its tables are those of an older MLflow
        subprocess.run([sys.executable, "-m", "mlflow", "db", "upgrade", str(study.tracking.uri)], check=True)
    lines = report_on(study, tmp_path / "report").table.splitlines()
    scope = "for this pretraining, for these labelled volumes."
    assert lines[:3] == [
        f"- Primary question, 6 labelled volumes: a clear gain {scope}",
        "- With 6 labelled volumes, pretraining changes foreground Dice by +0.059 (95 % CI +0.042 to +0.076; 3 runs, "
        f"4 test patients): a clear gain {scope} Here pretraining is worth 1.5 times the labels (95 % CI 1.3 to 1.7).",
        "- With 12 labelled volumes, pretraining changes foreground Dice by +0.065 (95 % CI +0.049 to +0.081; 2 runs, "
        f"4 test patients): not known {scope} As far as 2 runs can tell, about 3 runs would show a difference of 0.02, "
        "if there is one (80 % power); no number of patients alone would. "
        "n12-pretrained-lr0.0001-run0 failed with a loss that was not finite; leaving that out favours its "
        "initialisation. Left out: 1 run that not both initialisations finished.",
    ]
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines if line.startswith("| Dice")]
    assert rows == [
        ["Dice", "6", "3", "4", "0.410 ± 0.010", "0.469 ± 0.011", "+0.059 (+0.042 to +0.076)"],
        ["Dice", "12", "2", "4", "0.515 ± 0.007", "0.580 ± 0.010", "+0.065 (+0.049 to +0.081)"],
    ]


@pytest.mark.slow
def test_a_store_without_weights_gives_the_same_report_elsewhere(tmp_path: Path) -> None:
    """Kept as a file and restored in a folder whose name is another one in URIs; no weights are in the file."""
    here, there = tmp_path / "a folder", tmp_path / "elsewhere"
    studies = [make_study(folder, lr=[1e-4]) for folder in (here, there)]
    record(studies[0], constant(studies[0], 0.5, 0.6), here)
    weights = next((here / "output" / "artifacts").rglob("evaluation.json")).with_name("model.safetensors")
    weights.write_bytes(b"weights")
    first = report_on(studies[0], tmp_path / "first")
    (here / "mlflow.db").replace(here / "output" / "mlflow.db")
    keep(here / "output", tmp_path / "kept.tar.xz")
    restore(tmp_path / "kept.tar.xz", there / "output")
    assert not [*there.rglob("*.safetensors"), *there.rglob("report.html")]
    (there / "output" / "mlflow.db").replace(there / "mlflow.db")
    second = report_on(studies[1], tmp_path / "second")
    assert second.table == first.table
    assert {path.name for path in second.files} == {path.name for path in first.files}
    answers = [(tmp_path / name / "answer.csv").read_bytes() for name in ("first", "second")]
    assert answers[0] == answers[1]
    with pytest.raises(SystemExit, match="has a store of its own"):
        restore(tmp_path / "kept.tar.xz", here / "output")


@pytest.mark.parametrize("script", ["ATTACH '{0}' AS o; DROP TABLE o.runs;", "VACUUM INTO '{0}.new';"])
def test_a_kept_store_reaches_no_other_database(tmp_path: Path, script: str) -> None:
    """The SQL in it may come from anybody."""
    other = tmp_path / "other.db"
    with closing(sqlite3.connect(other)) as database:
        database.execute("CREATE TABLE runs(x)")
    (path := tmp_path / "mlflow.sql").write_text(script.format(other))
    with tarfile.open(tmp_path / "kept.tar.xz", "w:xz") as packed:
        packed.add(path, path.name)
    with pytest.raises(sqlite3.OperationalError, match="attached"):
        restore(tmp_path / "kept.tar.xz", tmp_path / "output")
    with closing(sqlite3.connect(other)) as database:
        assert database.execute("SELECT name FROM sqlite_master").fetchall() == [("runs",)]
    assert not Path(f"{other}.new").exists()


def test_a_study_without_a_grid_says_so(tmp_path: Path) -> None:
    """No experiment, or none with a grid: something to mend, not a traceback."""
    study = make_study(tmp_path)
    with pytest.raises(ValueError, match="MLflow experiment 'fake' does not exist"):
        report_on(study, tmp_path / "report")
    tracker_of(study)
    with pytest.raises(UserError, match="no fine-tuning grid yet"):
        report_on(study, tmp_path / "report")


@pytest.mark.slow
def test_the_report_loads_neither_torch_nor_ray() -> None:
    """They take seconds to import, and a report needs nothing of them, nor does `ssl-ray report`."""
    code = "import sys, ssl_ray.study.reporting; print(sorted({'torch', 'ray', 'monai'} & set(sys.modules)))"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"


@pytest.mark.slow
def test_another_experiment_does_not_replace_the_report(tmp_path: Path) -> None:
    """Of a study whose cells are all others, e.g. without the --set of its run, there is nothing to report."""
    study = make_study(tmp_path, lr=[1e-4])
    record(study, constant(study, 0.5, 0.6), tmp_path)
    before = report_on(study, tmp_path / "report").markdown.read_bytes()
    with pytest.raises(UserError, match=r"none of the cells of this experiment .*lr0\.0001.*, and not .*lr0\.0005"):
        report_on(make_study(tmp_path, lr=[5e-4]), tmp_path / "report")
    assert (tmp_path / "report" / "report.md").read_bytes() == before


@pytest.mark.slow
@pytest.mark.parametrize("request_name", ["log_artifact", "set_experiment_tag", "log_batch"])
def test_an_outage_while_it_is_written_loses_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request_name: str
) -> None:
    """MLflow goes away between what is read and what is written: it is said, and the same command writes all of it."""
    study = make_study(tmp_path, lr=[1e-4])
    record(study, constant(study, 0.5, 0.6), tmp_path)

    def gone(*_: Any, **__: Any) -> None:
        raise ConnectionError("gone")

    with monkeypatch.context() as outage:
        outage.setattr(Client, request_name, gone)
        with pytest.raises(UserError, match=r"does not answer \(gone\)"):
            report_on(study, tmp_path / "report")
    report_on(study, tmp_path / "report")
    client = MlflowClient(study.tracking.uri)
    experiment = client.get_experiment_by_name("fake")
    (grid,) = tracker_of(study, create=False).runs(kind="grid")
    assert grid.data.tags["answer"]
    assert "answer/n06/difference" in grid.data.metrics
    assert "Does pretraining help" in experiment.tags["mlflow.note.content"]
    assert "label_efficiency.png" in {artifact.path for artifact in client.list_artifacts(grid.info.run_id)}
    assert "report/report.html" in {artifact.path for artifact in client.list_artifacts(grid.info.run_id, "report")}
