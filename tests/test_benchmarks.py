"""The quicker benchmarks work, on tiny sizes; what they find is not judged here."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parent.parent


@pytest.mark.parametrize("command", ["prepare", "feed", "finetune", "gpu --parts correct,ddp,unetr"])
def test_a_quick_run_ends_with_its_figures(command: str, tmp_path: Path) -> None:
    """`--quick` ends with code 0, and its last line is JSON with ratios, floors and ok."""
    name, *options = command.split()
    options += ["--out", str(tmp_path)] if name == "gpu" else []
    done = subprocess.run(
        [sys.executable, f"experiments/benchmarks/{name}.py", "--quick", *options],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT), "RAY_ADDRESS": ""},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    result = json.loads(done.stdout.splitlines()[-1])
    assert result["ratios"]
    assert result["floors"]
    assert isinstance(result["ok"], bool)
