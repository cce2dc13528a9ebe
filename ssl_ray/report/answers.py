"""The answer in words: a few for the verdict, and a sentence of Markdown for each number of labelled volumes."""

import math

from ssl_ray.report.comparison import FOREGROUND, Arm, Comparison
from ssl_ray.report.results import Results
from ssl_ray.report.statistics import MOST_PATIENTS, MOST_RUNS, Estimate, Multiplier, Verdict, needed
from ssl_ray.report.tables import over_runs
from ssl_ray.text import count_of


def answers(results: Results) -> list[str]:
    """The headline, where there are several sizes to compare at, and the answer at each size."""
    size, found = results.primary, []
    if len(results.arms) > 1 and len(results.inits) > 1:
        words, scope = verdict(results, size)
        found = [f"Primary question, {count_of(size, results.labelled)}: **{words}**{scope}."]
    return [*found, *(answer(results, size) for size in results.arms)]


def verdict(results: Results, size: int) -> tuple[str, str]:
    """What may be said of one number of labelled volumes, and how that is limited, e.g. ` for this pretraining`."""
    found = results.comparisons.get(size)
    if found is None or found.verdict is Verdict.NONE:
        return found.verdict.value if found else "no answer", ""
    words = found.verdict.value
    if found.verdict is Verdict.NO_DIFFERENCE:
        words += f" of {results.study.finetune.margin:g}"
    elif found.verdict is Verdict.UNCORRECTED:
        words += f" for {count_of(len(results.arms), 'question')}"
    elif not is_clear(results, size):
        words = words.replace("a clear ", "a ")
    return words, _scope(results, size)


def is_clear(results: Results, size: int) -> bool:
    """Whether a gain or a loss is clear; it never is on the volumes that selected the checkpoint."""
    return results.part == "test" and results.comparisons[size].verdict in (Verdict.GAIN, Verdict.LOSS)


def answer(results: Results, size: int) -> str:
    """The answer at one number of labelled volumes, which claims no more than the numbers do."""
    start = f"With {count_of(size, results.labelled)}"
    arms, found = results.arms[size], results.comparisons.get(size)
    if len(arms) == 1:
        ((init, arm),) = arms.items()
        dice = over_runs(results, size, init, FOREGROUND)
        reached = f"{init} initialisation reaches foreground Dice {dice}" if arm.trials else _hole(init, arm)
        return f"{start}, {reached}; the grid has nothing to compare it with."
    if found is None:
        if not (why := " and ".join(_hole(init, arm) for init, arm in arms.items() if not arm.trials)):
            scored = f"no {results.subjects} with an organ was scored in every run"
            why = scored if results.common[size].runs else "no run was finished by both"
        text = f"{start} there is **no answer**: {why}."
    elif found.verdict is Verdict.NONE:
        text = f"{start} there is **no verdict**: {_undecided(results, found)}."
    else:
        runs, patients = found.differences.shape
        scored = f"{count_of(runs, 'run')}, {count_of(patients, f'{results.part} {results.subjects}')}"
        words, scope = verdict(results, size)
        change = _interval(found.found, f"; {scored}")
        text = f"{start}, pretraining changes foreground Dice by {change}: **{words}**{scope}."
    return " ".join([text, *_notes(results, size)])


def _hole(init: str, arm: Arm) -> str:
    """Why an arm has no result."""
    return f"no {init} run is finished ({arm.hole})"


def _undecided(results: Results, found: Comparison) -> str:
    """Why there is no interval."""
    runs, patients = found.differences.shape
    scored = f"on {count_of(patients, f'{results.part} {results.subjects}')}"
    scored += "" if results.part == "test" else " that selected them"
    change = f"differ by {FOREGROUND.signed(found.found.mean)} in foreground Dice {scored}"
    if runs == 1:
        folds = results.study.finetune.cohort.folds
        who = f"the networks of one run, in {folds} folds," if folds else "these two networks"
        return f"{who} {change}; another training may not"
    return (
        f"{runs} pairs of networks {change}, {'too few' if patients == 1 else 'all alike: too little'} for an interval"
    )


