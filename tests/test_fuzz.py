"""Damaged input, without end: what `fuzz.py` does for hours, for a second."""

import json
import os
import random
import subprocess
import sys
from functools import cache
from pathlib import Path

import fuzz
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st


@cache
def corpus(target: str) -> list[bytes]:
    return fuzz.seeds(target)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("fuzz")
    fuzz.furnish(folder)
    return folder


@pytest.mark.parametrize("target", fuzz.TARGETS)
@given(number=st.integers(0, 99), rng=st.randoms(use_true_random=False))
@settings(max_examples=150)
def test_damaged_input_is_refused_or_keeps_the_invariants(
    target: str, folder: Path, number: int, rng: random.Random
) -> None:
    """Flips, truncations, insertions and splices of a valid file: one line that names it, or a sound result."""
    contents = corpus(target)
    fuzz.TARGETS[target](fuzz.mutate(contents[number % len(contents)], rng, contents), folder)


@pytest.mark.parametrize("target", fuzz.TARGETS)
def test_undamaged_input_is_accepted(target: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first input that damage starts from is whole, or the tests above would show nothing."""
    refusals: list[ValueError] = []
    monkeypatch.setattr(fuzz, "refused", lambda error, *_, **__: refusals.append(error))
    fuzz.TARGETS[target](corpus(target)[-1 if target == "weights" else 0], folder)
    assert [str(error) for error in refusals if "a.pt" not in str(error)] == []


def test_the_fuzzer_counts_and_ends(tmp_path: Path) -> None:
    """`fuzz.py` ends after its runs with one JSON object and finds nothing in a few seconds."""
    script = Path(__file__).with_name("fuzz.py")
    command = [sys.executable, str(script), "datalist", "--runs", "300", "--seconds", "60"]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"TMPDIR": str(tmp_path)})
    counts = json.loads(done.stdout.splitlines()[-1])
    assert (done.returncode, counts["executions"], counts["ok"]) == (0, 300, True), counts
    assert not list(tmp_path.iterdir())
