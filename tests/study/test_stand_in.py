"""The recipe to the number runs before its data are there: on small volumes of the names that its lists have."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from ssl_ray.cli.main import main

ROOT = Path(__file__).parents[2]
PUBLISHED = ROOT.parent / "shared" / "datalists"
BTCV = ("dataset_0.json", "dataset_0_init_6.json", "dataset_0_init_12.json")
SMALLER = {
    "network.hidden_size": 48,
    "network.mlp_dim": 64,
    "network.num_heads": 3,
    "network.feature_size": 4,
    "cluster.object_store_gigabytes": 1,
    "pretrain.batch_size": 2,
    "pretrain.steps": 2,
    "pretrain.gpu": False,
    "pretrain.compile": False,
    "pretrain.cpus_per_worker": 1,
    "finetune.grid.sizes": [6],
    "finetune.patches_per_volume": 1,
    "finetune.steps": 2,
    "finetune.validate_every": 2,
    "finetune.sliding_window_batch": 1,
    "finetune.compile": False,
    "finetune.gpus_per_trial": 0,
    "finetune.cpus_per_trial": 1,
}
"""What a test changes: the width of the network, patches a step, the number of steps, and what needs a GPU."""


def stand_in(*lists: Path, folder: Path) -> None:
    """What docs/monai.md says to do."""
    script = ROOT / "experiments" / "stand_in.py"
    subprocess.run([sys.executable, str(script), *map(str, lists), str(folder)], check=True)


@pytest.mark.slow
@pytest.mark.skipif(not PUBLISHED.is_dir(), reason="the published datalists are not at hand")
def test_the_recipe_runs_on_volumes_of_the_published_names(
    ray_cluster: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Two steps of a pretraining and of both arms on 6 labelled volumes, from preparation to the report."""
    (published,) = (PUBLISHED / "tcia").glob("*.json")
    tree = json.loads(published.read_text())
    short = tmp_path / published.name
    short.write_text(json.dumps(tree | {"training": tree["training"][:6], "validation": tree["validation"][:2]}))
    stand_in(short, folder=tmp_path / "tcia")
    stand_in(*(PUBLISHED / "btcv" / name for name in BTCV), folder=tmp_path / "btcv")
    places = {"pretrain.sources.0.root": tmp_path / "tcia", "finetune.cohort.root": tmp_path / "btcv"}
    changes = [f"--set={key}={value}" for key, value in ({"output": tmp_path / "output"} | places | SMALLER).items()]
    assert main(["run", str(ROOT / "experiments" / "tcia_btcv.yaml"), *changes]) == 0
    said = capsys.readouterr().out
    assert "prepared 20 of 20 volumes" in said
    assert "2 cells trained now" in said
    assert "these two networks differ by" in said, "one run is no verdict"
    assert (tmp_path / "output" / "tcia_btcv" / "report.html").is_file()
