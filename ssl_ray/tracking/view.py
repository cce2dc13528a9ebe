"""Where MLflow's UI opens: not on its pages for generative AI, but on the comparison of a study's trials.

MLflow keeps a view of the runs page that is to be shared in a tag of the experiment, and a link names it
(`viewStateShareKey`). It is the UI's own state as JSON, whose keys are those of MLflow 3; a version that does not know
one of them ignores it.
"""

import json
from collections.abc import Mapping
from urllib.parse import quote

from ssl_ray.tracking.client import KIND, STUDY

DICE = "dice"
"""Metric of a trial: what is reported, foreground Dice on the original grid, of test volumes where there are any."""
_SPLIT, _INIT, _RATE = "size", "init", "lr"  # parameters of a trial
_CURVE = "validation/dice_foreground"
_VIEW = "mlflow.sharedViewState."


def experiment_tags(study: str) -> dict[str, str]:
    """Tags that an experiment has for a study: of which kind it is, and how the study's trials are compared."""
    return {"mlflow.experimentKind": "custom_model_development", f"{_VIEW}{study}": json.dumps(_comparison(study))}


def link(server: str, experiment_id: str, study: str) -> str:
    """The comparison of a study's trials, on MLflow's server at this address."""
    view = f"workflowType=machine_learning&compareRunsMode=CHART&viewStateShareKey={quote(study)}"
    return f"{server.rstrip('/')}/#/experiments/{experiment_id}/runs?{view}"


def picture(run_id: str, path: str, text: str) -> str:
    """A picture among a run's artifacts, for a description in Markdown."""
    return f"![{text}](get-artifact?path={quote(path, safe='')}&run_uuid={run_id})"


def run_link(run_id: str, text: str) -> str:
    """A link to a run, for a description in Markdown."""
    return f"[{text}](#/runs/{run_id})"


def _comparison(study: str) -> Mapping[str, object]:
    charts: list[dict[str, object]] = [
        {"type": "PARALLEL", "selectedParams": [_SPLIT, _INIT, _RATE], "selectedMetrics": [DICE], "showAllRuns": True},
        {"type": "BAR", "metricKey": DICE},
        {"type": "LINE", "metricKey": _CURVE, "selectedMetricKeys": [_CURVE]},
        {"type": "LINE", "metricKey": "loss", "selectedMetricKeys": ["loss"]},
    ]
    line: dict[str, object] = {
        "xAxisKey": "step",
        "useGlobalXaxisKey": True,
        "xAxisScaleType": "linear",
        "scaleType": "linear",
    }
    shared: dict[str, object] = {"deleted": False, "isGenerated": False, "runsCountToCompare": 100, "range": {}}
    parts = [f"The trials of {study}", "Scores and curves"]
    sections: list[dict[str, object]] = [
        {"uuid": f"{study}-{name}", "name": name, "display": True, "isReordered": True} for name in parts
    ]
    sections[0]["columns"] = 1  # the axes need the width
    places: list[dict[str, object]] = [
        {"uuid": f"{study}-{n}", "metricSectionId": sections[min(n, 1)]["uuid"]} for n in range(len(charts))
    ]
    return {
        "searchFilter": f"tags.`{KIND}` = 'trial' and tags.`{STUDY}` = '{study}'",
        "orderByKey": f"metrics.`{DICE}`",
        "orderByAsc": False,
        "runsHiddenMode": "SHOW_ALL",
        "selectedColumns": [f"metrics.`{DICE}`", *(f"params.`{name}`" for name in (_SPLIT, _INIT, _RATE))],
        "compareRunCharts": [line | shared | place | one for place, one in zip(places, charts, strict=True)],
        "compareRunSections": sections,
        "isAccordionReordered": True,
    }
