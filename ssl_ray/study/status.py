"""`ssl-ray status`: how far a study is, read from what it writes; the process that works on it notices nothing.

Torch, Ray and MLflow are not loaded, so that the answer takes a second.
"""

import json
import math
import os
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from datetime import timedelta
from typing import Any

from ssl_ray.config.schema import Study
from ssl_ray.search.cells import CELLS, FAILURE, STOPPED, cells
from ssl_ray.storage.folders import Folders
from ssl_ray.study.lock import holder
from ssl_ray.tracking.logged import ask_logged, read_logged
from ssl_ray.tracking.run import Logged

Facts = dict[str, Any]
_RATE = "system/patches_per_second"
_GRAIN, _QUIET_SECONDS = 2.0, 600.0
"""Seconds that two clocks may differ, and that a training elsewhere may be silent before it counts as cut off."""


def status_of(study: Study, folders: Folders, logged: Sequence[Logged] | None = None) -> Facts:
    """What there is of a study.

    `stage` is `prepare`, `pretrain`, `finetune` or `report` while a process works on it, otherwise `not begun`,
    `finished`, `failed` (with cells that the same command tries again) or `interrupted`. `logged`: the journals, where
    they were read already.
    """
    there, runs = holder(folders), read_logged(folders) if logged is None else logged
    since = there[1] - _GRAIN if there else math.inf
    if not runs and not there and (study.tracking.uri or os.environ.get("MLFLOW_TRACKING_URI")):
        runs = ask_logged(study.tracking, folders)  # the journals may be on another machine, with the process
        if runs and time.time() - max(run.heard for run in runs) < _QUIET_SECONDS:
            there, since = ("on another machine, as MLflow hears", 0.0), 0.0
    stages = {"finetune": _finetuning(study, folders, runs, since)}
    if study.pretrains:
        stages = {"pretrain": _pretraining(study, folders, runs, since), **stages}
    states = [stage["state"] for stage in stages.values()]
    stage = next((name for name, found in stages.items() if found["state"] == "running"), "")
    if there and not stage:
        stage = "report" if set(states) == {"finished"} else "prepare"
    if not there:
        ends = "finished" if set(states) == {"finished"} else "failed" if "failed" in states else "interrupted"
        stage = ends if runs else "not begun"
    page = folders.study / "report.html"
    return {
        "study": study.name,
        "stage": stage,
        "process": there[0] if there else None,
        "heard_seconds": round(time.time() - max(run.heard for run in runs), 1) if runs else None,
        "stages": stages,
        "report": str(page) if page.exists() else None,
        "folder": str(folders.study.absolute()),
    }


def _pretraining(study: Study, folders: Folders, runs: Sequence[Logged], since: float) -> Facts:
    """All pretrainings of the study together; a search makes as many as its cells need."""
    config = study.pretrain
    mine = [run for run in runs if run.kind == "pretraining"]
    if not study.search:
        mine = list({run.params.get("run"): run for run in mine}.values())  # the newest of each
    steps = max((int(run.params.get("steps", 0)) for run in mine), default=0)
    found = _together(mine, len(mine) if study.search else config.pretrainings, steps, config.batch_size, since)
    begun = [folders.study / f"pretrain-{run.key}" for run in mine if state_of(run, since) != "finished"]
    saved = [int(path.parent.name) for folder in begun for path in folder.glob("checkpoints/[0-9]*/manifest.json")]
    return found | {"checkpoint": max(saved, default=0)}  # where one that was cut off goes on


