"""What the report concludes from a study: which runs and patients it compares, and in which words."""

import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from recorded import Outcome, case, concluded, flat, make_study

from ssl_ray.config.schema import Study
from ssl_ray.errors import UserError
from ssl_ray.report.answers import answer, answers
from ssl_ray.report.comparison import FALSE_POSITIVES, FOREGROUND, MISSED
from ssl_ray.report.results import Results
from ssl_ray.report.statistics import Verdict
from ssl_ray.report.tables import honest_table, organ_table
from ssl_ray.search.cells import Cell, cells

GAIN = np.array([0.06, 0.07, 0.05, 0.08, 0.06, 0.07, 0.05, 0.06])
"""Of eight patients."""
WOBBLE = (-0.004, 0.0, 0.004)
"""Of three runs."""


def outcomes_of(study: Study, gain: Callable[[Cell], np.ndarray], part: str = "test") -> dict[Cell, Outcome]:
    """Random scores 0.5 and a level of the run; pretrained what `gain` adds for each of the volumes."""
    outcomes = {}
    for cell in cells(study.finetune):
        added = gain(cell)
        scores = flat(list(0.5 + 0.05 * cell.run + (added if cell.init == "pretrained" else 0 * added)))
        outcomes[cell] = Outcome(scores, scores if part == "test" else ())
    return outcomes


def results_of(folder: Path, gain: Callable[[Cell], np.ndarray], part: str = "test", **grid: object) -> Results:
    """The results of a study at one learning rate, with three runs unless told otherwise."""
    study = make_study(folder, **{"sizes": [6], "lr": [1e-4], "runs": 3, **grid})
    return concluded(study, outcomes_of(study, gain, part))


def test_a_failed_trial_takes_its_whole_run_out_of_the_comparison(tmp_path: Path) -> None:
    """Three runs at 0.3, 0.5 and 0.7, a true effect of 0.001, the pretrained trial of the worst run failed.

    Each arm over its own runs would say +0.101, a clear gain.
    """
    study = make_study(tmp_path, sizes=[6], lr=[1e-4], runs=3)
    random, outcomes = np.random.default_rng(0), {}
    patients, effect = random.normal(0, 0.05, 12), random.normal(0, 0.01, (3, 12))
    effect += 0.001 - effect[1:].mean()
    for cell in cells(study.finetune):
        scores = 0.3 + 0.2 * cell.run + patients + (effect[cell.run] if cell.init == "pretrained" else 0)
        outcomes[cell] = Outcome([], flat(list(scores)))
    lost = outcomes[Cell.of(6, "pretrained", 1e-4, 0)]
    lost.status, lost.failure, lost.nonfinite = "FAILED", "the loss is not finite", True
    results = concluded(study, outcomes)
    found = results.comparisons[6]
    assert found.found.mean == pytest.approx(0.001)
    assert found.differences.shape == (2, 12)
    assert found.verdict is Verdict.UNKNOWN
    sentence = answer(results, 6)
    assert "+0.001 (95 % CI" in sentence
    assert "clear" not in sentence
    assert "Left out: 1 run that not both initialisations finished." in sentence
    assert (
        "**n06-pretrained-lr0.0001-run0 failed with a loss that was not finite**; leaving that out favours" in sentence
    )


def test_the_difference_in_the_table_is_that_of_its_means(tmp_path: Path) -> None:
    """Means, runs and patients are those of the comparison, although another run and another patient were scored."""
    study = make_study(tmp_path, sizes=[6], lr=[1e-4], runs=3)
    outcomes = outcomes_of(study, lambda cell: GAIN + WOBBLE[cell.run])
    outcomes[Cell.of(6, "random", 1e-4, 2)].status = "FAILED"
    one = outcomes[Cell.of(6, "pretrained", 1e-4, 1)]
    one.test = one.test[1:]  # a volume that this run did not score
    results = concluded(study, outcomes)
    assert results.comparisons[6].differences.shape == (2, 7)
    expected = (GAIN[1:] + np.array([WOBBLE[:2]]).T).mean()
    assert results.comparisons[6].found.mean == pytest.approx(expected)
    row = honest_table(results).rows[0]
    assert row[2:6] == ["2", "7", "0.525 ± 0.035", f"{0.525 + expected:.3f} ± 0.038"]
    assert row[6].startswith(f"{expected:+.3f} (")
    assert "Left out: 1 run that not both initialisations finished, 1 volume not scored in every run." in answer(
        results, 6
    )


def test_volumes_of_one_patient_count_as_one(tmp_path: Path) -> None:
    """A patient scanned three times weighs as much as one scanned once."""
    study = make_study(tmp_path, sizes=[6], lr=[1e-4], runs=2)
    outcomes = {}
    for cell in cells(study.finetune):
        gains = [0.3, 0.3, 0.3, 0.1] if cell.init == "pretrained" else [0.0] * 4
        test = [case(f"t{n}", [0.5 + gain] * 2, subject="b" if n == 3 else "a") for n, gain in enumerate(gains)]
        outcomes[cell] = Outcome([], test)
    results = concluded(study, outcomes)
    assert results.comparisons[6].found.mean == pytest.approx(0.2)
    assert "2 runs, 2 test patients" in answer(results, 6)
    assert "test patients" in honest_table(results).header


