"""Verbs of a model: segment with it, score what was segmented, take its features, give it away."""

import json
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from ssl_ray.cli.app import app
from ssl_ray.cli.options import AsJson, Quiet, print_json, writable
from ssl_ray.console import say
from ssl_ray.text import count_of, shown

Model = Annotated[
    str, typer.Argument(metavar="MODEL", help="model.safetensors, a cell's folder, runs:/ID/path, models:/NAME@ALIAS.")
]
Inputs = Annotated[list[Path], typer.Argument(metavar="INPUT...", help="NIfTI files, folders of them, datalists.")]
Output = Annotated[Path, typer.Option("--output", "-o", metavar="DIR", file_okay=False, help="Is made.")]
Part = Annotated[
    Literal["training", "validation", "test"] | None, typer.Option(help="Of a datalist; all of it if left out.")
]
Ensemble = Annotated[
    list[str],
    typer.Option(metavar="MODEL", default_factory=list, show_default=False, help="Average with it; repeats."),
]
KeepLargest = Annotated[
    list[str],
    typer.Option(metavar="ORGAN", default_factory=list, show_default=False, help="Only the largest part; repeats."),
]
Device = Annotated[Literal["auto", "cpu", "cuda"], typer.Option(help="auto: GPUs where the cluster has any.")]
Workers = Annotated[int | None, typer.Option(min=1, metavar="N", help="Two a GPU, or one for 4 CPUs, if left out.")]


def Flag(name: str, help: str) -> Any:  # noqa: N802  # it stands for a class of typer's
    """An option without a value."""
    return typer.Option(name, metavar="", help=help)


@app.command(epilog="Example: ssl-ray predict models:/demo-segmenter@best new_scans -o labels")
def predict(
    model: Model,
    inputs: Inputs,
    output: Output,
    ensemble: Ensemble,
    keep_largest: KeepLargest,
    part: Part = None,
    gaussian: Annotated[bool, Flag("--gaussian", "Weight the middle of windows more.")] = False,
    overlap: Annotated[float | None, typer.Option(min=0, max=0.99, metavar="SHARE", help="Of windows.")] = None,
    tta: Annotated[bool, Flag("--tta", "The mean of mirrored views, as far as trained on such.")] = False,
    probabilities: Annotated[bool, Flag("--probabilities", "Keep them, on the prepared grid.")] = False,
    resume: Annotated[bool, Flag("--continue", "Leave out what is complete.")] = False,
    device: Device = "auto",
    workers: Workers = None,
    quiet: Quiet = False,
) -> None:
    """Segment scans: label maps on their own grids, pictures, and a table of the organs' volumes.

    As the model was scored, unless an option says otherwise.
    """
    from ssl_ray.predict.inputs import cases_of
    from ssl_ray.predict.model import read_model

    models = [read_model(place) for place in (model, *ensemble)]
    told = models[0].metadata
    cases, left_out = cases_of(inputs, told.preparation.channels, part, output)
    _tell_left_out(left_out)
    from ssl_ray.cluster.connect import tell_if_passing
    from ssl_ray.predict.case import Outputs
    from ssl_ray.predict.run import SIZES, predict_all
    from ssl_ray.predict.segment import check_agree, manner_of, numbers_of

    check_agree(models)
    manner, notes = manner_of(told, gaussian, overlap, tta)
    for note in notes:
        say(f"other than the model was scored: {note}")
    tell_if_passing("the output folder", output)
    outputs = Outputs(output.absolute(), probabilities, numbers_of(keep_largest, told.organs))
    with writable(output):
        count, bad = predict_all(models, manner, cases, outputs, device=device, workers=workers, resume=resume)
    say(f"{output}: {count} of {len(cases)} volumes segmented now, {len(cases) - count - len(bad)} were there already")
    say(f"sizes of the organs: {output / SIZES}")
    _end(bad, len(cases))


