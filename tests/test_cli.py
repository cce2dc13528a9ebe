"""Commands as a user types them, short of training."""

import errno
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from studies import small_tree, write_study

from ssl_ray.cli import studies
from ssl_ray.cli.main import main
from ssl_ray.console import Bar, say
from ssl_ray.errors import UserError

COMMANDS = ["run", "plan", "prepare", "pretrain", "finetune", "report", "check", "status", "clean", "ui"]
COMMANDS += ["phantom", "datalist", "new", "predict", "evaluate", "embed", "export"]


@pytest.mark.parametrize("command", COMMANDS)
def test_help_of_every_command(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    """`--help` explains itself with an example and ends with code 0."""
    assert main([command, "--help"]) == 0
    text = capsys.readouterr().out
    assert f"Usage: ssl-ray {command}" in text
    assert f"Example: ssl-ray {command}" in text


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["fly"],
        ["run"],
        ["run", "x.yaml", "--set"],
        ["plan", "x.yaml", "--gpu", "abacus"],
        ["phantom", "x", "--volumes", "0"],
        ["phantom", "x", "--splits", "0"],
        ["phantom", "x", "--seed", "-1"],
        ["new", "x", "--seed", "9223372036854775808"],
        ["datalist", "x", "--validation", "2"],
        ["predict", "x", "y"],
        ["predict", "x", "y", "-o", "z", "--overlap", "1"],
        ["evaluate", "x"],
        ["new", "x", "--test", "1.5"],
        ["clean", "x.yaml", "--keep", "some"],
    ],
)
def test_a_wrong_command_line_ends_in_code_2(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    """Help where there is no command, otherwise what is wrong, and the code of what a user can mend."""
    assert main(arguments) == 2
    printed = capsys.readouterr()
    assert "Usage: ssl-ray" in printed.out or "Error" in printed.err


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (UserError("a.yaml: wrong"), 2, "ssl-ray: a.yaml: wrong\n"),
        (FileNotFoundError(2, "No such file or directory", "a.nii"), 1, "No such file or directory: 'a.nii'"),
        (PermissionError(13, "Permission denied", "out"), 1, "PermissionError: [Errno 13] Permission denied: 'out'"),
        (ValueError("ours"), 1, "ssl-ray: ValueError: ours"),
        (OSError("no s3://me:secret@bucket/x?token=secret"), 1, "OSError: no s3://bucket/x?token=***\n"),
        (UserError("cache: s3://me:secret@bucket: gone"), 2, "ssl-ray: cache: s3://bucket: gone\n"),
        (RuntimeError("ours"), 1, "SSL_RAY_TRACEBACK=1 shows the way"),
        (KeyboardInterrupt(), 1, "interrupted; what is finished is kept, and the same command goes on"),
    ],
)
def test_an_error_is_a_message_and_a_code(
    error: BaseException, code: int, message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """2 for what the user can mend, 1 for the rest; a traceback only where it is asked for."""

    def fail(*_: object) -> None:
        raise error

    monkeypatch.setattr(studies, "load", fail)
    monkeypatch.delenv("SSL_RAY_TRACEBACK", raising=False)
    assert main(["run", "a.yaml"]) == code
    printed = capsys.readouterr().err
    assert message in printed
    assert "Traceback" not in printed
    assert (f"raised at {__file__}:" in printed) == (isinstance(error, Exception) and code == 1)
    monkeypatch.setenv("SSL_RAY_TRACEBACK", "1")
    assert main(["run", "a.yaml"]) == code
    shown = capsys.readouterr().err
    assert ("Traceback" in shown) == isinstance(error, Exception)
    assert "secret" not in printed + shown


@pytest.mark.parametrize("command", [["phantom", "--splits", "1"], ["datalist"], ["prepare"]])
def test_a_folder_that_cannot_be_used_is_the_users_to_mend(
    command: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A file where the folder's parent should be: code 2 and the name, for every folder that a command writes to."""
    (tmp_path / "file").touch()
    folder = tmp_path / "file" / "deep"
    arguments = [str(folder)]
    if command == ["prepare"]:
        tree = small_tree(tmp_path) | {"output": str(folder)}
        arguments = [str(write_study(tmp_path / "a.yaml", tree))]
    assert main([command[0], *arguments, *command[1:]]) == 2
    assert str(tmp_path / "file") in capsys.readouterr().err


@pytest.mark.parametrize(("name", "code"), [("out", 2), (None, 1)])
def test_a_full_disk_is_told_by_its_file_or_as_what_it_is(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    name: str | None,
    code: int,
) -> None:
    """A write of Python names no file, from which folder it is not known."""

    def fail(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", name)

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("ssl_ray.phantom.cohort.write_cohort", fail)
    assert main(["phantom", "."]) == code
    printed = capsys.readouterr().err
    assert "No space left on device" in printed
    assert "None" not in printed


def test_what_is_said_stays_as_it_is(capsys: pytest.CaptureFixture[str]) -> None:
    """Nothing in the name of a file or a cell is a code of the terminal library's, in a bar or in a line."""
    text = "/data/scan:x:1.nii.gz [red]cell[/blue] 10.0.0.1:on:5"
    say(text)
    with Bar(text, 1) as bar:
        bar.update(1, text)
    assert capsys.readouterr().out.count(text) == 3


def test_libraries_log_no_password(tmp_path: Path) -> None:
    """Whatever a library writes into its log."""
    code = (
        "import logging, sys\nfrom ssl_ray.cli.main import main\nmain(['run', 'none.yaml'])\n"
        "logging.getLogger('urllib3').warning('retry %s', 'http://me:secret@server')"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert "WARNING urllib3: retry http://server" in done.stderr


@pytest.mark.parametrize(
    ("words", "completions"),
    [
        ("ssl-ray p", ["plan", "prepare", "pretrain", "predict", "phantom"]),
        ("ssl-ray plan study.yaml --gpu h2", ["h200"]),
        ("ssl-ray run study.yaml --fr", ["--fresh"]),
        ("ssl-ray run stud", []),
    ],
)
def test_the_shell_completes(tmp_path: Path, words: str, completions: list[str]) -> None:
    """Commands, options and the names of GPUs; where nothing is given, bash and zsh complete files themselves."""
    asked = {"_SSL_RAY_COMPLETE": "complete_bash", "COMP_WORDS": words, "COMP_CWORD": str(words.count(" "))}
    done = subprocess.run(
        [sys.executable, "-m", "ssl_ray"],
        cwd=tmp_path,
        env={**os.environ, **asked},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.stdout.split() == completions, done.stderr


def test_a_typo_is_told_without_loading_torch_or_ray(tmp_path: Path) -> None:
    """A mistake in the YAML must not wait for seconds of imports: the module works without them."""
    (tmp_path / "study.yaml").write_text("name: x\npretrian: {}\n")
    code = (
        "import sys\nfrom ssl_ray.cli.main import main\ncode = main(['run', 'study.yaml'])\n"
        "assert not {'torch', 'ray', 'mlflow'} & set(sys.modules), 'imported too early'\nsys.exit(code)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2, done.stderr
    assert "study.yaml: pretrian: unknown key; did you mean 'pretrain'?" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.slow
def test_the_driver_loads_no_monai_and_nothing_large_before_ray_starts() -> None:
    """MONAI takes seconds; only workers need it, once their data comes, and the driver where it checks a transfer."""
    code = (
        "import sys, ssl_ray.study.runner\n"
        "large = {'torch', 'mlflow', 'matplotlib', 'ray.train', 'ray.data'}\n"
        "assert not large & set(sys.modules), 'imported too early'\n"
        "import ssl_ray.study.stages, ssl_ray.pretrain.begin\nassert 'monai' not in sys.modules, 'imported too early'"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(("quiet", "lines"), [([], 1), (["--quiet"], 0)])
def test_quiet_leaves_results_and_no_progress(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], quiet: list[str], lines: int
) -> None:
    """The command's last line is the same; a bar, or its line in a log, is only there without `--quiet`."""
    numbers = ["--volumes", "3", "--labelled", "1", "--validation", "1", "--test", "1", "--splits", "1"]
    assert main(["phantom", str(tmp_path), *numbers, *quiet]) == 0
    printed = capsys.readouterr().out.splitlines()
    assert printed[-1].endswith("unlabelled.json, labelled_1.json")
    assert sum("synthesizing volumes" in line for line in printed) == lines


def test_phantom_then_datalist(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A cohort is written with its lists; lists for the same folder can be written again."""
    arguments = ["phantom", str(tmp_path), "--volumes", "3", "--labelled", "2", "--validation", "1", "--test", "1"]
    assert main([*arguments, "--splits", "1,2"]) == 0
    assert json.loads((tmp_path / "labelled_1.json").read_text())["labels"]["6"] == "liver"
    assert main([*arguments, "--splits", "1,2"]) == 0
    assert main([*arguments, "--splits", "2"]) == 2
    assert "holds the cohort" in capsys.readouterr().err
    assert main(["datalist", str(tmp_path), "--splits", "1", "--validation", "0.3"]) == 2
    assert "there already with other content" in capsys.readouterr().err
    for path in tmp_path.glob("*led*.json"):
        path.unlink()
    assert main(["datalist", str(tmp_path), "--splits", "1", "--validation", "0.3"]) == 0
    assert "labelled_1.json: 1 training" in capsys.readouterr().out


def test_a_report_on_what_was_never_begun_leaves_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A folder made for it would look like a study."""
    path = write_study(tmp_path / "study.yaml", small_tree(tmp_path))
    before = sorted(tmp_path.rglob("*"))
    assert main(["report", str(path)]) == 2
    assert "run the study first" in capsys.readouterr().err
    assert sorted(tmp_path.rglob("*")) == before