@pytest.mark.parametrize(
    ("selection", "chosen"),
    [
        # by rate: foreground Dice on validation of each run, None where it failed
        ({1e-4: [0.6, 0.2], 3e-4: [0.5, None]}, 1e-4),
        ({1e-4: [0.6, 0.9], 3e-4: [0.7, None]}, 3e-4),
        ({1e-4: [0.3, 0.3], 3e-4: [None, None]}, 1e-4),
        ({1e-4: [0.9, None], 3e-4: [None, 0.3]}, 1e-4),
    ],
)
def test_the_learning_rate_is_chosen_over_the_runs_that_all_rates_finished(
    tmp_path: Path, selection: dict[float, list[float | None]], chosen: float
) -> None:
    """A rate neither wins by the runs that it lost, nor by those that another one lost."""
    study = make_study(tmp_path, sizes=[6], runs=2)
    outcomes = {}
    for cell in cells(study.finetune):
        dice = selection[cell.lr][cell.run]
        outcomes[cell] = Outcome(flat([dice or 0]), flat([0.5]), "FINISHED" if dice else "FAILED")
    results = concluded(study, outcomes)
    assert {arm.lr for arm in results.chosen} == {chosen}


def test_one_run_gives_no_verdict_and_two_are_not_clear(tmp_path: Path) -> None:
    """However large the difference: two networks, or an interval that two runs are too few for."""
    one = results_of(tmp_path, lambda cell: GAIN, runs=1)
    assert (
        "there is **no verdict**: these two networks differ by +0.063 in foreground Dice on 8 test volumes; another "
        "training may not." in answer(one, 6)
    )
    assert honest_table(one).rows[0][6] == "+0.063"
    two = results_of(tmp_path, lambda cell: GAIN + WOBBLE[cell.run], runs=2)
    assert "(95 % CI" in answer(two, 6)
    assert "**not known**" in answer(two, 6)


@pytest.mark.parametrize(
    ("gain", "words"),
    [
        (lambda cell: GAIN + WOBBLE[cell.run], "**a clear gain** for this pretraining, for these labelled volumes."),
        (lambda cell: WOBBLE[cell.run] - GAIN, "**a clear loss** for this pretraining, for these labelled volumes."),
        (lambda cell: GAIN - GAIN.mean() + WOBBLE[cell.run], "**no difference beyond the margin of 0.02** for this"),
        (lambda cell: GAIN / 6 + WOBBLE[cell.run] / 4, "**a real difference, too small to matter** for this"),
        (
            lambda cell: 5 * (GAIN - GAIN.mean()) + WOBBLE[cell.run],
            "**not known** for this pretraining, for these labelled",
        ),
    ],
)
def test_every_verdict_has_its_words(tmp_path: Path, gain: Callable[[Cell], np.ndarray], words: str) -> None:
    """With what the interval does not carry: one pretraining, and published lists."""
    assert words in answer(results_of(tmp_path, gain), 6)


@pytest.mark.parametrize(("rate", "said"), [(1e-4, True), (3e-4, False)])
def test_a_training_that_ended_at_its_best_limits_the_answer(tmp_path: Path, rate: float, said: bool) -> None:
    """Only that of a network which is compared, and only at its number of labels: a longer one may say otherwise."""
    study = make_study(tmp_path, runs=3)
    outcomes = outcomes_of(study, lambda cell: GAIN + WOBBLE[cell.run] - (0.1 if cell.lr > 1e-4 else 0))
    for cell, outcome in outcomes.items():
        if cell.init == "random":
            outcome.validation = flat([0.5 if cell.lr == 1e-4 else 0.4])
    outcomes[Cell.of(6, "random", rate, 1)].selected = 400
    results = concluded(study, outcomes)
    assert [len(results.late), {arm.lr for arm in results.chosen}] == [1, {1e-4}]
    scope = "**a clear gain** for this pretraining, for these labelled volumes"
    assert scope + (", for trainings of 400 steps." if said else ".") in answer(results, 6)
    assert scope + "." in answer(results, 12)


def test_not_known_says_what_would_show_a_difference(tmp_path: Path) -> None:
    """Patients who differ need more patients, and no number of runs alone."""
    sentence = answer(results_of(tmp_path, lambda cell: 5 * (GAIN - GAIN.mean()) + WOBBLE[cell.run]), 6)
    assert re.search(
        r"As far as 3 runs can tell, about \d+ volumes would show a difference of 0.02, if there is one \(80 % power\)"
        r"; no number of runs alone would\.",
        sentence,
    )


