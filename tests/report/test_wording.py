"""What the report says where something is missing, and what it counts."""

from pathlib import Path

import numpy as np
import pytest
from recorded import Outcome, case, concluded, flat, make_study, record

from ssl_ray.config.schema import Study
from ssl_ray.report.answers import answer, answers
from ssl_ray.report.tables import honest_table, organ_table
from ssl_ray.report.write import write_report
from ssl_ray.search.cells import Cell, cells

GAIN = np.array([0.06, 0.07, 0.05, 0.08, 0.06, 0.07, 0.05, 0.06])
"""Of eight patients."""


def outcomes_of(study: Study, level: float = 0.0, subject: str = "") -> dict[Cell, Outcome]:
    """Pretrained gains something everywhere; 12 labels add `level` to both; `subject` begins the patients' names."""
    outcomes = {}
    for cell in cells(study.finetune):
        dice = 0.5 + 0.004 * cell.run + (level if cell.size == 12 else 0) + GAIN * (cell.init == "pretrained")
        scored = [
            case(f"t{number}", [one] * 2, subject=subject and f"{subject}{number}") for number, one in enumerate(dice)
        ]
        outcomes[cell] = Outcome(flat([0.5] * 2, "v"), scored)
    return outcomes


def page(study: Study, outcomes: dict[Cell, Outcome], folder: Path) -> str:
    """The whole report in Markdown."""
    tracker = record(study, outcomes, folder / "recorded")
    return " ".join(write_report(study, tracker, folder / "report").markdown.read_text().split())


def lose(outcomes: dict[Cell, Outcome], *lost: tuple[int, str, int]) -> None:
    """Let trials fail: size, initialisation, run."""
    for cell, outcome in outcomes.items():
        if (cell.size, cell.init, cell.run) in lost:
            outcome.status = "FAILED"


@pytest.mark.slow
@pytest.mark.parametrize("lost", [(), (0, 1, 2), (0,)])
def test_what_pretraining_is_worth_is_not_always_known(tmp_path: Path, lost: tuple[int, ...]) -> None:
    """More labels that did not help, no random run with 12 labels, or no run that was finished with both numbers."""
    study = make_study(tmp_path, sizes=[6, 12], lr=[1e-4], runs=3)
    outcomes = outcomes_of(study, level=0.1 if lost else 0.0)
    lose(outcomes, *((12, "random", run) for run in lost))
    if len(lost) == 1:
        lose(outcomes, (6, "random", 1), (6, "random", 2))
    results = concluded(study, outcomes)
    assert results.comparisons
    assert not any(found.worth for found in results.comparisons.values())
    text = page(study, outcomes, tmp_path)
    assert "What pretraining is worth in labels is not known: more labelled volumes did not help" in text


def test_the_largest_size_is_not_worth_at_least_once_the_labels(tmp_path: Path) -> None:
    """Random was not measured with more labels, so that nothing can be said there."""
    study = make_study(tmp_path, sizes=[6, 12], lr=[1e-4], runs=3)
    results = concluded(study, outcomes_of(study, level=0.1))
    assert "times the labels" in answer(results, 6)
    assert results.comparisons[12].worth
    assert "times the labels" not in answer(results, 12)


@pytest.mark.parametrize(("subject", "labelled"), [("p", "labelled patient"), ("", "labelled volume")])
def test_from_a_pool_patients_are_counted(tmp_path: Path, subject: str, labelled: str) -> None:
    """Where the lists name them; one size is one question, which nothing is corrected for."""
    study = make_study(tmp_path, sizes=[6], lr=[1e-4], runs=3)
    assert concluded(study, outcomes_of(study, subject="p")).labelled == "labelled volume"
    cohort = study.finetune.cohort.model_copy(update={"pool": "pool.json"})
    study = study.model_copy(update={"finetune": study.finetune.model_copy(update={"cohort": cohort})})
    results = concluded(study, outcomes_of(study, subject=subject), 40)
    assert answers(results)[0].startswith(f"With 6 {labelled}s, ")
    assert honest_table(results).header[1] == f"{labelled}s"


def test_one_size_is_not_corrected(tmp_path: Path) -> None:
    """There is one question."""
    study = make_study(tmp_path, sizes=[6], lr=[1e-4], runs=3)
    text = page(study, outcomes_of(study), tmp_path)
    assert "**Clear**: p < 0.05, and the interval reaches beyond the margin. **No difference" in text
    assert "Holm" not in text


def test_false_positives_of_healthy_patients_are_counted(tmp_path: Path) -> None:
    """A patient without any organ has no Dice; what is found there all the same is an error."""
    study = make_study(tmp_path, sizes=[6, 12], lr=[1e-4], runs=3)
    outcomes = outcomes_of(study, level=0.1)
    before = concluded(study, outcomes)
    for cell, outcome in outcomes.items():
        healthy = case("healthy", [None, None])
        object.__setattr__(healthy, "false_positives", (cell.init == "random", True))
        outcome.test = [*outcome.test, healthy]
    results = concluded(study, outcomes)
    for size, found in results.comparisons.items():
        assert np.array_equal(found.differences, before.comparisons[size].differences)
        assert found.worth == before.comparisons[size].worth
        assert answer(results, size) == answer(before, size)
    rows = {row[0]: row for row in honest_table(results).rows}
    assert rows["Dice"][3] == "8"
    assert honest_table(results).rows[0] == honest_table(before).rows[0]
    assert rows["false-positive organs a volume (lower is better)"][3:6] == ["9", "0.22 ± 0.00", "0.11 ± 0.00"]
    assert organ_table(results, 6).rows[0][-2:] == ["100.0 ± 0.0", "0.0 ± 0.0"]


def test_a_run_that_neither_arm_finished_is_counted(tmp_path: Path) -> None:
    """The study asked for it."""
    study = make_study(tmp_path, sizes=[6], lr=[1e-4], runs=4)
    outcomes = outcomes_of(study)
    lose(outcomes, (6, "random", 0), (6, "pretrained", 0), (6, "random", 1))
    sentence = answer(concluded(study, outcomes), 6)
    assert "Left out: 2 runs that not both initialisations finished." in sentence


def test_a_hole_is_said_in_a_sentence(tmp_path: Path) -> None:
    """With the word of the tables for it."""
    study = make_study(tmp_path, sizes=[6], lr=[1e-4], runs=2)

    def said(*statuses: str) -> str:
        outcomes = outcomes_of(study)
        for cell, outcome in outcomes.items():
            outcome.status = statuses[cell.run] if cell.init == "random" else outcome.status
        return answer(concluded(study, outcomes), 6)

    assert "there is **no answer**: no random run is finished (failed)." in said("FAILED", "MISSING")
    assert "there is **no answer**: no random run is finished (missing)." in said("MISSING", "MISSING")


def test_old_answers_are_replaced_where_nothing_can_be_compared(tmp_path: Path) -> None:
    """A report of a grid that has lost an arm leaves no number of the one before."""
    study = make_study(tmp_path, sizes=[6], lr=[1e-4], runs=2)
    outcomes = outcomes_of(study)
    lose(outcomes, (6, "random", 0), (6, "random", 1))
    tracker = record(study, outcomes, tmp_path / "recorded")
    (grid,) = tracker.runs(kind="grid")
    tracker.conclude(grid.info.run_id, {"answer/n06/difference": 0.5}, {})
    write_report(study, tracker, tmp_path / "report")
    metrics = tracker.client.get_run(grid.info.run_id).data.metrics
    assert np.isnan(metrics["answer/n06/difference"])
    assert metrics["answer/sizes"] == 0
