"""Verbs of a study: look at its volumes, plan it, carry it out, see how far it is, report on it, tidy up."""

import sys
from contextlib import nullcontext
from typing import Annotated, Literal, TypeAlias

import typer

from ssl_ray.cli.app import app
from ssl_ray.cli.options import AsJson, Experiment, Overrides, Quiet, print_json
from ssl_ray.config.schema import Study
from ssl_ray.console import say
from ssl_ray.study.experiment import Step, load, load_kept
from ssl_ray.training.devices import DEVICES

Gpu: TypeAlias = Literal[tuple(DEVICES)]  # type: ignore[valid-type]  # mypy reads no names out of a dict
Fresh = Annotated[bool, typer.Option("--fresh", metavar="", help="Start again; the old is kept under another name.")]
Keep = Literal["best", "all"]
Verify = Annotated[bool, typer.Option("--verify", metavar="", help="Read all, whatever the times of files say.")]


@app.command(epilog="Example: ssl-ray run experiments/demo.yaml --set output=/shared/output")
def run(experiment: Experiment, overrides: Overrides, fresh: Fresh = False, quiet: Quiet = False) -> None:
    """Carry out the whole study: prepare, pretrain, fine-tune, report."""
    _carry_out(load(experiment, overrides), "report", fresh)


@app.command(epilog="Example: ssl-ray plan experiments/tcia_btcv.yaml --gpu h100 --set pretrain.workers=8")
def plan(
    experiment: Experiment,
    overrides: Overrides,
    gpu: Annotated[Gpu | None, typer.Option(case_sensitive=False, help="Estimate for this GPU a worker.")] = None,
    no_probe: Annotated[bool, typer.Option("--no-probe", metavar="", help="Time no steps here.")] = False,
    as_json: AsJson = False,
) -> None:
    """Tell what a run will take, and what will limit it; nothing is started or written."""
    study = load(experiment, overrides)
    from ssl_ray.estimate.study import estimate_study
    from ssl_ray.estimate.text import render
    from ssl_ray.study import identity
    from ssl_ray.study.parts import folders_of

    folders = folders_of(study)
    if folders.output.origin is None:
        identity.check_unchanged(study, folders)
    found = estimate_study(study, folders, gpu, with_probe=not no_probe)
    print_json(found) if as_json else say(render(found))


@app.command(epilog="Example: ssl-ray prepare my_study.yaml --set on_bad_volume=skip")
def prepare(experiment: Experiment, overrides: Overrides, verify: Verify = False, quiet: Quiet = False) -> None:
    """Only bring the volumes into the store."""
    _carry_out(load(experiment, overrides), "prepare", verify=verify)


@app.command(epilog="Example: ssl-ray pretrain experiments/demo.yaml --set pretrain.epochs=20 --fresh")
def pretrain(experiment: Experiment, overrides: Overrides, fresh: Fresh = False, quiet: Quiet = False) -> None:
    """Prepare, then pretrain."""
    _carry_out(load(experiment, overrides), "pretrain", fresh)


@app.command(epilog="Example: ssl-ray finetune experiments/demo.yaml --set finetune.runs=3")
def finetune(experiment: Experiment, overrides: Overrides, fresh: Fresh = False, quiet: Quiet = False) -> None:
    """Prepare, pretrain, then fine-tune the grid."""
    _carry_out(load(experiment, overrides), "finetune", fresh)


@app.command("report", epilog="Example: ssl-ray report experiments/demo.yaml")
def report_again(experiment: Experiment, overrides: Overrides) -> None:
    """Write table, figures and page again, from MLflow alone."""
    study = load(experiment, overrides)
    from ssl_ray.study.parts import folders_of
    from ssl_ray.study.reporting import report

    report(study, folders_of(study))  # also of a study that this version would not go on with


@app.command(epilog="Example: ssl-ray check my_study.yaml; ssl-ray check my_study.yaml --volumes 1000 --json")
def check(
    experiment: Experiment,
    overrides: Overrides,
    volumes: Annotated[int, typer.Option(min=1, metavar="N", help="The most that are read of each part.")] = 100,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Look at the volumes before a day of training: what there is, what looks wrong, a page of pictures.

    Exit code 2 where a run would refuse some of them, and not go on without.
    """
    study = load(experiment, overrides)
    from ssl_ray.study.check import check_study
    from ssl_ray.study.parts import folders_of

    folders = folders_of(study)
    folders.check_writable()
    found, text = check_study(study, folders, volumes)
    print_json(found) if as_json else say(f"{text}\npage: {found['page']}")
    if study.on_bad_volume != "skip" and any(one["refused"] for one in found["findings"]):
        raise typer.Exit(2)


@app.command(epilog="Example: ssl-ray status experiments/demo.yaml; watch -n 10 ssl-ray status experiments/demo.yaml")
def status(experiment: Experiment, overrides: Overrides, as_json: AsJson = False) -> None:
    """Tell how far a study is, from another terminal: stage, step, rate, time left, failures."""
    study = load_kept(experiment, overrides)
    from ssl_ray.storage.folders import Folders
    from ssl_ray.study.status import render, status_of

    found = status_of(study, Folders.of(study.name, study.output, study.cache, study.scratch))
    print_json(found) if as_json else say(render(found))


@app.command(epilog="Example: ssl-ray clean experiments/demo.yaml --dry-run; ssl-ray clean demo.yaml --keep best --yes")
def clean(
    experiment: Experiment,
    overrides: Overrides,
    keep: Annotated[Keep, typer.Option(help="Weights of all cells, or of the best on validation of each arm.")] = "all",
    dry_run: Annotated[bool, typer.Option("--dry-run", metavar="", help="Only list.")] = False,
    yes: Annotated[bool, typer.Option("--yes", metavar="", help="Remove without asking.")] = False,
    as_json: AsJson = False,
) -> None:
    """List what a study has on disk, and remove what no result and no unfinished training needs; it asks before."""
    study = load_kept(experiment, overrides)
    from ssl_ray.storage.folders import Folders
    from ssl_ray.study.clean import inventory, remove, render
    from ssl_ray.study.lock import only_one

    folders, removed = Folders.of(study.name, study.output, study.cache, study.scratch), 0
    # Without its folder here, nothing of the study can go, and nothing is to be made for it.
    with only_one(folders) if folders.study.is_dir() and not dry_run else nullcontext():
        items = inventory(study, folders, keep)
        if not as_json:
            say(render(items))
        can_go = not dry_run and any(not item.needed for item in items)
        if can_go and (yes or (sys.stdin.isatty() and not as_json and typer.confirm("remove what can go?"))):
            removed = remove(folders, items)
    if as_json:
        print_json({"removed_bytes": removed, "items": [item._asdict() for item in items]})
    elif can_go:
        say(f"removed {removed:,} bytes" if removed else "nothing is removed; --yes removes without asking")


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
    from ssl_ray.study.lock import only_one
    from ssl_ray.study.parts import folders_of
    from ssl_ray.study.runner import carry_out

    with only_one(folders_of(study)):
        if carry_out(study, last, verify, fresh):
            raise typer.Exit(1)
