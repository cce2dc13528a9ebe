"""Broken and hostile experiments: refused with the file's name, or read right; no code is run."""

from pathlib import Path

import pytest
from hostile import Probe, Rows, check

ROWS = Rows("yaml", ".yaml", lines=20)

STUDY = """
name: small
pretrain:
  sources:
    - {root: a, datalist: unlabelled.json}
  preparation: {spacing: 2, hu_window: [-57, 164]}
finetune:
  cohort: {root: a, classes: 14, splits: {6: six.json}}
  preparation: {spacing: [1.5, 1.5, 2], hu_window: [-175, 250]}
"""


BOMB = "".join(f"- &x{n} [{', '.join([f'*x{n - 1}' if n else '1'] * 10)}]\n" for n in range(9))
"""Each line is ten times the one before: the last is a billion numbers."""
MERGED = "".join(f"- &x{n} {{<<: [{', '.join([f'*x{n - 1}'] * 10)}]}}\n" for n in range(1, 9))

for name, text, rule in (
    ("whole", STUDY, {}), ("empty", "", ""), ("comment", "# nothing\n", ""), ("list", "- a\n", ""), ("number", "5", ""),
    ("two documents", STUDY + "---\n" + STUDY, ""), ("tabs", "name:\n\tx: 1\n", ""), ("NULs", bytes(100), ""),
    ("no UTF-8", b"name: \xff\xfe", ""), ("UTF-16", STUDY.encode("utf-16"), ""),
    ("control character", "name: \x07", ""),
    ("BOM", b"\xef\xbb\xbf" + STUDY.encode(), {}), ("unknown alias", "name: *a\n", ""),
    ("code in a tag", "name: !!python/object/apply:os.mkdir [owned]\n", ""),
    ("module in a tag", "name: !!python/module:os\n", ""), ("own tag", "name: !x 1\n", ""),
    ("binary tag", "name: !!binary é\n", ""), ("set tag", STUDY + "seed: !!set {a, b}\n", "seed: "),
    ("omap tag", STUDY + "seed: !!omap [a]\n", ""), ("map tag", "name: !!map 5\n", ""),
    ("400 brackets", STUDY + "seed: " + "[" * 400 + "]" * 400, ""),
    ("anchors", STUDY.replace("spacing: 2", "spacing: &one 2") + "seed: *one\n", {}),
    ("aliases of aliases", f"{STUDY}seed:\n{BOMB}", "with its aliases written out"),
    ("merges of merges", f"{STUDY}seed:\n- &x0 {{a: 1}}\n{MERGED}", "with its aliases written out"),
    ("a long text again and again", f"{STUDY}seed: [&x {'a' * 10**4}{', *x' * 10**4}]\n", "written out"),
    ("a list of itself", STUDY + "seed: &x [*x]\n", "written out"),
    ("NaN", STUDY.replace("spacing: 2", "spacing: .nan"), "spacing"),
    ("-inf", STUDY.replace("-57", "-.inf"), "hu_window"),
    ("1e999", STUDY.replace("spacing: 2", "spacing: 1e999"), "spacing"),
    ("wrong types", STUDY.replace("name: small", "name: [small]"), "name: input should be a valid string"),
    ("section is text", "name: small\npretrain: yes\nfinetune: no\n", "pretrain: "),
    ("null for all", "name:\npretrain:\nfinetune:\n", "name: "),
    ("number as a key", STUDY + "5: 6\n", "5: "), ("list as a key", STUDY + "? [a]\n: 6\n", ""),
    ("text of 500,000 characters", STUDY.replace("small", "_" * 500_000), "name: "),
    ("20 MB", STUDY + "#" * 20 * 10**6, "bytes"),
):  # fmt: skip
    ROWS.add(name, text if isinstance(text, bytes) else text.encode(), rule)
ROWS.add_no_files()


@pytest.mark.parametrize("name", ROWS)
def test_hostile_experiment_is_refused_or_right(name: str, probe: Probe, tmp_path: Path) -> None:
    """At most twenty lines, each of which names the file, and exit code 2; or the study."""
    check(ROWS[name], probe, tmp_path)
