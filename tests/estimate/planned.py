"""The study that the tests of this folder estimate."""

from pathlib import Path
from typing import Any

from studies import small_tree, write_study


def write(folder: Path, cohort: Path, **sections: Any) -> Path:
    """`planned.yaml` in a folder: two splits, a store of its own that is empty."""
    own: dict[str, Any] = {
        "name": "planned",
        "cache": str(folder / "cache"),
        "pretrain": {"batch_size": 4, "epochs": 10, "preparation": {"spacing": 6}},
        "finetune": {
            "cohort": {"splits": {2: "labelled_2.json", 4: "labelled_4.json"}},
            "preparation": {"spacing": 6},
            "steps": 100,
            "validate_every": 30,
        },
    }
    tree = small_tree(folder, cohort, **own)
    for key, value in sections.items():
        tree[key] = tree[key] | value if isinstance(value, dict) and key in tree else value
    return write_study(folder / "planned.yaml", tree)
