"""A page as a list of blocks, written once and rendered twice: as Markdown and as one self-contained HTML file.

Text may hold **bold** and `code`; everything else in it is taken literally.
"""

import base64
import html
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

_STYLE = """
:root { color-scheme: light; }
body { max-width: 1040px; margin: 2rem auto; padding: 0 1.2rem; background: #fff; color: #1b1f24;
  font: 16px/1.5 system-ui, -apple-system, "Segoe UI", "Noto Sans", sans-serif; }
h1 { font-size: 1.75rem; line-height: 1.2; margin-bottom: 1rem; }
h2 { font-size: 1.25rem; margin: 2.4rem 0 .5rem; padding-bottom: .25rem; border-bottom: 2px solid #d8dee4; }
h3 { font-size: 1.02rem; margin: 1.4rem 0 .4rem; }
p, li { max-width: 92ch; }
ul { padding-left: 1.3rem; }
ul.answer { list-style: none; margin: 1rem 0; padding: .9rem 1.2rem; background: #eef4fa;
  border-left: 5px solid #0072b2; }
ul.answer li { margin: .35rem 0; font-size: 1.05rem; }
.scroll { overflow-x: auto; margin: .7rem 0; }
table { border-collapse: collapse; font-size: .92rem; font-variant-numeric: tabular-nums; }
th, td { padding: .32rem .8rem; border-bottom: 1px solid #d8dee4; text-align: right; white-space: nowrap; }
th { background: #f4f6f8; font-weight: 600; vertical-align: bottom; white-space: normal; }
th.text, td.text { text-align: left; }
tr.rule td { border-top: 2px solid #8b949e; }
figure { margin: 1rem 0; }
figure img { display: block; max-width: 100%; height: auto; }
figcaption { color: #4b5563; font-size: .92rem; max-width: 92ch; margin-top: .3rem; }
code, pre { font: .88em/1.45 ui-monospace, "DejaVu Sans Mono", Menlo, monospace; }
code { background: #f1f3f5; padding: .05em .3em; border-radius: 3px; overflow-wrap: anywhere; }
pre { background: #f6f8fa; padding: .9rem; overflow-x: auto; }
summary { cursor: pointer; font-weight: 600; margin: .5rem 0; }
@media print { body { margin: 0; max-width: none; } figure, tr { break-inside: avoid; } }
"""


@dataclass(frozen=True)
class Heading:
    """Level 1 is the page's title."""

    text: str
    level: int = 2


@dataclass(frozen=True)
class Paragraph:
    """Running text."""

    text: str


@dataclass(frozen=True)
class Bullets:
    """A list; `answer` sets it apart as what the page is for."""

    items: Sequence[str]
    answer: bool = False


@dataclass(frozen=True)
class Table:
    """A table; the first `text_columns` columns are left-aligned, the rest are numbers."""

    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    text_columns: int = 0
    rules: frozenset[int] = frozenset()
    """Rows that start a new group."""

    def markdown(self) -> str:
        """Padded, so that it reads well as plain text."""
        cells = [[cell.replace("|", "\\|") for cell in row] for row in (self.header, *self.rows)]
        widths = [max(3, *(len(row[column]) for row in cells)) for column in range(len(self.header))]

        def line(row: Sequence[str]) -> str:
            padded = (
                cell.ljust(width) if column < self.text_columns else cell.rjust(width)
                for column, (cell, width) in enumerate(zip(row, widths, strict=True))
            )
            return f"| {' | '.join(padded)} |"

        under = [
            "-" * width if column < self.text_columns else "-" * (width - 1) + ":"
            for column, width in enumerate(widths)
        ]
        return "\n".join([line(cells[0]), f"| {' | '.join(under)} |", *(line(row) for row in cells[1:])])


@dataclass(frozen=True)
class Picture:
    """A PNG; Markdown refers to it relative to the page's folder, HTML carries it."""

    path: Path
    alt: str
    caption: str


@dataclass(frozen=True)
class Details:
    """Literal text, folded away in HTML."""

    summary: str
    text: str


Block = Heading | Paragraph | Bullets | Table | Picture | Details


def to_markdown(blocks: Sequence[Block], folder: Path) -> str:
    """The page as Markdown that stands in `folder`."""
    return "\n\n".join(_markdown(block, folder) for block in blocks) + "\n"


def to_html(blocks: Sequence[Block], title: str) -> str:
    """The page as one HTML file that needs nothing beside it: no script, no link, pictures inside."""
    body = "\n".join(_html(block) for block in blocks)
    return (
        f'<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta name="viewport" content="width=device-width, initial-scale=1">\n<title>{html.escape(title)}</title>\n'
        f"<style>{_STYLE}</style>\n</head>\n<body>\n{body}\n</body>\n</html>\n"
    )


def _markdown(block: Block, folder: Path) -> str:
    match block:
        case Heading():
            return f"{'#' * block.level} {block.text}"
        case Paragraph():
            return block.text
        case Bullets():
            return "\n".join(f"- {item}" for item in block.items)
        case Table():
            return block.markdown()
        case Picture():
            return f"![{block.alt}]({block.path.relative_to(folder).as_posix()})\n\n*{block.caption}*"
        case Details():
            return f"<details><summary>{block.summary}</summary>\n\n```\n{block.text.rstrip()}\n```\n\n</details>"


def _html(block: Block) -> str:
    match block:
        case Heading():
            return f"<h{block.level}>{_inline(block.text)}</h{block.level}>"
        case Paragraph():
            return f"<p>{_inline(block.text)}</p>"
        case Bullets():
            items = "\n".join(f"<li>{_inline(item)}</li>" for item in block.items)
            start = '<ul class="answer">' if block.answer else "<ul>"
            return f"{start}\n{items}\n</ul>"
        case Table():
            return _html_table(block)
        case Picture():
            content = base64.b64encode(block.path.read_bytes()).decode("ascii")
            return (
                f'<figure><img alt="{html.escape(block.alt)}" src="data:image/png;base64,{content}">'
                f"<figcaption>{_inline(block.caption)}</figcaption></figure>"
            )
        case Details():
            return f"<details><summary>{_inline(block.summary)}</summary><pre>{html.escape(block.text)}</pre></details>"


def _html_table(table: Table) -> str:
    def line(row: Sequence[str], tag: str, start: str = "<tr>") -> str:
        cells = (
            f'<{tag} class="{"text" if column < table.text_columns else "number"}">{_inline(cell)}</{tag}>'
            for column, cell in enumerate(row)
        )
        return f"{start}{''.join(cells)}</tr>"

    rows = "\n".join(
        line(row, "td", '<tr class="rule">' if number in table.rules else "<tr>")
        for number, row in enumerate(table.rows)
    )
    head = line(table.header, "th")
    return f'<div class="scroll"><table>\n<thead>{head}</thead>\n<tbody>\n{rows}\n</tbody>\n</table></div>'


def _inline(text: str) -> str:
    bold = re.sub(r"\*\*(.+?)\*\*", r"<strong>\1</strong>", html.escape(text))
    return re.sub(r"`(.+?)`", r"<code>\1</code>", bold)
