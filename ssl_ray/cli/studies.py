"""Verbs of a study: plan it, carry it out, report on it."""

import json
from typing import Annotated, Literal, TypeAlias

import typer

from ssl_ray.cli.app import app
from ssl_ray.cli.options import Experiment, Overrides
from ssl_ray.config.schema import Study
from ssl_ray.console import say
from ssl_ray.study.experiment import Step, load
from ssl_ray.training.devices import DEVICES

Gpu: TypeAlias = Literal[tuple(DEVICES)]  # type: ignore[valid-type]  # mypy reads no names out of a dict
Fresh = Annotated[bool, typer.Option("--fresh", metavar="", help="Start again; the old is kept under another name.")]
Verify = Annotated[bool, typer.Option("--verify", metavar="", help="Read all, whatever the times of files say.")]


@app.command(epilog="Example: ssl-ray run experiments/demo.yaml --set output=/shared/output")
def run(experiment: Experiment, overrides: Overrides, fresh: Fresh = False) -> None:
    """Carry out the whole study: prepare, pretrain, fine-tune, report."""
    _carry_out(load(experiment, overrides), "report", fresh)


@app.command(epilog="Example: ssl-ray plan experiments/tcia_btcv.yaml --gpu h100 --workers 8")
def plan(
    experiment: Experiment,
    overrides: Overrides,
    gpu: Annotated[Gpu | None, typer.Option(case_sensitive=False, help="Estimate for this GPU a worker.")] = None,
    workers: Annotated[int | None, typer.Option(min=1, metavar="N", help="Instead of pretrain.workers.")] = None,
    no_probe: Annotated[bool, typer.Option("--no-probe", metavar="", help="Time no steps here.")] = False,
    as_json: Annotated[bool, typer.Option("--json", metavar="", help="Everything, for programs.")] = False,
) -> None:
    """Tell what a run will take, and what will limit it; nothing is started or written."""
    study = load(experiment, [*overrides, *([f"pretrain.workers={workers}"] if workers else [])])
    from ssl_ray.estimate.study import estimate_study
    from ssl_ray.estimate.text import render
    from ssl_ray.study import identity
    from ssl_ray.study.parts import folders_of

    folders = folders_of(study)
    if folders.output.origin is None:
        identity.check_unchanged(study, folders)
    found = estimate_study(study, folders, gpu, with_probe=not no_probe)
    say(json.dumps(found) if as_json else render(found))


@app.command(epilog="Example: ssl-ray prepare my_study.yaml --set on_bad_volume=skip")
def prepare(experiment: Experiment, overrides: Overrides, verify: Verify = False) -> None:
    """Only bring the volumes into the store."""
    _carry_out(load(experiment, overrides), "prepare", verify=verify)


@app.command(epilog="Example: ssl-ray pretrain experiments/demo.yaml --set pretrain.epochs=20 --fresh")
def pretrain(experiment: Experiment, overrides: Overrides, fresh: Fresh = False) -> None:
    """Prepare, then pretrain."""
    _carry_out(load(experiment, overrides), "pretrain", fresh)


@app.command(epilog="Example: ssl-ray finetune experiments/demo.yaml --set finetune.runs=3")
def finetune(experiment: Experiment, overrides: Overrides, fresh: Fresh = False) -> None:
    """Prepare, pretrain, then fine-tune the grid."""
    _carry_out(load(experiment, overrides), "finetune", fresh)


@app.command("report", epilog="Example: ssl-ray report experiments/demo.yaml")
def report_again(experiment: Experiment, overrides: Overrides) -> None:
    """Write table, figures and page again, from MLflow alone."""
    study = load(experiment, overrides)
    from ssl_ray.study.parts import folders_of
    from ssl_ray.study.runner import report

    folders = folders_of(study)
    folders.check_writable()
    report(study, folders)  # also of a study that this version would not go on with


@app.command(epilog="Example: ssl-ray ui experiments/demo.yaml --port 8080")
def ui(
    experiment: Experiment,
    overrides: Overrides,
    port: Annotated[
        int | None, typer.Option(min=1, max=65535, metavar="N", help="By default 5000, or a free one.")
    ] = None,
    no_browser: Annotated[bool, typer.Option("--no-browser", metavar="", help="Only print the link.")] = False,
) -> None:
    """Open MLflow where the trials of a study are compared; Ctrl-C ends what was started for it."""
    study = load(experiment, overrides)
    from ssl_ray.study.parts import folders_of, tracker_of
    from ssl_ray.tracking.server import look

    folders = folders_of(study)
    look(tracker_of(study, create=False), folders.output.folder / "artifacts", port, not no_browser)


def _carry_out(study: Study, last: Step, fresh: bool = False, verify: bool = False) -> None:
    from ssl_ray.study.identity import only_one, set_aside
    from ssl_ray.study.parts import folders_of
    from ssl_ray.study.runner import carry_out

    folders = folders_of(study)
    with only_one(folders):
        if fresh and (kept := set_aside(study, folders)):
            say(f"the old study is kept: {kept}")
        if carry_out(study, last, verify):
            raise typer.Exit(1)
