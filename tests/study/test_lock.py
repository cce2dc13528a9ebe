"""One process at a time works on a study, and another one can ask which."""

import errno
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from ssl_ray.errors import UserError
from ssl_ray.storage.folders import Folders
from ssl_ray.study.lock import holder, only_one


def test_the_second_on_a_study_is_refused_with_the_name_of_the_first(tmp_path: Path) -> None:
    """Another study in the same folder is not kept waiting; the lock ends with the work."""
    folders, others = Folders.of("a", str(tmp_path)), Folders.of("b", str(tmp_path))
    refused = pytest.raises(UserError, match=f"another process works on this study: .*process {os.getpid()}")
    with only_one(folders), only_one(others), refused, only_one(folders):
        pass
    with only_one(folders):
        pass


def test_a_file_system_without_locks_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As a Lustre that was mounted without them: work goes on, and whoever asks is told of nobody."""

    def refuse(*_: object) -> None:
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr("fcntl.flock", refuse)
    folders = Folders.of("a", str(tmp_path))
    with only_one(folders):
        assert holder(folders) is None
    out = capsys.readouterr()
    assert f"WARNING: {tmp_path / '.a.lock'}: cannot be locked here (Function not implemented)" in out.out + out.err


def test_whoever_asks_is_told_and_does_not_disturb(tmp_path: Path) -> None:
    """Host, number and beginning of the process; nothing after it was killed, although its file is still there."""
    folders, before = Folders.of("a", str(tmp_path)), time.time()
    assert holder(folders) is None
    code = (
        "import time\nfrom ssl_ray.storage.folders import Folders\nfrom ssl_ray.study.lock import only_one\n"
        f"with only_one(Folders.of('a', {str(tmp_path)!r})):\n    print('there', flush=True)\n    time.sleep(100)"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, env=os.environ) as process:
        try:
            assert process.stdout
            assert process.stdout.readline() == b"there\n"
            found = holder(folders)
            assert found
            assert found[0].endswith(f"process {process.pid}")
            assert before - 2 < found[1] < time.time() + 2
            assert holder(folders) == found
        finally:
            process.kill()
    assert holder(folders) is None
    assert (tmp_path / ".a.lock").read_text(), "a killed process leaves its name"
    with only_one(folders):
        assert holder(folders)


def test_a_link_in_place_of_the_lock_leads_nowhere(tmp_path: Path) -> None:
    """In an output that several people write to, it could lead to a file of whoever runs the study."""
    folders, precious = Folders.of("a", str(tmp_path)), tmp_path / "precious.txt"
    precious.write_text("mine")
    (tmp_path / ".a.lock").symlink_to(precious)
    with pytest.raises(UserError, match=r"\.a\.lock: Too many levels of symbolic links"), only_one(folders):
        pass
    with pytest.raises(OSError, match=r"symbolic links: .*\.a\.lock"):
        holder(folders)
    assert precious.read_text() == "mine"
