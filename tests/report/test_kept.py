"""The studies on real CT whose MLflow stores are kept in this repository give what the documentation says of them."""

import re
from pathlib import Path

import pytest
from store import restore

from ssl_ray.cli.main import main
from ssl_ray.tracking.client import Client

ROOT = Path(__file__).parents[2]
SLOW = {
    "name": "real_ct_tokens_slow",
    "tracking.experiment": "real_ct_tokens",
    "pretrain.optimizer.lr": "4e-4",
}
"""A slower pretraining, compared with the same random weights."""

CNN = {"name": "real_ct_cnn", "network": "{kind: dynunet, filters: [16, 32, 64, 128]}"}
"""Another network, without pretraining."""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("file", "runs", "sizes", "inits", "more"),
    [
        ("real_ct", 5, [6], ["random", "pretrained"], {}),
        ("real_ct", 3, [6], ["random", "pretrained", "permuted"], {}),
        (
            "real_ct",
            3,
            [6],
            ["random", "pretrained", "permuted"],
            {"name": "real_ct_frozen", "finetune.encoder.freeze": "all"},
        ),
        ("real_ct_control12", 3, [12], ["random", "pretrained", "permuted"], {}),
        ("real_ct", 3, [6], ["random"], CNN),
        ("real_ct_cnn12", 3, [12], ["random"], CNN),
        ("real_ct", 3, [24], ["random"], CNN),
        ("real_ct_h200", 3, [6, 12, 24], ["random", "pretrained"], {}),
        ("real_ct_tokens", 3, [6], ["random", "pretrained", "permuted"], {}),
        ("real_ct_tokens", 3, [6], ["random", "pretrained"], {"finetune.grid.lr": "[2e-3, 4e-3]"}),
        ("real_ct_tokens_slow", 3, [6, 12, 24], ["random", "pretrained", "permuted"], SLOW),
    ],
)
def test_the_kept_store_gives_the_table_that_is_told(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    file: str,
    runs: int,
    sizes: list[int],
    inits: list[str],
    more: dict[str, str],
) -> None:
    """`ssl-ray report` on it makes the page, and every row and every sentence of its answer is in evidence.md."""
    restore(ROOT / "experiments" / "results" / f"{file}.tar.xz", tmp_path)
    asked = f"finetune.runs={runs}", f"pretrain.pretrainings={runs}"
    asked += (
        f"finetune.grid.sizes={sizes}",
        f"finetune.grid.init={inits}",
        *(f"{key}={value}" for key, value in more.items()),
    )
    experiment = re.sub("_(h200|slow|cnn12|control12)$", "", file)
    command = ["report", str(ROOT / "experiments" / f"{experiment}.yaml")]
    for setting in (f"output={tmp_path}", *asked):
        command += ["--set", setting]
    assert main(command) == 0
    printed, told = capsys.readouterr().out, (ROOT / "docs" / "evidence.md").read_text()

    def plain(text: str) -> str:
        return re.sub(r"[\s*-]+", " ", text)

    rows = [line for line in printed.splitlines() if line.startswith(("| Dice", "| surface", "| missed", "| HD95"))]
    answer = [line for line in printed.splitlines() if line.startswith("- ")]
    assert len(rows) == 4 * len(sizes)
    assert len(answer) == len(sizes) + (len(sizes) > 1), "of several questions one is the primary one"
    for line in (*rows, *answer):
        assert plain(line) in plain(told), line
    drawn = {f"examples_{init}.png" for init in inits if init != "permuted"}
    drawn |= {"organ_map.png"} if "pretrained" in inits else set()  # it shows differences
    figures = {path.name for path in (tmp_path / more.get("name", experiment) / "figures").glob("*.png")}
    assert {"label_efficiency.png", *drawn} <= figures


PARTS = {
    "position embeddings": "real_ct_positions",
    "patch embedding": "real_ct_patch",
    "blocks and last norm": "real_ct_blocks",
    "all but position embeddings": "real_ct_others",
}
"""What was shuffled pretrained weights, and the study in which it was."""


@pytest.mark.slow
def test_the_kept_store_has_the_scores_of_shuffled_parts(tmp_path: Path) -> None:
    """Each row of evidence.md's table has the three runs of its study, in their order, and their mean."""
    restore(ROOT / "experiments" / "results" / "real_ct.tar.xz", tmp_path)
    client, told = Client(f"sqlite:///{tmp_path / 'mlflow.db'}"), (ROOT / "docs" / "evidence.md").read_text()
    for part, study in PARTS.items():
        experiment = client.get_experiment_by_name(study)
        assert experiment is not None
        trials = client.find(experiment.experiment_id, kind="trial")
        trials.sort(key=lambda run: run.data.tags["ssl_ray.run"])
        found = [run.data.metrics["selected/test/original_dice_foreground"] for run in trials]
        row = " | ".join(f"{value:.3f}" for value in (*found, sum(found) / len(found)))
        assert re.search(rf"^\| {part} \| [\d,]+ \| {re.escape(row)} \|$", told, re.MULTILINE), (part, row)
