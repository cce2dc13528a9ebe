"""Verbs of a cohort: a study or lists for a folder's scans, and a synthetic one."""

from pathlib import Path
from typing import Annotated, Literal

import typer

from ssl_ray.cli.app import app
from ssl_ray.cli.options import Folder, Quiet, writable
from ssl_ray.config.schema import PhantomCohort
from ssl_ray.console import say

Sizes = Annotated[str, typer.Option(metavar="N,N", help="Labelled training volumes of nested splits.")]
Seed = Annotated[int, typer.Option(min=0, max=2**63 - 1, metavar="S")]
Subject = Annotated[
    str | None,
    typer.Option(metavar="REGEX", help=r"The patient in a path below DIR, e.g. '(A-\d+)'; else by layout."),
]


@app.command(epilog="Example: ssl-ray phantom data/phantom --volumes 80 --splits 6,12")
def phantom(
    folder: Folder,
    volumes: Annotated[int, typer.Option(min=3, metavar="N", help="Unlabelled volumes.")] = 40,
    labelled: Annotated[int, typer.Option(min=1, metavar="N", help="Labelled training volumes.")] = 24,
    validation: Annotated[int, typer.Option(min=1, metavar="N", help="Labelled validation volumes.")] = 6,
    test: Annotated[int, typer.Option(min=1, metavar="N", help="Labelled test volumes.")] = 8,
    splits: Sizes = "6,12,24",
    seed: Seed = 0,
    quiet: Quiet = False,
    mri: Annotated[bool, typer.Option("--mri", help="T1- and T2-weighted MRI instead of CT.")] = False,
) -> None:
    """Write a synthetic labelled cohort with its datalists."""
    sizes = _sizes(splits)
    from ssl_ray.phantom.cohort import write_cohort

    numbers = {"unlabelled": volumes, "labelled": labelled, "validation": validation, "test": test, "seed": seed}
    with writable(folder):
        modality: Literal["CT", "MRI"] = "MRI" if mri else "CT"
        write_cohort(PhantomCohort(root=str(folder), splits=tuple(sizes), modality=modality, **numbers))
    say(f"{folder}: unlabelled.json, {', '.join(f'labelled_{size}.json' for size in sizes)}")


@app.command(epilog=r"Example: ssl-ray datalist my_ct --splits 6,12,24 --test 0.2 --subject '(patient\d+)'")
def datalist(
    folder: Folder,
    splits: Sizes = "",
    validation: Annotated[float, typer.Option(min=0, max=1, help="Share of the patients to hold out.")] = 0.2,
    test: Annotated[float, typer.Option(min=0, metavar="N|SHARE", help="Labelled patients to report on.")] = 0,
    subject: Subject = None,
    seed: Seed = 0,
    quiet: Quiet = False,
) -> None:
    """Write datalists for a folder of NIfTI files: nnU-Net, Decathlon, BIDS, TotalSegmentator or any other."""
    _check_test(test)
    from ssl_ray.data.listing import find_scans, summary, write_datalists

    with writable(folder):
        found = find_scans(folder, subject)
        try:
            written = write_datalists(folder, found, _sizes(splits), validation, test, seed)
        finally:  # what was found explains what is missing
            say(summary(folder, found))
    _say_lists(folder, written)


@app.command(
    epilog=r"Example: ssl-ray new my_ct --subject '(patient\d+)'; ssl-ray check my_ct.yaml; ssl-ray run my_ct.yaml"
)
def new(
    folder: Folder,
    study: Annotated[
        Path | None, typer.Option(metavar="FILE", show_default=False, help="The YAML to write, else DIR's name here.")
    ] = None,
    subject: Subject = None,
    test: Annotated[
        float | None,
        typer.Option(
            min=0, metavar="N|SHARE", show_default=False, help="Labelled patients to report on; else by what there is."
        ),
    ] = None,
    gpu: Annotated[
        bool | None, typer.Option("--gpu/--cpu", show_default=False, help="What to train on, else what is here.")
    ] = None,
    seed: Seed = 0,
    quiet: Quiet = False,
) -> None:
    """Write datalists and a study for your own folder of NIfTI files, with comments where you have to decide."""
    _check_test(test or 0)
    from ssl_ray.study.new import new_study

    if gpu is None:
        import torch

        gpu = torch.cuda.is_available()
    path = study or Path(f"{folder.resolve().name}.yaml")
    with writable(folder):
        _say_lists(folder, new_study(folder, path, subject, test, seed, gpu))
    say(f"{path}: look for DECIDE in it; then ssl-ray check {path}, ssl-ray run {path}")


def _check_test(test: float) -> None:
    if test > 1 and not test.is_integer():
        raise typer.BadParameter(f"must be a share below 1 or a whole number, got {test:g}", param_hint="--test")


def _say_lists(folder: Path, written: dict[str, dict[str, int]]) -> None:
    for name, parts in written.items():
        say(f"{folder / name}: {', '.join(f'{count} {part}' for part, count in parts.items())} volumes")


def _sizes(text: str) -> list[int]:
    """`6,12,24` as numbers."""
    sizes = text.split(",") if text else []
    if not all(size.strip().isdecimal() and int(size) > 0 for size in sizes):
        raise typer.BadParameter(f"must be numbers from 1 on, like 6,12,24, got {text}", param_hint="--splits")
    return [int(size) for size in sizes]
