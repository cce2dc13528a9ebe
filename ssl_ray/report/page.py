"""The report in Markdown becomes one HTML file that needs nothing beside it: no script, no link, pictures inside."""

import base64
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined, select_autoescape
from markdown_it import MarkdownIt
from markdown_it.token import Token
from markupsafe import Markup

from ssl_ray.storage.files import write_file


def templates(package: str) -> Environment:
    """The templates in a package's folder `templates`."""
    return Environment(
        loader=PackageLoader(package),
        autoescape=select_autoescape(["html.j2"]),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )


TEMPLATES = templates("ssl_ray.report")

# Only what the report uses. Neither HTML nor links: an organ's name or an error message cannot reach out of the page.
_MARKDOWN = MarkdownIt("zero", {"html": False}).enable(
    ["heading", "list", "table", "fence", "emphasis", "backticks", "escape", "image", "newline"]
)


def literal(text: str) -> str:
    """Markdown that shows a text from outside, such as an organ's name or an error, as it is, on one line."""
    # An underscore between letters, as in kidney_left, means nothing to Markdown and stays readable.
    return re.sub(r"([\\`*\[\]<]|(?<![^\W_])_|_(?![^\W_]))", r"\\\1", " ".join(text.split()))


def code(text: str) -> str:
    """Markdown that shows a text from outside, such as a command, as code on one line."""
    line = " ".join(text.split())
    blank = " " if "`" in line else ""  # two of them are not shown, and keep a backtick at either end apart
    return f"{_longer(line, 1)}{blank}{line}{blank}{_longer(line, 1)}"


def fence(text: str) -> str:
    """Markdown that shows a text from outside as a listing, which no line of the text ends."""
    return f"{_longer(text, 3)}\n{text.strip()}\n{_longer(text, 3)}"


def _longer(text: str, least: int) -> str:
    """More backticks than follow each other anywhere in the text."""
    return "`" * max([least, *(len(run) + 1 for run in re.findall("`+", text))])


def to_html(text: str, folder: Path, title: str, refresh: int | None = None) -> str:
    """The page of a report in Markdown, whose pictures, all PNG, are relative to `folder`.

    Of any other image its alternative text is shown: a file from elsewhere on this machine would leave it with the
    page, and one from the internet would tell its server who looks. A browser loads the page again every so many
    seconds if `refresh` says so.
    """
    tokens = _MARKDOWN.parse(text)
    _embed_pictures(tokens, folder)
    _drop_images(tokens)
    _fold_listings(tokens)
    body = _MARKDOWN.renderer.render(tokens, _MARKDOWN.options, {})
    return TEMPLATES.get_template("page.html.j2").render(title=title, body=Markup(body), refresh=refresh)


def write_page(template: str, values: Mapping[str, Any], folder: Path, title: str) -> tuple[Path, Path]:
    """Write what a template gives as `report.md`, and as `report.html`, into the folder -> both."""
    text = TEMPLATES.get_template(template).render(values)
    markdown, html = folder / "report.md", folder / "report.html"
    write_file(markdown, text.encode())
    write_file(html, to_html(text, folder, title).encode())
    return markdown, html


def _embed_pictures(tokens: list[Token], folder: Path) -> None:
    """Make a paragraph that is a picture, a line break and an emphasised caption a figure that holds the PNG itself.

    Where the picture has a twin for dark pages, named `<name>_dark.png`, it holds both.
    """
    for before, token, after in zip(tokens, tokens[1:], tokens[2:], strict=False):
        children = token.children or []
        if [one.type for one in children[:3]] != ["image", "hardbreak", "em_open"]:
            continue
        image, _, *caption = children
        name = str(image.attrs["src"])
        if embedded := _embedded(folder, name):
            image.attrs["src"] = embedded
            image.meta["embedded"] = True
            picture = [image]
            if dark := _embedded(folder, re.sub(r"(\.\w+)$", r"_dark\1", name)):
                attributes: dict[str, str | int | float] = {"srcset": dark}
                source = Token("source", "source", 0, attrs=attributes | {"media": "(prefers-color-scheme: dark)"})
                picture = [Token("picture_open", "picture", 1), source, image, Token("picture_close", "picture", -1)]
            before.tag = after.tag = "figure"
            caption[0].tag = caption[-1].tag = "figcaption"
            token.children = [*picture, *caption]


def _embedded(folder: Path, name: str) -> str | None:
    """A PNG in the folder as a URI that holds it; None for any other file, and where there is none."""
    path = (folder / name).resolve()
    if not path.is_relative_to(folder.resolve()) or not path.is_file():
        return None
    content = path.read_bytes()
    png = content.startswith(b"\x89PNG\r\n\x1a\n")
    return f"data:image/png;base64,{base64.b64encode(content).decode('ascii')}" if png else None


def _drop_images(tokens: list[Token]) -> None:
    """Put its alternative text in the place of every image that is not embedded."""
    for token in tokens:
        for place, one in enumerate(children := token.children or []):
            if one.type == "image" and not one.meta.get("embedded"):
                children[place] = Token("text", "", 0, content=one.content)


def _fold_listings(tokens: list[Token]) -> None:
    """Fold every listing away under the heading above it."""
    for place in reversed([number for number, token in enumerate(tokens) if token.type == "fence"]):
        tokens[place - 3].tag = tokens[place - 1].tag = "summary"
        tokens.insert(place + 1, Token("details_close", "details", -1, block=True))
        tokens.insert(place - 3, Token("details_open", "details", 1, block=True))
