"""What a study has logged, as another process reads it: from the journals on disk, without them from MLflow."""

import json
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ssl_ray.config.schema import Tracking
from ssl_ray.storage.folders import Folders
from ssl_ray.tracking.run import Record


@dataclass(frozen=True)
class Logged:
    """One MLflow run as its journal has it.

    `status` is RUNNING, FINISHED, FAILED or KILLED, as logged last: a process that was killed leaves RUNNING. `opened`
    and `heard` are seconds since 1970, of the last start and of the last record. `step` is the last that has metrics,
    `metrics` has the last value of each. `delivered`: MLflow has all of it.
    """

    kind: str
    key: str
    name: str
    status: str
    opened: float
    heard: float
    step: int
    metrics: Mapping[str, float]
    params: Mapping[str, str]
    tags: Mapping[str, str]
    delivered: bool = True


def read_logged(folders: Folders) -> list[Logged]:
    """The runs of a study that this machine has journals of, each by its newest, in the order of their last start."""
    runs: dict[str, Logged] = {}
    paths = [*(folders.study / "journal").glob("*/*/records.jsonl")]
    for path in sorted(paths, key=lambda path: path.stat().st_mtime):  # another MLflow server has journals of its own
        if run := _read(path):
            runs[path.parent.name] = run
    return sorted(runs.values(), key=lambda run: run.opened)


def ask_logged(settings: Tracking, folders: Folders) -> list[Logged]:
    """The same from MLflow, for a machine without the journals; empty where it has no experiment of the study."""
    from ssl_ray.tracking.client import KEY, KIND  # MLflow takes seconds to load
    from ssl_ray.tracking.tracker import MissingExperiment, Tracker

    try:
        tracker = Tracker(settings, folders, create=False)
    except MissingExperiment:
        return []
    found = []
    for run in tracker.runs():
        info, data = run.info, run.data
        points = tracker.client.get_metric_history(info.run_id, "lr") if info.status == "RUNNING" else []
        last = max(points, key=lambda point: point.timestamp, default=None)
        heard = last.timestamp if last else info.end_time or info.start_time
        found.append(
            Logged(
                data.tags.get(KIND, ""),
                data.tags.get(KEY, ""),
                info.run_name,
                info.status,
                info.start_time / 1000,
                heard / 1000,
                last.step if last else 0,
                data.metrics,
                data.params,
                data.tags,
            )
        )
    return sorted(found, key=lambda run: run.opened)


def _read(path: Path) -> Logged | None:
    first: Record = {}
    found: dict[str, Any] = {"status": "", "opened": 0.0, "heard": 0.0, "step": 0}
    values: dict[str, Any] = {"metrics": {}, "params": {}, "tags": {}}
    *lines, _ = path.read_bytes().split(b"\n")  # what has no end is being written
    for line in lines:
        with suppress(ValueError, TypeError, KeyError):
            record: Record = dict(json.loads(line))
            at = record.get("at", 0) / 1000
            found["heard"] = max(found["heard"], at)
            match record["do"]:
                case "open":
                    first = first or record
                    found |= {"status": "RUNNING", "opened": at}
                case "end":
                    found["status"] = record["status"]
                case "params":
                    values["params"] = record["values"] | values["params"]
                case "metrics" | "tags" as kind:
                    values[kind] |= record["values"]
                    found["step"] = max(found["step"], record["step"] if "lr" in record["values"] else 0)
    sent = 0
    with suppress(OSError, ValueError):
        sent = int(json.loads(path.with_name("state.json").read_text())["sent"])
    if not first:
        return None
    return Logged(first["kind"], first["key"], first["name"], **found, **values, delivered=sent >= len(lines))
