"""What a page embeds, and what text from outside cannot do to it."""

import re
from pathlib import Path

import pytest
from jinja2 import DictLoader

from ssl_ray.report.page import TEMPLATES, code, fence, to_html, write_page

PNG = b"\x89PNG\r\n\x1a\n of some picture"
FIGURE = "![a figure]({})\\\n*Its caption.*\n"


def body(text: str, folder: Path) -> str:
    """The page without its head."""
    return to_html(text, folder, "title").partition("<body>")[2]


def test_only_pictures_of_its_own_folder_are_embedded(tmp_path: Path) -> None:
    """Neither another file of whoever makes the page, nor what is no PNG; the alternative text tells of them."""
    folder, outside = tmp_path / "report", tmp_path / "secret.png"
    folder.mkdir()
    for path in (outside, folder / "own.png", folder / "own_dark.png"):
        path.write_bytes(PNG)
    (folder / "key.png").write_bytes(b"a private key")
    (folder / "link.png").symlink_to(outside)
    assert body(FIGURE.format("own.png"), folder).count("data:image/png;base64,") == 2, "light and dark"
    for name in (outside, "../secret.png", "link.png", "key.png", "missing.png", ".", "data:image/png;base64,AAAA"):
        page = body(FIGURE.format(name), folder)
        assert "a figure" in page
        assert not re.search("<img|<source|data:", page), name


@pytest.mark.parametrize(
    "text",
    [
        "![x](http:&sol;&sol;evil.example&sol;p.png).nii.gz",
        "- ![x](//evil.example/p.png)",
        "# ![x](p.png)",
        "| a |\n|---|\n| ![x](http://evil.example/p.png) |",
        "![x](http://evil.example/p.png)\\\n*c*",
    ],
)
def test_a_page_loads_nothing(tmp_path: Path, text: str) -> None:
    """Where an image stands in the Markdown does not matter."""
    assert "<img" not in body(text, tmp_path)


@pytest.mark.parametrize("text", ["a", "`", "``a` ![x](y) ```", "x: |\n  ```\n\n  ![x](y)\n\n~~~\n``````"])
def test_code_and_listings_end_where_their_text_does(tmp_path: Path, text: str) -> None:
    """Backticks in the text are a part of it."""
    line, page = " ".join(text.split()), body(f"- {code(text)}.", tmp_path)
    assert f"<li>\n<p><code>{line}</code>.</p>\n</li>" in page or f"<li><code>{line}</code>.</li>" in page
    assert f"<pre><code>{text}\n</code></pre>" in body(f"# a\n\n{fence(text)}", tmp_path)


def test_a_link_in_place_of_the_page_is_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What it leads to stays as it is."""
    monkeypatch.setattr(TEMPLATES, "loader", DictLoader({"a.md.j2": "# a", "page.html.j2": "{{ body }}"}))
    (precious := tmp_path / "precious.txt").write_text("mine")
    for name in ("report.md", "report.html"):
        (tmp_path / name).symlink_to(precious)
    pages = write_page("a.md.j2", {}, tmp_path, "title")
    assert [page.is_symlink() for page in pages] == [False, False]
    assert precious.read_text() == "mine"
