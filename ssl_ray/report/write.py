"""From MLflow alone: does pretraining help, and at how many labelled volumes? One page in Markdown and in HTML."""

import json
import re
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from ssl_ray.config.schema import Study
from ssl_ray.evaluate.scores import PUBLISHED_DICE
from ssl_ray.report.figures import draw_finetuning, draw_label_efficiency, draw_organs, draw_pretraining
from ssl_ray.report.page import Block, Bullets, Details, Heading, Paragraph, Picture, Table, to_html, to_markdown
from ssl_ray.report.results import FOREGROUND, HD95, SURFACE_DICE, WITH_BACKGROUND, Results, read_results
from ssl_ray.report.tables import (
    answer,
    cell_table,
    count_of,
    honest_table,
    notes,
    organ_table,
    published_table,
    running_table,
)
from ssl_ray.tracking.tracker import Tracker


@dataclass(frozen=True)
class Report:
    """Where the report is, and what of it goes to the terminal."""

    table: str
    """The answers and both tables of results, as Markdown that reads well as plain text."""
    markdown: Path
    html: Path
    figures: tuple[Path, ...]


def write_report(study: Study, tracker: Tracker, folder: Path) -> Report:
    """Write `report.md`, `report.html` and `figures/*.png`, and log them as artifacts of the grid's MLflow run.

    A cell that is missing or failed is named where its number would stand. Nothing is read but MLflow.

    Args:
        study: the experiment.
        tracker: its MLflow experiment.
        folder: to write into.

    Raises:
        ValueError: when MLflow has no experiment or no grid of this study.
    """
    results = read_results(study, tracker)
    answers = Bullets([answer(results, split) for split in results.splits], answer=True)
    published, honest = published_table(results), honest_table(results)
    figures = _Figures(folder)
    blocks: list[Block] = [
        Heading("Does pretraining help? And at how many labelled volumes?", 1),
        Paragraph(f"Study `{study.name}`. {_question(results)}"),
        answers,
        *figures.efficiency(results),
        *_honest(results, honest),
        *_published(results, published),
        Heading("How to read the numbers"),
        Bullets(list(notes(results))),
        *_organs(results, figures),
        *_finetuning(results, figures),
        *_pretraining(results, figures),
        *_cells(results),
        *_provenance(results, tracker),
    ]
    folder.mkdir(parents=True, exist_ok=True)
    markdown, html = folder / "report.md", folder / "report.html"
    markdown.write_text(to_markdown(blocks, folder), encoding="utf-8")
    html.write_text(to_html(blocks, f"{study.name}: does pretraining help?"), encoding="utf-8")
    for path in (markdown, html):
        tracker.attach(results.grid.info.run_id, path, "report")
    for path in figures.paths:
        tracker.attach(results.grid.info.run_id, path, "report/figures")
    short: list[Block] = [
        Bullets([item.replace("**", "") for item in answers.items]),
        Paragraph(f"Organs only, original grid, {results.volumes} {results.part} volumes:"),
        honest,
        Paragraph("Published definition (with background, resampled grid), in percent:"),
        published,
    ]
    return Report(to_markdown(short, folder).rstrip(), markdown, html, tuple(figures.paths))


