"""Runs in folds, and the permuted control: what the report makes of them."""

import re
from pathlib import Path

import numpy as np
import pytest
from recorded import Outcome, concluded, flat, make_study, record
from studies import place_database

from ssl_ray.config.schema import Study
from ssl_ray.report.answers import answer, answers
from ssl_ray.report.results import Results
from ssl_ray.report.tables import cell_table, honest_table
from ssl_ray.report.write import write_report
from ssl_ray.search.cells import Cell, cells
from ssl_ray.study.parts import tracker_of

FOLDS, PATIENTS = 3, 9
GAIN = np.linspace(0.05, 0.07, PATIENTS)
"""Of nine patients."""


def in_folds(folder: Path) -> Study:
    """Three runs in three folds of a pool."""
    study = make_study(folder, sizes=[6], lr=[1e-4], runs=3)
    cohort = study.finetune.cohort.model_copy(update={"pool": "pool.json", "folds": FOLDS})
    return study.model_copy(update={"finetune": study.finetune.model_copy(update={"cohort": cohort})})


def fold_outcomes(study: Study) -> dict[Cell, Outcome]:
    """Fold f of run r scores the patients r + f, r + f + 3, ...; pretrained gains `GAIN`, the runs differ a little."""
    outcomes = {}
    for cell in cells(study.finetune):
        assert cell.fold is not None
        mine = range((cell.run + cell.fold) % FOLDS, PATIENTS, FOLDS)
        added = GAIN + 0.002 * cell.run if cell.init == "pretrained" else np.zeros(PATIENTS)
        scores = flat(list(0.5 + 0.01 * cell.run + added))
        outcomes[cell] = Outcome(flat([0.4 + 0.1 * cell.fold], "v"), [scores[patient] for patient in mine])
    return outcomes


def differences(results: Results) -> np.ndarray:
    """By run, and by patient in the order of their names."""
    return results.comparisons[6].differences[:, np.argsort(results.common[6].patients)]


def test_a_run_in_folds_scores_every_patient_once(tmp_path: Path) -> None:
    """D is complete, runs by patients, whatever fold each was scored in."""
    study = in_folds(tmp_path)
    results = concluded(study, fold_outcomes(study), PATIENTS)
    np.testing.assert_allclose(differences(results), GAIN + 0.002 * np.arange(3)[:, None])
    assert results.count("test") == PATIENTS
    assert len(results.trials) == 2 * 3 * FOLDS
    assert (
        "**a clear gain** for this pretraining, for draws from this pool of 9 (draws share most volumes), in 3 folds."
        in answer(results, 6)
    )
    assert results.arms[6]["random"].trials[0].metrics["selected/validation/dice_foreground"] == pytest.approx(0.5)


def test_a_run_that_lacks_a_fold_is_left_out(tmp_path: Path) -> None:
    """With its patients, in both arms; the other runs keep all of theirs."""
    study = in_folds(tmp_path)
    for status, nonfinite in (("FAILED", True), ("MISSING", False)):
        outcomes = fold_outcomes(study)
        lost = outcomes[Cell.of(6, "random", 1e-4, 1, 2)]
        lost.status, lost.nonfinite = status, nonfinite
        results = concluded(study, outcomes, PATIENTS)
        assert list(results.common[6].runs) == [0, 2]
        assert differences(results).shape == (2, PATIENTS)
        sentence = answer(results, 6)
        assert "Left out: 1 run that not both initialisations finished." in sentence
        assert ("**n06-random-lr0.0001-run1 failed with a loss that was not finite**" in sentence) == nonfinite


def test_every_fold_has_its_row_and_its_choice_marked(tmp_path: Path) -> None:
    """The table of cells is of trainings."""
    study = in_folds(tmp_path)
    rows = cell_table(concluded(study, fold_outcomes(study), PATIENTS)).rows
    assert [row[3] for row in rows[:4]] == ["0, fold 0", "0, fold 1", "0, fold 2", "1, fold 0"]
    assert {row[2] for row in rows} == {"**0.0001**"}


def controlled(folder: Path, sizes: tuple[int, ...] = (6, 12), runs: int = 3) -> Study:
    return make_study(folder, sizes=sizes, lr=[1e-4], runs=runs, init=["random", "pretrained", "permuted"])


def control_outcomes(study: Study, control: float = 0.01) -> dict[Cell, Outcome]:
    """Pretrained gains 0.06 or so, permuted `control`."""
    added = {"random": 0 * GAIN, "pretrained": GAIN, "permuted": np.full(PATIENTS, control)}
    outcomes = {}
    for cell in cells(study.finetune):
        wobble = 0.004 * (cell.run - 1) if cell.init != "random" else 0
        scores = flat(list(0.5 + 0.05 * cell.run + added[cell.init] + wobble))
        outcomes[cell] = Outcome(flat([0.5], "v"), scores)
    return outcomes