def test_what_is_not_clear_after_correction_is_said_so_and_the_primary_question_leads(tmp_path: Path) -> None:
    """p between 0.017 and 0.05 at one of three sizes; `primary` decides the headline, not the correction."""
    spread = np.random.default_rng(3).normal(0, 0.05, 8)

    def gain(cell: Cell) -> np.ndarray:
        weak = 0.065 + spread - spread.mean()
        return (GAIN if cell.size == 12 else weak if cell.size == 6 else 0 * weak) + WOBBLE[cell.run]

    results = results_of(tmp_path, gain, sizes=[6, 12, 24], primary=12)
    assert results.comparisons[6].found.p < 0.05 <= results.comparisons[6].adjusted
    lines = answers(results)
    assert lines[0].startswith("Primary question, 12 labelled volumes: **a clear gain** for this pretraining")
    assert "**not clear after correction for 3 questions** for" in lines[1]
    assert len(lines) == 4


def test_on_the_volumes_that_selected_it_nothing_is_clear(tmp_path: Path) -> None:
    """Validation is what is reported: the sentence ends with it."""
    results = results_of(tmp_path, lambda cell: GAIN + WOBBLE[cell.run], part="validation")
    sentence = answer(results, 6)
    assert "**a gain** for this pretraining, for these labelled volumes, on the volumes that selected it." in sentence
    assert "clear" not in sentence


@pytest.mark.parametrize(
    ("pool", "scope"),
    [
        (40, "for draws from this pool of 40."),
        (10, "for draws from this pool of 10 (draws share most volumes)."),
        (6, "for these labelled volumes."),
    ],
)
def test_draws_from_a_pool_are_named(tmp_path: Path, pool: int, scope: str) -> None:
    """With a pretraining for each run, nothing is said of it."""
    study = make_study(tmp_path, sizes=[6], lr=[1e-4], runs=3)
    cohort = study.finetune.cohort.model_copy(update={"pool": "pool.json"})
    finetune = study.finetune.model_copy(update={"cohort": cohort})
    pretrain = study.pretrain.model_copy(update={"pretrainings": 3})
    study = study.model_copy(update={"finetune": finetune, "pretrain": pretrain})
    outcomes = outcomes_of(study, lambda cell: GAIN + WOBBLE[cell.run])
    assert f"**a clear gain** {scope}" in answer(concluded(study, outcomes, pool), 6)


def test_arms_of_different_precision_are_not_compared(tmp_path: Path) -> None:
    """What differs between them must be the initialisation alone."""
    study = make_study(tmp_path, sizes=[6], lr=[1e-4])
    outcomes = outcomes_of(study, lambda cell: GAIN)
    outcomes[Cell.of(6, "pretrained", 1e-4, 0)].precision = "bfloat16"
    with pytest.raises(
        UserError, match=r"^finetune.precision: n06-random-\S+ was trained in float32 and n06-pretrained"
    ):
        concluded(study, outcomes)


def test_pretraining_is_worth_some_multiple_of_the_labels(tmp_path: Path) -> None:
    """Pretrained at 6 is as good as random at 12; at 12 it is better than random ever was."""

    def gain(cell: Cell) -> np.ndarray:
        return np.full(8, 0.1) + np.linspace(-0.01, 0.01, 8) + WOBBLE[cell.run]

    study = make_study(tmp_path, sizes=[6, 12], lr=[1e-4], runs=3)
    outcomes = outcomes_of(study, gain)
    for cell, outcome in outcomes.items():
        level = 0.1 if cell.size == 12 else 0
        outcome.test = [case(one.case, [dice + level for dice in one.original_dice or ()]) for one in outcome.test]
    results = concluded(study, outcomes)
    assert re.search(
        r"Here pretraining is worth (2|at least 2) times the labels \(95 % CI 1.\d to at least 2\)", answer(results, 6)
    )
    assert "times the labels" not in answer(results, 12)  # random was not measured with more


def test_missed_and_false_organs_are_counted_beside_hd95(tmp_path: Path) -> None:
    """A missed organ has no distance and counts as missed; an absent one that was predicted is a false positive."""
    study = make_study(tmp_path, sizes=[6], lr=[1e-4])
    outcomes = {}
    for cell in cells(study.finetune):
        lost = cell.init == "random"
        tests = [case("a", [0.5, 0 if lost else 0.5], hd95=4), case("b", [0.5, None], hd95=9 if lost else 6.5)]
        if lost:
            tests[1] = case("b", [0.5, None], hd95=9)
            object.__setattr__(tests[1], "false_positives", (None, True))
        outcomes[cell] = Outcome([], tests)
    results = concluded(study, outcomes)
    rows = {row[0]: row[4:] for row in honest_table(results).rows}
    assert rows["missed organs (%, lower is better)"] == ["25.0", "0.0", "-25.0"]
    assert rows["HD95 of found organs (mm, lower is better)"] == ["6.5", "5.2", "-1.2"]
    assert rows["false-positive organs a volume (lower is better)"] == ["0.50", "0.00", "-0.50"]
    assert organ_table(results, 6).rows[1][-2:] == ["100.0", "0.0"]
    assert MISSED.of(tests[0]) == 0
    assert FALSE_POSITIVES.of(tests[0]) == 0
    assert FOREGROUND.of(case("c", [None, None])) is None
