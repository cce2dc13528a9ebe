"""Commands, nothing else: one function for each verb.

The rooms that load torch, Ray or MLflow are imported inside the verbs, after the experiment is read, so that a typo in
the YAML is told at once.
"""

import json
import logging
import os
import signal
import sys
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from glob import glob
from pathlib import Path
from typing import Annotated, Any, Literal, TypeAlias

import typer
from typer.core import TyperGroup

from ssl_ray.config.schema import PhantomCohort, Study
from ssl_ray.console import say
from ssl_ray.errors import UserError
from ssl_ray.study.experiment import Step, load
from ssl_ray.text import without_password
from ssl_ray.training.devices import DEVICES

TRACEBACK = "SSL_RAY_TRACEBACK"
"""Environment variable: where it is set, an error shows where in the code it happened."""


class _Commands(TyperGroup):
    """Turns what a verb raises into one message and an exit code: 2 for what the user can mend, 1 for the rest."""

    def invoke(self, ctx: Any) -> None:
        try:
            super().invoke(ctx)
        except (typer.Exit, typer.TyperException):
            raise  # Typer's own: an exit code, or a wrong command line
        except KeyboardInterrupt as error:
            _tell("interrupted; the same command goes on from the last checkpoints")
            raise typer.Exit(1) from error
        except Exception as error:
            if os.environ.get(TRACEBACK):
                print(without_password(traceback.format_exc()), file=sys.stderr)
            if isinstance(error, UserError):
                _tell(str(error))
                raise typer.Exit(2) from error
            _tell(f"{type(error).__name__}: {error}")
            frame = traceback.extract_tb(error.__traceback__)[-1]
            _tell(f"raised at {frame.filename}:{frame.lineno}; {TRACEBACK}=1 shows the way there")
            _tell("finished work is kept, the same command goes on")
            raise typer.Exit(1) from error


def _tell(message: str) -> None:
    print(f"ssl-ray: {without_password(message)}", file=sys.stderr)


class _Formatter(logging.Formatter):
    """Log lines, of libraries too, without passwords."""

    def format(self, record: logging.LogRecord) -> str:
        return without_password(super().format(record))


app = typer.Typer(
    cls=_Commands,
    rich_markup_mode="rich",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    epilog="Exit code 0: done. 2: something to mend in the input, named in one message. 1: anything else.",
)


@app.callback()
def _about() -> None:
    """Does self-supervised pretraining on my unlabelled CT help my segmentation, and with how many labelled volumes?

    One YAML describes a study; [bold]ssl-ray run[/bold] carries it out and skips what is already done.
    """


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command, by default that of this process's command line -> exit code, as the `epilog` has it."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # `ray job stop` then ends it as Ctrl-C does
    handler = logging.StreamHandler()
    handler.setFormatter(_Formatter("%(levelname)s %(name)s: %(message)s"))
    logging.basicConfig(level=logging.WARNING, handlers=[handler])
    try:
        typer.main.get_command(app).main(arguments, prog_name="ssl-ray")
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else 0
    return 0


def _experiments(incomplete: str) -> list[str]:
    """For the shell's completion: YAML files that begin so, in this folder or in one that begins so."""
    return sorted({*glob(f"{incomplete}*.yaml"), *glob(f"{incomplete}*/*.yaml")})


Gpu: TypeAlias = Literal[tuple(DEVICES)]  # type: ignore[valid-type]  # mypy reads no names out of a dict
Experiment = Annotated[
    Path, typer.Argument(help="The study's YAML, e.g. experiments/demo.yaml.", autocompletion=_experiments)
]
Overrides = Annotated[
    list[str],
    typer.Option("--set", metavar="KEY=VALUE", default_factory=list, show_default=False, help="Replace one value."),
]
Fresh = Annotated[bool, typer.Option("--fresh", metavar="", help="Start again; the old is kept under another name.")]
Verify = Annotated[bool, typer.Option("--verify", metavar="", help="Read all, whatever the times of files say.")]
Folder = Annotated[Path, typer.Argument(metavar="DIR", file_okay=False)]
Sizes = Annotated[str, typer.Option(metavar="N,N", help="Labelled training volumes of nested splits.")]
Seed = Annotated[int, typer.Option(metavar="S")]


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