@pytest.mark.parametrize("fate", ["fine", "better", "one run failed", "all failed", "another patient"])
def test_the_control_changes_nothing_of_the_claim(tmp_path: Path, fate: str) -> None:
    """Whatever becomes of it: differences, verdict and multiplier are those of a study without it."""
    plain = make_study(tmp_path, sizes=[6, 12], lr=[1e-4], runs=3)
    study = controlled(tmp_path)
    outcomes = control_outcomes(study, 0.2 if fate == "better" else 0.01)
    before = concluded(plain, {cell: one for cell, one in outcomes.items() if cell.init != "permuted"})
    for cell, outcome in outcomes.items():
        if cell.init == "permuted" and (fate == "all failed" or (fate == "one run failed" and cell.run == 1)):
            outcome.status, outcome.nonfinite = "FAILED", True
        if cell.init == "permuted" and fate == "another patient":
            outcome.test = outcome.test[1:]
    results = concluded(study, outcomes)
    for size, found in results.comparisons.items():
        expected = before.comparisons[size]
        assert np.array_equal(found.differences, expected.differences)
        assert (found.verdict, found.adjusted, found.worth) == (expected.verdict, expected.adjusted, expected.worth)
        assert honest_table(results).rows[0][:7] == honest_table(before).rows[0]
        claim, _, control = answer(results, size).partition(" The control: ")
        assert claim == answer(before, size)
        told = {"fine": "permuted - random +0.010 (95 % CI +0.000 to +0.020), pretrained - permuted +0.05"}
        assert control.startswith({"all failed": "", **told}.get(fate, "permuted - random +0."))
        assert bool(control) == (fate != "all failed")
    assert answers(results)[0] == answers(before)[0]
    column = [row[-1] for row in honest_table(results).rows[:2]]
    shown = {"better": "0.750 ± 0.054", "one run failed": "no run 1", "all failed": "no run 0, 1, 2"}
    assert column == [shown.get(fate, "0.560 ± 0.054")] * 2


def test_the_control_stands_beside_the_claim(tmp_path: Path) -> None:
    """A column of its own in the tables of the claim, a row for each cell, and what it is."""
    place_database(tmp_path / "mlflow.db")
    study = controlled(tmp_path, (6,), runs=1)
    outcomes = control_outcomes(study)
    results = concluded(study, outcomes)
    assert honest_table(results).header[-3:] == ["pretrained", "difference (95 % CI)", "permuted"]
    assert [row[1] for row in cell_table(results).rows].count("permuted") == 1
    record(study, outcomes, tmp_path)
    report = write_report(study, tracker_of(study, create=False), tmp_path / "report")
    page = " ".join(report.markdown.read_text().split())
    assert "Permuted is a control: the pretrained weights, shuffled within each tensor" in page
    assert re.search(r"\| +0\.506 \|", page)


def test_the_report_of_folds_that_selected_different_steps(tmp_path: Path) -> None:
    """An organ's fall is that of one training, at the step that it selected; a run of different ones has no step."""
    study = in_folds(tmp_path)
    outcomes = fold_outcomes(study)
    for cell, outcome in outcomes.items():
        outcome.selected = 400 if cell.fold == 0 else 200
        if cell.fold == 0:
            outcome.organ_curves = {"liver": {200: 0.4, 400: 0.1}, "spleen": {200: 0.5, 400: 0.6}}
        else:
            outcome.organ_curves = {"liver": {200: 0.4, 400: 0.5}, "spleen": {200: 0.5, 400: 0.2}}
    tracker = record(study, outcomes, tmp_path)
    text = write_report(study, tracker, tmp_path / "report").markdown.read_text()
    falls = [re.split(r" +\| +", line.strip("| ")) for line in text.splitlines() if " at step " in line and "|" in line]
    assert len(falls) == 2 * 3 * FOLDS
    assert "one line a run, the mean of its folds" in text
    assert ["liver", "6", "random", "0, fold 0", "0.400 at step 200", "0.100", "0.100"] in falls
    assert ["spleen", "6", "pretrained", "2, fold 1", "0.500 at step 200", "0.500", "0.200"] in falls
    for arm in concluded(study, outcomes, PATIENTS).arms[6].values():
        assert all("selected/step" not in trial.metrics for trial in arm.trials.values())
