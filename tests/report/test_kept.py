"""The study on real CT whose MLflow store is kept in this repository gives what the documentation says of it."""

import re
from pathlib import Path

import pytest
from store import restore

from ssl_ray.cli.main import main

ROOT = Path(__file__).parents[2]
RUNS = 3


@pytest.mark.slow
def test_the_kept_store_gives_the_table_that_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """`ssl-ray report` on it makes the page, and every row and every sentence of its answer is in evidence.md."""
    restore(ROOT / "experiments" / "results" / "real_ct.tar.xz", tmp_path)
    runs = f"finetune.runs={RUNS}", f"pretrain.pretrainings={RUNS}"
    command = ["report", str(ROOT / "experiments" / "real_ct.yaml")]
    for setting in (f"output={tmp_path}", "finetune.grid.sizes=[6]", *runs):
        command += ["--set", setting]
    assert main(command) == 0
    printed, told = capsys.readouterr().out, (ROOT / "docs" / "evidence.md").read_text()

    def plain(text: str) -> str:
        return re.sub(r"[\s*-]+", " ", text)

    rows = [line for line in printed.splitlines() if line.startswith(("| Dice", "| surface", "| missed", "| HD95"))]
    answer = [line for line in printed.splitlines() if line.startswith("- ")]
    assert len(rows) == 4
    assert answer
    for line in (*rows, *answer):
        assert plain(line) in plain(told), line
    figures = {path.name for path in (tmp_path / "real_ct" / "figures").glob("*.png")}
    assert {"label_efficiency.png", "organ_map.png", "examples_random.png", "examples_pretrained.png"} <= figures
