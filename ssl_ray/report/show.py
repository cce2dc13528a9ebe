"""The answer where MLflow shows it: description and artifacts of the grid's run; the best networks, registered."""

import csv
from collections.abc import Sequence
from pathlib import Path

from ssl_ray.console import say
from ssl_ray.evaluate.scores import ORIGINAL_DICE_FOREGROUND
from ssl_ray.report.comparison import SELECTION
from ssl_ray.report.results import Results
from ssl_ray.report.tables import Table
from ssl_ray.text import reason
from ssl_ray.tracking.client import MlflowException
from ssl_ray.tracking.tracker import Tracker
from ssl_ray.tracking.view import picture, run_link


def show_answer(results: Results, tracker: Tracker, answers: Sequence[str], table: Table, folder: Path) -> str:
    """Log `answer.csv` and the figure with the grid's run, and describe the experiment -> the run's description."""
    run_id, figure = results.grid.info.run_id, folder / "figures" / "label_efficiency.png"
    with (folder / "answer.csv").open("w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows([table.header, *([cell.replace("*", "") for cell in row] for row in table.rows)])
    text = ["\n".join(f"- {answer}" for answer in answers)]
    shown = [folder / "answer.csv"]
    if figure.is_file():
        shown.append(figure)
        text.append(picture(run_id, figure.name, f"foreground Dice over {results.labelled}s"))
    for path in shown:
        tracker.attach(run_id, path)
    comparison = tracker.link("").lstrip("/")
    whole = f"{comparison.partition('?')[0]}/{run_id}/artifacts/report/report.html"
    lineage = [
        run_link(one.run.info.run_id, f"pretraining{one.suffix.replace('_', ' ')}") for one in results.pretraining
    ]
    text.append(" · ".join([f"[the whole report]({whole})", f"[all trials compared]({comparison})", *lineage]))
    tracker.describe("\n\n".join([f"**Does pretraining help, and at how many {results.labelled}s?**", *text]))
    return "\n\n".join([*text, str(table)])


def register_networks(results: Results, tracker: Tracker) -> None:
    """Register the network and the encoder that did best on validation, under names of the study."""
    study, part = results.study.name, f"selected/{results.part}/{ORIGINAL_DICE_FOREGROUND}"
    trained = [trial for trial in results.finished if trial.run_id and SELECTION in trial.metrics]
    if trained:
        best = max(trained, key=lambda trial: trial.metrics[SELECTION])
        score = f"foreground Dice {best.metrics.get(part, float('nan')):.3f} on {results.part}, original grid"
        chosen = f"best of {len(trained)} on validation ({best.metrics[SELECTION]:.3f})"
        register_best(tracker, f"{study}-segmenter", str(best.run_id), f"{best.cell.label}: {chosen}; {score}")
    losses = {one.run.info.run_id: one.run.data.metrics.get("best_validation_loss") for one in results.pretraining}
    known = {run_id: loss for run_id, loss in losses.items() if loss is not None}
    if known:
        run_id = min(known, key=known.__getitem__)
        chosen = f"best of {len(known)} on validation: loss {known[run_id]:.4f}"
        register_best(tracker, f"{study}-encoder", run_id, chosen)


def register_best(tracker: Tracker, name: str, run_id: str, description: str) -> None:
    """Make a run's model the best version of a registered one; a server without a registry is told, and no more."""
    kind = "Segmentation networks" if name.endswith("segmenter") else "Pretrained encoders"
    about = f"{kind} of the study {tracker.study}. The alias `best` is the one that did best on validation."
    try:
        tracker.register(name, about, run_id, description)
    except MlflowException as error:
        say(f"MLflow's registry does not take {name}: {reason(error)}")
