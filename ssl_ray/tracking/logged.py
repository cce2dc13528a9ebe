"""What a study has logged, as another process reads it: from the journals on disk, without them from MLflow."""

from threading import Condition

from ssl_ray.config.schema import Tracking
from ssl_ray.storage.folders import Folders
from ssl_ray.tracking.run import Logged, Run


def read_logged(folders: Folders) -> list[Logged]:
    """The runs of a study that this machine has journals of, each by its newest, in the order of their last start."""
    runs: dict[str, Logged] = {}
    paths = [*(folders.study / "journal").glob("*/*/records.jsonl")]
    for path in sorted(paths, key=lambda path: path.stat().st_mtime):  # another MLflow server has journals of its own
        run = Run(path.parent, Condition())
        run.summary.delivered = not run.waiting
        if run.summary.kind:
            runs[run.name] = run.summary
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
        named = data.tags.get(KIND, ""), data.tags.get(KEY, ""), info.run_name, info.status
        when = info.start_time / 1000, heard / 1000, last.step if last else 0
        found.append(Logged(*named, *when, data.metrics, data.params, data.tags))
    return sorted(found, key=lambda run: run.opened)
