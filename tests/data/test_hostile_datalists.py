"""Broken and hostile datalists: refused in one line, or read right; no path leads out of the root."""

import json
import os
from pathlib import Path
from typing import Any

import pytest
from hostile import Build, Probe, Rows, check

ROWS = Rows("datalist", ".json", "UserError", times=50)  # a list of empty lists takes 25 times its text
NAN = float("nan")


def listing(text: str | bytes | dict[str, Any]) -> Build:
    """A datalist beside the volumes v1, v2, v3 and what leads nowhere."""

    def build(path: Path) -> bytes:
        root = path.parent
        for name in ("v1.nii", "v2.nii", "v3.nii", "../out.nii"):
            (root / name).touch()
        (root / "dir.nii").mkdir()
        os.mkfifo(root / "fifo.nii")
        (root / "link.nii").symlink_to("v1.nii")
        (root / "loop.nii").symlink_to("loop.nii")
        (root / "escape.nii").symlink_to("../out.nii")
        (root / "outside").symlink_to("..")
        (root / "zero.nii").symlink_to("/dev/zero")
        content = json.dumps(text) if isinstance(text, dict) else text
        return content.encode() if isinstance(content, str) else content

    return build


def entries(*listed: Any, **more: Any) -> Build:
    return listing({"training": list(listed), **more})


for name, path_, rule in (
    ("absolute path", "/etc/passwd.nii", "leaves the root"), ("..", "../out.nii", "leaves the root"),
    (".. in the middle", "a/../../out.nii", "leaves the root"), ("link out of the root", "escape.nii", "leaves"),
    ("folder that is a link out", "outside/out.nii", "leaves"), ("link to itself", "loop.nii", "no such file"),
    ("FIFO", "fifo.nii", "no such file"), ("folder", "dir.nii", "no such file"), ("device", "zero.nii", "leaves"),
    ("missing file", "v9.nii", "no such file"), ("other ending", "v1.mha", "must end in .nii"),
    ("empty path", "", "must end in"), ("NUL", "a\0.nii", "control"), ("line break", "a\nb.nii", "control"),
    ("half a character", "\ud800.nii", "invalid JSON"), ("path of 1 MB", "x" * 10**6 + ".nii", "no such file"),
    ("path of 100,000 folders", "x/" * 10**5 + "v.nii", "no such file"),
    ("number", 5, "must be a path"), ("null", None, "must be a path"), ("list", ["v1.nii"], "must be a path"),
    ("true", True, "must be a path"), ("NaN", NAN, "must be a path"),
    ("no image", {"label": "v1.nii"}, "image: this key is required"),
    ("number among channels", {"image": ["v1.nii", 5]}, "image.1: input should be a valid string"),
    ("image is deep", {"image": json.loads("[" * 180 + "]" * 180)}, "image.0: input should be a valid string"),
):  # fmt: skip
    ROWS.add(f"entry is a {name}", entries("v2.nii", path_), rule)
ROWS.add("volume twice", entries("v1.nii", "v2.nii", "./v1.nii"), "listed twice")
ROWS.add("volume twice through a link", entries("v1.nii", "link.nii"), "listed twice")
ROWS.add("volume in two sections", entries("v1.nii", validation=["v1.nii"]), "validation.0: ")
ROWS.add("whole", entries("v1.nii", {"image": "v2.nii"}, validation=["v3.nii"]), {"cases": 3})
for name, section in {"object": {}, "null": None, "text": "v1.nii", "number": 1e999}.items():
    ROWS.add(f"section is {name}", entries("v1.nii", validation=section), "validation: input should be a valid array")
for name, text, rule in (
    ("list", "[]", "input should be an object"), ("number", "5", "be an object"), ("null", "null", "an object"),
    ("empty object", "{}", "training: this key is required"), ("100,000 brackets", "[" * 10**5, "invalid JSON"),
    ("100,000 objects", '{"a":' * 10**5, "invalid JSON"), ("trailing garbage", '{"training": ["v1.nii"]} x', "JSON"),
    ("cut", '{"training": ["v1.n', "invalid JSON"), ("Python", "{'training': []}", "invalid JSON"),
    ("integer of 100,000 digits", '{"numTraining": ' + "9" * 10**5 + "}", "invalid JSON"),
    ("entry of 5,000 digits", '{"training": [' + "9" * 5000 + "]}", "invalid JSON"),
    ("UTF-16", '{"training": ["v1.nii"]}'.encode("utf-16"), "invalid JSON"), ("no UTF-8", b'{"\xff": 1}', "JSON"),
    ("BOM", b'\xef\xbb\xbf{"training": ["v1.nii"]}', "invalid JSON"), ("NULs", bytes(1000), "invalid JSON"),
    ("NaN beside the list", '{"training": ["v1.nii"], "numTraining": NaN}', {"cases": 1}),
    ("labels are a list", '{"training": ["v1.nii"], "labels": ["a"]}', "labels: input should be an object"),
    ("labels are text with a line break", '{"training": ["v1.nii"], "labels": "a\\nb"}', "labels: input should be"),
    ("labels are turned round twice", '{"training": ["v1.nii"], "labels": {"liver": 1, "x": 1}}', "labels.liver: "),
    ("label value is infinite", '{"training": ["v1.nii"], "labels": {"1e999": "x"}}', "labels.1e999: "),
    ("label value of 5,000 digits", '{"training": ["v1.nii"], "labels": {"' + "9" * 5000 + '": "x"}}', "labels.999"),
    ("label value is negative", '{"training": ["v1.nii"], "labels": {"-1": "x"}}', "labels.-1: "),
):  # fmt: skip
    ROWS.add(f"{name} as the list", listing(text), rule)
for depth in range(900, 1000, 7):
    text = '{"training": [' + "[" * depth + "]" * depth + "]}"
    ROWS.add(f"entry {depth} deep", listing(text), "")
    text = '{"training": ["v1.nii"], "labels": ' + "[" * depth + "]" * depth + "}"
    ROWS.add(f"labels {depth} deep", listing(text), "")


def many(entry: str, count: int = 10**7) -> Build:
    return lambda path: f'{{"training": [{",".join([entry] * count)}]}}'.encode()


for entry in ("0", '"v.nii"', "{}", "[]", '""'):
    ROWS.add(f"10,000,000 times {entry}", many(entry), "bytes are more than")
    rule = "at most 250000 items" if entry in ('"v.nii"', '""') else "training.0"
    ROWS.add(f"1,000,000 times {entry}", many(entry, 10**6), rule)
ROWS.add("100,000 labels", entries("v1.nii", labels={f"a{value}": 1 for value in range(10**5)}), "at most 256")
ROWS.add("90,000 brackets in an entry", many("[" * 90 + "]" * 90, 10**3), "must be a path")
ROWS.add("100,000 times one file", entries(*["v1.nii"] * 10**5), "listed twice")
ROWS.add_no_files()


@pytest.mark.parametrize("name", ROWS)
def test_hostile_datalist_is_refused_or_right(name: str, probe: Probe, tmp_path: Path) -> None:
    """One line that names file and rule, or cases that exist below the root."""
    check(ROWS[name], probe, tmp_path)