def _finetuning(study: Study, folders: Folders, runs: Sequence[Logged], since: float) -> Facts:
    """All cells of the grid, or of the search, together; those of a former, larger grid do not count."""
    config = study.finetune
    parents = [run for run in runs if run.kind in ("grid", "search")]
    mine, total = [run for run in runs if run.kind == "trial"], study.search.cells if study.search else 0
    named = {run.key: run.name for run in mine}
    if not study.search:
        names = {cell.name for cell in cells(config)}
        path = folders.study / CELLS
        known = json.loads(path.read_bytes()) if path.is_file() else {}
        of_grid = known.get(parents[-1].key if parents else "", {})
        named = {key: name for name, key in of_grid.items() if name in names}
        mine, total = [run for run in mine if run.key in named], len(names)
    found = _together(mine, total, config.steps, config.volumes_per_step * config.patches_per_volume, since)
    whole = state_of(parents[-1], since) if parents else ""
    if whole in ("running", "interrupted") or (study.search and found["state"] != "failed"):
        found["state"] = whole or "not begun"  # between two cells, too; a search ends with its budget
    return found | {"failures": {named[run.key]: run.tags.get(FAILURE, "") for run in mine if run.status == "FAILED"}}


def state_of(run: Logged, since: float) -> str:
    """`since` is when the process began that works on the study: what was open before was cut off."""
    if run.status == "KILLED" and run.tags.get(STOPPED):
        return "stopped"
    ends = {"FINISHED": "finished", "FAILED": "failed"}
    return ends.get(run.status) or ("running" if run.status == "RUNNING" and run.opened >= since else "interrupted")


def _together(runs: Sequence[Logged], total: int, steps: int, patches: int, since: float) -> Facts:
    """Trainings of so many steps, and patches a step: `total` of them, `runs` those that were begun.

    One that a search gave other steps has its own.
    """
    states = [(run, state_of(run, since), steps_of(run, steps)) for run in runs]
    whole = sum(own for *_, own in states) + steps * (total - len(states))
    counts = Counter(state for _, state, _ in states)
    over = counts["finished"] + counts["stopped"]
    begun = "finished" if over >= total > 0 else "interrupted" if over else "not begun"
    done = sum(own if state in ("finished", "stopped") else run.step for run, state, own in states)
    rate = sum(run.metrics.get(_RATE, 0.0) for run, state, _ in states if state == "running") / patches
    return {
        "state": next((one for one in ("running", "failed", "interrupted") if counts[one]), begun),
        "total": total,
        **counts,
        "step": done,
        "steps": whole,
        "steps_per_second": rate or None,
        "seconds_left": (whole - done) / rate if rate else None,
    }


def steps_of(run: Logged, steps: int) -> int:
    """How many a training takes: by what it logged, or else so many."""
    name = "steps" if run.kind == "pretraining" else "finetune.steps"
    return int(run.params.get(name, steps))


def render(facts: Mapping[str, Any]) -> str:
    """The same in a few lines."""
    who = f" ({facts['process']})" if facts["process"] else ""
    heard = facts["heard_seconds"]
    told = f"; last record {timedelta(seconds=round(heard))} ago" if heard is not None and facts["process"] else ""
    lines = [f"{facts['study']}: {facts['stage']}{who}{told}"]
    for name, found in facts["stages"].items():
        lines.append(f"  {name:<9} {', '.join(_words(found))}")
        lines += [f"    FAILED {cell}: {why}" for cell, why in found.get("failures", {}).items()]
    if facts["stage"] == "not begun":
        lines.append(f"  nothing in {facts['folder']}; relative paths are from the folder that a command is run in")
    if facts["report"]:
        lines.append(f"  report    {facts['report']}")
    if facts["stage"] in ("failed", "interrupted"):
        lines.append("the same `ssl-ray run` goes on")
    return "\n".join(lines)


def _words(found: Mapping[str, Any]) -> Iterator[str]:
    yield found["state"]
    yield f"{found.get('finished', 0)} of {found['total']} finished"
    for state in ("running", "stopped", "failed", "interrupted"):
        if found.get(state) and found["total"] > 1:
            yield f"{found[state]} {state}"
    if found["state"] not in ("not begun", "finished"):
        yield f"step {found['step']:,} of {found['steps']:,}"
    if found["steps_per_second"]:
        yield f"{found['steps_per_second']:.3g} steps/s"
        yield f"{timedelta(seconds=round(found['seconds_left']))} left"
    if found["state"] in ("interrupted", "failed") and found.get("checkpoint"):
        yield f"goes on from step {found['checkpoint']:,}"
