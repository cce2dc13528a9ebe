"""From launch to the first logged step: `ssl-ray` against the plain MONAI script of plain_pretrain.py, in turns.

    PYTHONPATH=. python experiments/benchmarks/start.py [--quick] (about 4 minutes on two cores)

Both train the same tiny network on the same volumes, which the script transforms at its start and ours finds in the
store. Then two trials of fine-tuning, one after the other on one worker: from the last record of the first, which has
its scores, to the first logged step of the second.
"""

import os
import statistics
from pathlib import Path
from typing import Any

from cohort import write_cohort
from pretrain import Case, carried_out, experiment, ours, plain
from timing import Bench, main

START, BETWEEN = 15.0, 4.0
"""Seconds at most, on two quiet cores."""
TINY = Case({"hidden_size": 48, "mlp_dim": 96, "num_heads": 3}, 2, 2, 2, 1e-3, 32, 4)


def run(bench: Bench) -> None:
    """Starts of pretraining, then the gap between two trials."""
    root = bench.folder / "cohort"
    write_cohort(root, TINY.training, 2, (60, 50, 40))
    ours(bench, TINY, root, "cold")  # fills the store; the operating system then has all packages in memory
    starts: dict[str, list[float]] = {"MONAI + torchrun": [], "ours": []}
    for turn in range(1 if bench.quick else 3):
        starts["MONAI + torchrun"].append(plain(bench, TINY, root, f"plain-{turn}").startup)
        starts["ours"].append(ours(bench, TINY, root, f"ours-{turn}").startup)
        print(f"seconds to the first logged step: { {kind: round(found[-1], 1) for kind, found in starts.items()} }")
    theirs, mine = (statistics.median(found) for found in starts.values())
    bench.ratios["start, plain script / ours"] = theirs / mine
    bench.floor("seconds from launch to the first logged step", mine, at_most=START)
    bench.floor("seconds between two trials on one worker", between(bench, root), at_most=BETWEEN)
    bench.facts["starts"] = starts


def between(bench: Bench, root: Path) -> float:
    """Seconds from a trial's scores to the first logged step of the next."""
    study = experiment(bench, TINY, root, "trials")
    study["finetune"] |= {"grid": {"init": ["random"]}, "runs": 2, "steps": 20, "validate_every": 10}
    study["finetune"] |= {"max_concurrent_trials": 1, "cohort": {"root": str(root), "classes": 3}}
    study["finetune"]["cohort"]["splits"] = {1: "labelled_1.json"}
    _, tracker = carried_out(bench, "finetune", "trials", study)

    def moments(run: Any, metric: str) -> list[float]:
        return sorted(one.timestamp / 1000 for one in tracker.client.get_metric_history(run.info.run_id, metric))

    first, second = sorted(tracker.runs(kind="trial"), key=lambda run: moments(run, "loss")[0])
    return moments(second, "loss")[0] - moments(first, "selected/step")[-1]


if __name__ == "__main__":
    os.environ["RAY_ADDRESS"] = ""
    main(__doc__ or "", run)
