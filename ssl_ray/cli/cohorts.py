"""Verbs of a cohort: lists of a folder's scans, and a synthetic one."""

from typing import Annotated, Literal

import typer

from ssl_ray.cli.app import app
from ssl_ray.cli.options import Folder, writable
from ssl_ray.config.schema import PhantomCohort
from ssl_ray.console import say

Sizes = Annotated[str, typer.Option(metavar="N,N", help="Labelled training volumes of nested splits.")]
Seed = Annotated[int, typer.Option(metavar="S")]


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

    with writable(folder):
        found = find_scans(folder, subject)
        try:
            written = write_datalists(folder, found, _sizes(splits), validation, test, seed)
        finally:  # what was found explains what is missing
            say(summary(folder, found))
    for name, parts in written.items():
        say(f"{folder / name}: {', '.join(f'{count} {part}' for part, count in parts.items())} volumes")


def _sizes(text: str) -> list[int]:
    """`6,12,24` as numbers."""
    sizes = text.split(",") if text else []
    if not all(size.strip().isdecimal() and int(size) > 0 for size in sizes):
        raise typer.BadParameter(f"must be numbers from 1 on, like 6,12,24, got {text}", param_hint="--splits")
    return [int(size) for size in sizes]
