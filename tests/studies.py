"""Small studies for the tests: one builder, of which each test says what is its own."""

import copy
import functools
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from ssl_ray.config.schema import Study

PREPARATION: dict[str, Any] = {"spacing": 9, "hu_window": [-175, 250]}
_TREE: dict[str, Any] = {
    "name": "small",
    "network": {"hidden_size": 48, "mlp_dim": 64, "num_heads": 3, "feature_size": 4},
    "cluster": {"object_store_gigabytes": 0.3},
    "pretrain": {
        "sources": [{"root": "nowhere", "datalist": "unlabelled.json"}],
        "preparation": PREPARATION,
        "patch_size": 16,
        "task": {"corruption": {"inpaint_size": [2, 6], "outpaint_size": [4, 10], "shuffle_size": 3}},
        "precision": "float32",
    },
    "finetune": {
        "cohort": {"root": "nowhere", "classes": 14, "splits": {2: "labelled_2.json"}},
        "preparation": PREPARATION,
        "patch_size": 16,
        "precision": "float32",
    },
}


def small_tree(folder: Path | None = None, cohort: Path | None = None, **sections: Any) -> dict[str, Any]:
    """A study as its YAML has it: patches of 16³, a network of width 48, float32.

    Args:
        folder: gets `output` and MLflow's database; left at their defaults if None.
        cohort: root of the datalists; the store lies in its `store`.
        sections: what is different, merged into the sections key by key; other values replace what is there.
    """
    tree = copy.deepcopy(_TREE)
    if folder is not None:
        tree |= {"output": str(folder / "output"), "tracking": {"uri": f"sqlite:///{folder / 'mlflow.db'}"}}
    if cohort is not None:
        tree["cache"] = str(cohort / "store")
        tree["pretrain"]["sources"][0]["root"] = tree["finetune"]["cohort"]["root"] = str(cohort)
    return _merged(tree, sections)


def small_study(folder: Path | None = None, cohort: Path | None = None, **sections: Any) -> Study:
    """The same, validated."""
    return Study.model_validate(small_tree(folder, cohort, **sections))


def write_study(path: Path, tree: Mapping[str, Any]) -> Path:
    """Write a tree as YAML, making its folder, and return the path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(yaml.safe_dump(dict(tree)))
    return path


def place_database(path: Path) -> None:
    """Put MLflow's SQLite with its tables, and nothing in them, where a study will look for it, if none is there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if not path.exists():
        shutil.copyfile(empty_database(), path)


@functools.cache
def empty_database() -> Path:
    """MLflow's tables take it seconds of the processor: once a test process is enough."""
    from ssl_ray.tracking.client import Client

    path = Path(tempfile.mkdtemp()) / "mlflow.db"
    Client(f"sqlite:///{path}").search_experiments()
    return path


def _merged(tree: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(tree)
    for key, value in changes.items():
        before = merged.get(key)
        # The splits of a cohort are replaced: more of them would be more cells. So is a section that says its kind.
        nested = isinstance(before, dict) and isinstance(value, Mapping) and key != "splits"
        nested = nested and not {"kind", "normalise"} & value.keys()
        merged[key] = _merged(before, value) if nested else value
    return merged