@app.command(epilog="Example: ssl-ray evaluate labels my_ct/labelsTs --tolerance 1")
def evaluate(
    predictions: Annotated[Path, typer.Argument(metavar="PREDICTIONS", help="Label maps: a folder, or one file.")],
    labels: Annotated[Path, typer.Argument(metavar="LABELS", help="The true ones: a folder, a file, or a datalist.")],
    output: Annotated[
        Path | None, typer.Option("--output", "-o", metavar="DIR", file_okay=False, help="PREDICTIONS if left out.")
    ] = None,
    tolerance: Annotated[float, typer.Option(min=0.001, metavar="MM", help="Of surface Dice.")] = 2.0,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Score anybody's label maps: Dice, surface Dice, HD95, missed and false organs, on the grid of the true ones."""
    from ssl_ray.predict.evaluate import evaluate_all, names_of, pairs_of
    from ssl_ray.storage.files import write_file

    pairs, bad, missing = pairs_of(predictions, labels)
    names = names_of(predictions, labels)
    evaluation, failed = evaluate_all(pairs, names, tolerance)
    if not evaluation.cases:
        _end(bad | failed, len(bad | failed))
    folder = output or (predictions if predictions.is_dir() else predictions.parent)
    tree = evaluation.tree()
    with writable(folder):
        write_file(folder / "evaluation.json", json.dumps(tree).encode())
        write_file(folder / "evaluation.csv", evaluation.rows().to_csv(index=False).encode())
    if as_json:
        print_json(tree)
    else:
        say(evaluation.table())
        say(f"{len(evaluation.cases)} volumes; {folder / 'evaluation.csv'}, {folder / 'evaluation.json'}")
        if missing:
            say(f"{count_of(missing, 'label map')} in {labels} without a prediction: nothing is counted for them")
    _end(bad | failed, len(evaluation.cases) + len(bad | failed))


@app.command(epilog="Example: ssl-ray embed output/demo/pretrain-1a2b3c4d new_scans -o features.parquet")
def embed(
    model: Annotated[
        str, typer.Argument(metavar="MODEL", help="best.safetensors of a pretraining too, or its folder.")
    ],
    inputs: Inputs,
    output: Annotated[Path, typer.Option("--output", "-o", metavar="FILE", dir_okay=False, help="Parquet; is made.")],
    tokens: Annotated[bool, Flag("--tokens", "A row for each token, with its place, instead of their mean.")] = False,
    part: Part = None,
    device: Device = "auto",
    workers: Workers = None,
    quiet: Quiet = False,
) -> None:
    """Write the encoder's features of whole volumes, the mean over their tokens."""
    from ssl_ray.cluster.connect import tell_if_passing
    from ssl_ray.predict.embed import read_embedder, write_features
    from ssl_ray.predict.inputs import cases_of
    from ssl_ray.predict.workers import over_cases
    from ssl_ray.storage.files import file_digest

    embedder, path = read_embedder(model)
    cases, left_out = cases_of(inputs, embedder.preparation.channels, part)
    _tell_left_out(left_out)
    tell_if_passing("the output", output)
    outcomes = over_cases("embedding", cases, embedder.on, device, workers)
    with writable(output.parent):
        rows, bad = write_features(outcomes, file_digest(path), output, tokens)
    say(f"{output}: {rows} rows of {embedder.encoder.hidden_size} features")
    _end(bad, len(cases))


@app.command(epilog="Example: ssl-ray export models:/demo-segmenter@best -o spleen_ct --authors 'Our Hospital'")
def export(
    model: Model,
    output: Output,
    form: Annotated[
        Literal["bundle", "onnx", "safetensors"],
        typer.Option("--format", help="For MONAI; the network alone; the file as it is, or an encoder's."),
    ] = "bundle",
    authors: Annotated[str, typer.Option(metavar="NAMES", help="For the bundle's card and copyright.")] = "",
) -> None:
    """Write a model for others: a MONAI bundle runs with MONAI alone, and writes the labels that `predict` writes."""
    from ssl_ray.predict.export import export_model

    with writable(output):
        written = export_model(model, form, output, authors)
    for path in written:
        say(str(path))


def _tell_left_out(left_out: dict[str, str]) -> None:
    for path, why in [*left_out.items()][:5]:
        say(f"left out: {shown(path)}: {why}")
    if len(left_out) > 5:
        say(f"left out: {len(left_out) - 5} more")


def _end(bad: dict[str, str], count: int) -> None:
    """List what could not be done of so many, by path with the reason; exit code 2 if there is anything."""
    for path, why in bad.items():
        say(f"FAILED: {why if path in why else f'{path}: {why}'}")
    if bad:
        others = count - len(bad)
        say(f"{len(bad)} failed" + (f"; {count_of(others, 'volume')} complete" if others else ""))
        raise typer.Exit(2)
