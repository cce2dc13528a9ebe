"""What one machine pushes, another one pulls; a local output needs neither."""

from pathlib import Path

import pytest
from test_storage import server, uri  # noqa: F401  (fixtures)

from ssl_ray.storage.mirror import Mirror


@pytest.fixture
def machines(uri: str, tmp_path: Path) -> tuple[Mirror, Mirror]:  # noqa: F811
    """Two machines that know the same object store."""
    return Mirror.of(uri, tmp_path / "first"), Mirror.of(uri, tmp_path / "second")


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def test_what_is_pushed_is_pulled(machines: tuple[Mirror, Mirror]) -> None:
    """Files and folders become what was kept last; what is not kept goes."""
    first, second = machines
    for text in ("old", "newer"):
        write(first.folder / "best.bin", text)
        write(first.folder / "steps" / "10" / "state", text)
        first.push(first.folder / "best.bin")
        first.push(first.folder / "steps" / "10")
        write(second.folder / "steps" / "20" / "state", "never pushed")
        for name in ("best.bin", "steps"):
            assert second.kept(second.folder / name).list()
            assert second.pull(second.folder / name)
        assert (second.folder / "best.bin").read_text() == text
        assert (second.folder / "steps" / "10" / "state").read_text() == text
        assert not (second.folder / "steps" / "20" / "state").exists()
        assert second.names(second.folder / "steps") == {"10"}


def test_what_is_dropped_or_moved_is_gone(machines: tuple[Mirror, Mirror]) -> None:
    """Also for the other machine, whose own copy goes when it pulls."""
    first, second = machines
    for name in ("a/one", "b/two"):
        write(first.folder / name, name)
        first.push(first.folder / name)
        second.pull(second.folder / name)
    first.drop(first.folder / "a" / "one")
    assert first.move(first.folder / "b", first.folder / "c")
    assert (first.folder / "c" / "two").read_text() == "b/two"
    assert not second.pull(second.folder / "a" / "one")
    assert not second.pull(second.folder / "b")
    assert not (second.folder / "a" / "one").exists()
    assert second.pull(second.folder / "c")
    assert (second.folder / "c" / "two").read_text() == "b/two"
    assert not first.move(first.folder / "none", first.folder / "c")


def test_a_local_output_is_its_own_mirror(tmp_path: Path) -> None:
    """Nothing is copied and nothing is lost."""
    mirror = Mirror.of(tmp_path / "output")
    assert mirror.folder == tmp_path / "output"
    assert not mirror.pull(mirror.folder / "file")
    assert mirror.names(mirror.folder) == set()
    write(mirror.folder / "file", "text")
    mirror.push(mirror.folder / "file")
    assert mirror.pull(mirror.folder / "file")
    assert mirror.names(mirror.folder) == {"file"}
    assert mirror.move(mirror.folder / "file", mirror.folder / "other") is True
    mirror.drop(mirror.folder / "other")
    assert not mirror.kept(mirror.folder / "other").list()
