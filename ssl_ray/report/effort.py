"""What the study took: hours in which its trainings ran, by device."""

import math
from collections import defaultdict
from itertools import pairwise

from ssl_ray.report.page import literal
from ssl_ray.report.results import Results
from ssl_ray.report.tables import Table
from ssl_ray.tracking.client import DEVICE, MlflowRun
from ssl_ray.tracking.tracker import Tracker

_STARTED, _RECORDED = "system/started_at", ("lr", "selected/step")


def effort_table(results: Results, tracker: Tracker) -> Table:
    """A row for each stage and kind of device; of the runs that the report is made of, those that have started."""
    trials = {run.info.run_id: run for run in tracker.runs(kind="trial")}
    runs = [("pretraining", one.run) for one in results.pretraining]
    runs += [("fine-tuning", trials[one.run_id]) for one in results.trials if one.run_id]
    found = defaultdict(list)
    for stage, run in runs:
        if hours := _hours(run, tracker):
            unit, count = _units(run)
            found[stage, run.data.tags.get(DEVICE, "not recorded"), unit].append((hours, hours * count))
    rows = []
    for (stage, device, unit), each in found.items():
        hours, of_units = map(sum, zip(*each, strict=True))
        rows.append([stage, literal(device), str(len(each)), f"{hours:.2f}", f"{of_units:.2f} {unit} hours"])
    return Table(["what", "device", "trainings", "hours", "times GPUs, or else cores"], rows, 2)


def _hours(run: MlflowRun, tracker: Tracker) -> float:
    """From every start of a training to the last record before the next one: what lay between did not run."""
    starts = sorted(point.timestamp for point in tracker.points(run.info.run_id, _STARTED))
    times = [point.timestamp for name in _RECORDED for point in tracker.points(run.info.run_id, name)]
    within = [[time - start for time in times if start <= time < end] for start, end in pairwise([*starts, math.inf])]
    return sum(max(since, default=0) for since in within) / 3.6e6


def _units(run: MlflowRun) -> tuple[str, float]:
    """What a training is counted in, and how many it had."""
    params, workers = run.data.params, run.data.metrics.get("system/workers", 1.0)
    if "finetune.gpus_per_trial" in params:
        gpus, cores = (float(params[f"finetune.{kind}_per_trial"]) for kind in ("gpus", "cpus"))
    else:
        gpus = workers * (params.get("pretrain.gpu") == "True")
        cores = workers * float(params.get("pretrain.cpus_per_worker", 1))
    return ("GPU", gpus) if gpus else ("core", cores)
