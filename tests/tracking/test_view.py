"""Where MLflow's UI opens, and what a run says of itself."""

import json
from collections.abc import Callable

from ssl_ray.tracking.tracker import NOTE, Tracker
from ssl_ray.tracking.view import DICE


def test_the_link_leads_to_a_view_that_the_experiment_has(track: Callable[..., Tracker]) -> None:
    """Also one that an older version has made, without it."""
    tracker = track()
    experiment = tracker.client.get_experiment_by_name(tracker.experiment)
    server, _, place = tracker.link("http://there:5000/").partition("/#/")
    assert server == "http://there:5000"
    path, _, query = place.partition("?")
    assert path == f"experiments/{experiment.experiment_id}/runs"
    asked = dict(pair.split("=") for pair in query.split("&"))
    assert asked["compareRunsMode"] == "CHART"
    key = f"mlflow.sharedViewState.{asked['viewStateShareKey']}"
    view = json.loads(experiment.tags[key])
    first = view["compareRunCharts"][0]
    assert (first["type"], first["selectedParams"], first["selectedMetrics"]) == (
        "PARALLEL",
        ["size", "init", "lr"],
        [DICE],
    )
    assert experiment.tags["mlflow.experimentKind"] == "custom_model_development"
    tracker.client.set_experiment_tag(experiment.experiment_id, key, "{}")
    assert json.loads(track().client.get_experiment(experiment.experiment_id).tags[key]) == view


def test_the_view_shows_the_trials_of_the_study_alone(track: Callable[..., Tracker]) -> None:
    """Neither the grid nor the pretraining, and no other study's, which may share the experiment."""
    tracker = track()
    grid = tracker.open("grid", "g", "grid", {})
    tracker.open("trial", "t", "a trial", {}, grid.id).close()
    tracker.facts["ssl_ray.study"] = "other"
    tracker.open("trial", "u", "not ours", {}, grid.id).close()
    tracker.settle()
    (experiment,) = [one for one in tracker.client.search_experiments() if one.name == tracker.experiment]
    view = json.loads(experiment.tags[f"mlflow.sharedViewState.{tracker.study}"])
    found = tracker.client.search_runs([experiment.experiment_id], view["searchFilter"], order_by=[])
    assert [run.info.run_name for run in found] == ["a trial"]


def test_a_description_links_to_a_run_that_has_no_id_yet(track: Callable[..., Tracker]) -> None:
    """And every run says who has started what, and of which commit."""
    tracker = track()
    tracker.stop()
    grid = tracker.open("grid", "g", "grid", {})
    trial = tracker.open("trial", "t", "trial", {}, grid.id, {NOTE: f"[all](#/runs/{grid.id}), of ssl-ray"})
    for run in (grid, trial):
        run.close()
    again = track()
    (found,) = again.runs(kind="trial")
    assert found.data.tags[NOTE] == f"[all](#/runs/{again.finished('grid', 'g')}), of ssl-ray"
    assert found.data.tags["mlflow.user"]
    assert found.data.tags["mlflow.source.name"]
    assert found.data.tags["ssl_ray.study"] == again.study