@app.command(epilog="Example: ssl-ray phantom data/phantom --volumes 80 --splits 6,12")
def phantom(
    folder: Folder,
    volumes: Annotated[int, typer.Option(min=1, metavar="N", help="Unlabelled volumes.")] = 40,
    labelled: Annotated[int, typer.Option(min=1, metavar="N", help="Labelled training volumes.")] = 24,
    validation: Annotated[int, typer.Option(min=1, metavar="N", help="Labelled validation volumes.")] = 6,
    test: Annotated[int, typer.Option(min=1, metavar="N", help="Labelled test volumes.")] = 8,
    splits: Sizes = "6,12,24",
    seed: Seed = 0,
    mri: Annotated[bool, typer.Option("--mri", help="T1- and T2-weighted MRI instead of CT.")] = False,
) -> None:
    """Write a synthetic labelled cohort with its datalists."""
    sizes = _sizes(splits)
    from ssl_ray.phantom.cohort import write_cohort

    numbers = {"unlabelled": volumes, "labelled": labelled, "validation": validation, "test": test, "seed": seed}
    with _writable(folder):
        modality: Literal["CT", "MRI"] = "MRI" if mri else "CT"
        write_cohort(PhantomCohort(root=str(folder), splits=tuple(sizes), modality=modality, **numbers))
    say(f"{folder}: unlabelled.json, {', '.join(f'labelled_{size}.json' for size in sizes)}")


@app.command(epilog=r"Example: ssl-ray datalist my_ct --splits 6,12,24 --test 0.2 --subject '(patient\d+)'")
def datalist(
    folder: Folder,
    splits: Sizes = "",
    validation: Annotated[float, typer.Option(min=0, max=1, help="Share of the patients to hold out.")] = 0.2,
    test: Annotated[float, typer.Option(min=0, metavar="N|SHARE", help="Labelled patients to report on.")] = 0,
    subject: Annotated[
        str | None,
        typer.Option(metavar="REGEX", help=r"The patient in a path below DIR, e.g. '(A-\d+)'; else by layout."),
    ] = None,
    seed: Seed = 0,
) -> None:
    """Write datalists for a folder of NIfTI files: nnU-Net, Decathlon, BIDS, TotalSegmentator or any other."""
    if test > 1 and not test.is_integer():
        raise typer.BadParameter(f"must be a share below 1 or a whole number, got {test:g}", param_hint="--test")
    from ssl_ray.data.listing import find_scans, summary, write_datalists

    with _writable(folder):
        found = find_scans(folder, subject)
        try:
            written = write_datalists(folder, found, _sizes(splits), validation, test, seed)
        finally:  # what was found explains what is missing
            say(summary(folder, found))
    for name, parts in written.items():
        say(f"{folder / name}: {', '.join(f'{count} {part}' for part, count in parts.items())} volumes")


@contextmanager
def _writable(folder: Path) -> Iterator[None]:
    """What cannot be read or written in the folder that the user named is the user's to mend, e.g. a missing right."""
    try:
        yield
    except OSError as error:
        if not Path(error.filename or "").absolute().is_relative_to(folder.absolute()):
            raise
        raise UserError(f"{error.filename}: {error.strerror}") from error


def _sizes(text: str) -> list[int]:
    """`6,12,24` as numbers."""
    sizes = text.split(",") if text else []
    if not all(size.strip().isdecimal() and int(size) > 0 for size in sizes):
        raise typer.BadParameter(f"must be numbers from 1 on, like 6,12,24, got {text}", param_hint="--splits")
    return [int(size) for size in sizes]


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