def _scope(results: Results, size: int) -> str:
    """What the interval does not carry."""
    scope, pool = [], results.pool
    if results.study.pretrain.pretrainings == 1:
        scope.append("for this pretraining")
    folds = results.study.finetune.cohort.folds
    if pool is None or size >= pool:
        scope.append(f"for these {results.labelled}s")
    else:
        reach = pool * (folds - 2) / folds if folds else pool  # what is neither scored nor validated on
        overlap = f" (draws share most {results.subjects}s)" if size > reach / 2 else ""
        scope.append(f"for draws from this pool of {pool}{overlap}")
    if folds:
        scope.append(f"in {folds} folds")
    rates = {init: arm.lr for init, arm in results.arms[size].items()}
    if any(one.cell.size == size and one.cell.lr == rates.get(one.cell.init) for one in results.late):
        # What learns faster is ahead in a short training, and may not be in a longer one.
        scope.append(f"for trainings of {results.study.finetune.steps:,} steps")
    if results.part == "validation":
        scope.append("on the volumes that selected it")
    return " " + ", ".join(scope)


def _notes(results: Results, size: int) -> list[str]:
    """What would show a difference, what pretraining is worth in labels, the control, and what was left out."""
    found, common = results.comparisons.get(size), results.common[size]
    notes = []
    if found and found.verdict is Verdict.UNKNOWN:
        notes.append(_needed(found, results))
    # With the most labels, "at least 1 times" would only say that random was not measured with more.
    if found and (worth := found.worth) and (worth.edges[1] > 1 or min(worth.point, worth.low) < 1):
        unsure = worth.low <= 1 <= worth.high
        start = "What pretraining is worth in labels is not known:" if unsure else "Here pretraining is worth"
        notes.append(f"{start} {_times(worth)}.")
    if control := results.controlled(size):
        named = zip(("permuted - random", "pretrained - permuted"), control, strict=True)
        notes.append(f"The control: {', '.join(f'{name} {_interval(one)}' for name, one in named)}.")
    lost = [trial.cell.name for arm in results.arms[size].values() for trial in arm.nonfinite]
    if lost:
        notes.append(
            f"**{' and '.join(lost)} failed with a loss that was not finite**; leaving that out favours "
            f"{'its' if len(lost) == 1 else 'their'} initialisation."
        )
    # Where no run is left, the answer has said so.
    runs = results.study.finetune.runs - len(common.runs) if found else 0
    dropped = [(runs, "run that not both initialisations finished")]
    dropped += [(common.dropped_patients, f"{results.subjects} not scored in every run")]
    if left := [count_of(*one, plural=one[1].replace(" ", "s ", 1)) for one in dropped if one[0]]:
        notes.append(f"Left out: {', '.join(left)}.")
    return notes


def _needed(found: Comparison, results: Results) -> str:
    """Like `As far as 3 runs can tell, about 9 runs, or about 120 patients, would show a difference of 0.02 (80 %)`."""
    margin = results.study.finetune.margin
    runs, patients = needed(found.differences, margin, len(results.arms))
    asked = (runs, MOST_RUNS, "runs"), (patients, MOST_PATIENTS, f"{results.subjects}s")
    able = [f"{f'more than {most}' if n > most else f'about {n}'} {noun}" for n, most, noun in asked if n is not None]
    unable = [noun for n, _, noun in asked if n is None]
    told = f"a difference of {margin:g}, if there is one (80 % power)"
    shown = [f"{', or '.join(able)}{',' if len(able) > 1 else ''} would show {told}"] if able else []
    refused = f"no number of {' or of '.join(unable)} alone would" + ("" if able else f" show {told}")
    known = f"As far as {count_of(len(found.differences), 'run')} can tell"
    return f"{known}, {'; '.join([*shown, *([refused] if unable else [])])}."


def _interval(found: Estimate, over: str = "") -> str:
    """Like `+0.012 (95 % CI -0.003 to +0.027; 3 runs)`, where `over` is `; 3 runs`; the mean alone without interval."""
    bounds = f"{FOREGROUND.signed(found.low)} to {FOREGROUND.signed(found.high)}"
    return FOREGROUND.signed(found.mean) + ("" if math.isnan(found.low) else f" (95 % CI {bounds}{over})")


def _times(worth: Multiplier) -> str:
    """Like `1.9 times the labels (95 % CI 1.2 to at least 4)`; no interval after one run."""

    def number(value: float) -> str:
        edge = {worth.edges[0]: "at most ", worth.edges[1]: "at least "}.get(value, "")
        return f"{edge}{value:.2g}"

    text = f"{number(worth.point)} times the labels"
    if math.isnan(worth.low):
        return f"{text} (no interval)"
    ends = dict.fromkeys([number(worth.low), number(worth.high)])
    return f"{text} (95 % CI {' to '.join(ends)})"