class _Figures:
    """Draws into `figures/` and remembers what was drawn."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder / "figures"
        self.paths: list[Path] = []

    def add(self, name: str, drawn: bool, alt: str, caption: str) -> list[Block]:
        if not drawn:
            return []
        self.paths.append(self.path(name))
        return [Picture(self.path(name), alt, caption)]

    def path(self, name: str) -> Path:
        return self._folder / f"{name}.png"

    def efficiency(self, results: Results) -> list[Block]:
        drawn = draw_label_efficiency(results, self.path("label_efficiency"))
        caption = (
            "Foreground Dice on the original grid. Bars on the left: 95 % bootstrap interval over volumes; they are "
            "wide because volumes differ, so judge by the right panel, where every volume is compared with itself."
            f"{' Small dots on the left: single seeds.' if len(results.study.finetune.grid.seeds) > 1 else ''}"
        )
        return self.add("label_efficiency", drawn, "foreground Dice over labelled volumes", caption)


def _question(results: Results) -> str:
    splits = ", ".join(map(str, results.splits))
    return (
        f"UNETR with {' and with '.join(results.inits)} encoder weights, trained on {splits} labelled volumes and "
        f"scored on {count_of(results.volumes, f'{results.part} volume')}."
    )


def _honest(results: Results, table: Table) -> list[Block]:
    text = (
        "Measured against the labels as they are in the NIfTI files: the prediction is resampled to their grid, "
        "background does not count, and a missed organ counts as Dice 0, surface Dice 0 and HD95 the volume's "
        f"diagonal. Mean over the {results.volumes} {results.part} volumes of the mean over the organs present "
        f"(`{FOREGROUND.name}`, `{HD95.name}`, `{SURFACE_DICE.name}`)."
    )
    return [Heading("Honest definition: organs only, original grid"), Paragraph(text + _over(results)), table]


def _published(results: Results, table: Table) -> list[Block]:
    text = (
        "For comparison with published tables only: Dice in percent, **background included**, on the resampled and "
        f"cropped grid, mean over the {results.volumes} {results.part} volumes (`{WITH_BACKGROUND.name}`). "
        "Background is nearly always right and lifts the mean."
    )
    tutorial = (
        "The tutorial's own script averages running means, so that early volumes weigh more "
        f"(`{PUBLISHED_DICE}`). That gives:"
    )
    return [
        Heading("Published definition: Dice with background, resampled grid"),
        Paragraph(text + _over(results)),
        table,
        Paragraph(tutorial),
        running_table(results),
    ]


def _over(results: Results) -> str:
    seeds = len(results.study.finetune.grid.seeds)
    return f" Mean ± standard deviation over {seeds} seeds." if seeds > 1 else ""


def _organs(results: Results, figures: _Figures) -> list[Block]:
    if not results.organs:
        return []
    blocks: list[Block] = [
        Heading(f"Organs: original grid, {results.part} volumes"),
        Paragraph(
            f"Mean over the {results.part} volumes that have the organ. A single organ has few volumes and no interval "
            "here: do not read much into one row."
        ),
    ]
    drawn = draw_organs(results, figures.path("organs"))
    blocks += figures.add("organs", drawn, "Dice of every organ", "Dice of every organ on the original grid.")
    for split in results.splits:
        blocks += [Heading(count_of(split, "labelled volume"), 3), organ_table(results, split)]
    return blocks


def _finetuning(results: Results, figures: _Figures) -> list[Block]:
    drawn = draw_finetuning(results, figures.path("finetuning"))
    caption = (
        "Foreground Dice on validation, resampled grid, at the chosen learning rate; one line a seed. The marked "
        "checkpoint is the one that was scored."
    )
    picture = figures.add("finetuning", drawn, "foreground Dice on validation over steps", caption)
    return [Heading("Fine-tuning"), *picture] if picture else []


def _cells(results: Results) -> list[Block]:
    text = "Foreground Dice everywhere; all scores but the first on the original grid. Bold: the learning rate chosen."
    failures = [
        f"`{trial.cell.name}` failed: {_no_password(trial.failure)}" for trial in results.trials if trial.failure
    ]
    return [Heading("All cells"), Paragraph(text), cell_table(results), *([Bullets(failures)] if failures else [])]


def _pretraining(results: Results, figures: _Figures) -> list[Block]:
    blocks: list[Block] = []
    for number, pretraining in enumerate(results.pretraining):
        name = f"pretraining_{number + 1}" if number else "pretraining"
        blocks.append(Heading(f"PretrainingRun (run `{pretraining.run.info.run_id[:8]}`)"))
        if pretraining.validation_loss:
            step, loss = min(pretraining.validation_loss.items(), key=lambda point: point[1])
            text = f"The weights are those of step {step:,}, with the lowest validation loss: L1 {loss:.4f}."
            if identity := pretraining.identity_loss.get(step):
                share = f"{'removes' if loss < identity else 'adds'} {abs(1 - loss / identity):.0%}"
                text += f" Leaving corrupted patches as they are gives {identity:.4f}; the network {share} of it."
            blocks.append(Paragraph(text))
        drawn = draw_pretraining(pretraining, figures.path(name))
        caption = "Restoring corrupted patches: mean absolute error, where the HU window is 0 to 1."
        blocks += figures.add(name, drawn, "pretraining loss over steps", caption)
        if pretraining.picture:
            path = figures.path(f"restored_{number + 1}" if number else "restored")
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(pretraining.picture)
            blocks += figures.add(
                path.stem, True, "a patch, corrupted and restored", "The last restoration of a validation patch."
            )
    return blocks


def _provenance(results: Results, tracker: Tracker) -> list[Block]:
    study, grid = results.study, results.grid
    cohort = count_of(results.volumes, f"{results.part} volume")
    other = "validation" if results.part == "test" else "test"
    others = max((len(trial.cases.get(other, ())) for trial in results.trials), default=0)
    finished = sum(trial.status == "finished" for trial in results.trials)
    facts = [
        f"Study `{study.name}`, MLflow experiment `{tracker.experiment}`.",
        f"Grid run `{grid.info.run_id}`, from {_day(grid.info.start_time)} to {_day(grid.info.end_time)}; "
        f"{finished} of {count_of(len(results.trials), 'cell')} finished.",
    ]
    for pretraining in results.pretraining:
        info = pretraining.run.info
        params = pretraining.run.data.params
        volumes = f"{params.get('training_volumes', '?')} and {params.get('validation_volumes', '?')}"
        facts.append(
            f"Pretraining run `{info.run_id}`, {info.status.lower()}, ended {_day(info.end_time)}; unlabelled volumes "
            f"for training and validation: {volumes}."
        )
    if "pretrained" in results.inits and not results.pretraining:
        source = (
            f"weights file `{study.finetune.weights}`" if study.finetune.weights else "no pretraining run on record"
        )
        facts.append(f"Pretrained cells: {source}.")
    splits = ", ".join(map(str, results.splits))
    facts.append(f"Labelled volumes: {splits} for training, {cohort}, {count_of(others, f'{other} volume')}.")
    if results.transfer:
        transfer = results.transfer
        lists = ", ".join(
            f"{name} {', '.join(transfer[name]) or 'none'}" for name in ("missing", "unexpected", "interpolated")
        )
        facts.append(
            f"Weight transfer into UNETR: {transfer['share']:.1%} of the encoder's parameters from "
            f"{transfer['loaded']} tensors; {lists}."
        )
    uri = tracker.uri
    remote = uri.startswith(("http:", "https:", "databricks"))
    facts.append(
        f"MLflow: the server at `{_no_password(uri)}`."
        if remote
        else f"Open MLflow: `mlflow ui --backend-store-uri {_no_password(uri)}`"
    )
    blocks: list[Block] = [Heading("Where this comes from"), Bullets(facts)]
    if results.transfer:
        blocks.append(Details("Weight transfer", json.dumps(results.transfer, indent=1)))
    if results.config:
        blocks.append(Details("Experiment (resolved)", _no_password(results.config)))
    runs = "\n".join(f"{trial.cell.name:<44} {trial.run_id or trial.status}" for trial in results.trials)
    blocks.append(Details("Run ids of the cells", runs))
    return blocks


def _day(milliseconds: int | None) -> str:
    """MLflow's time stamp in UTC, e.g. `2026-01-31 17:05 UTC`."""
    if milliseconds is None:
        return "not ended"
    return datetime.fromtimestamp(milliseconds / 1000, UTC).strftime("%Y-%m-%d %H:%M UTC")


def _no_password(text: str) -> str:
    """Without `user:password@` in URIs: the page is made to be passed on."""
    return re.sub(r"://[^/@\s]+@", "://", text)
