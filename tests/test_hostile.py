"""The tables of hostile input see what their rows do to the process that reads them."""

from pathlib import Path

import pytest
from hostile import Probe, Rows, check

ROWS = Rows("fault", "")
for kind in ("none", "SIGSEGV", "SIGALRM", "memory", "peak"):
    ROWS.add(kind, kind.encode(), {"error": None})


@pytest.mark.parametrize(
    ("kind", "seen"),
    [
        ("SIGSEGV", "a crash with status -11"),
        ("SIGALRM", "a hang"),
        ("memory", "MemoryError"),
        ("peak", "'megabytes': (99|10)"),
    ],
)
def test_a_row_fails_by_itself(kind: str, seen: str, probe: Probe, tmp_path: Path) -> None:
    """Crashes, hangs and bombs are their row's failure; the next row is read all the same."""
    for name in ("before", "row", "after"):
        (tmp_path / name).mkdir()
    check(ROWS["none"], probe, tmp_path / "before")
    with pytest.raises(AssertionError, match=seen):
        check(ROWS[kind], probe, tmp_path / "row")
    check(ROWS["none"], probe, tmp_path / "after")
