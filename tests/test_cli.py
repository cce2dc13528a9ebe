"""Commands as a user types them, short of training."""

import json
import subprocess
import sys

import pytest

from ssl_ray.cli import main


@pytest.mark.parametrize("command", ["run", "prepare", "pretrain", "finetune", "report", "phantom", "datalist"])
def test_help_of_every_command(command, capsys):
    """`--help` explains itself and ends with code 0."""
    with pytest.raises(SystemExit) as ended:
        main([command, "--help"])
    assert ended.value.code == 0
    assert f"usage: ssl-ray {command}" in capsys.readouterr().out


@pytest.mark.parametrize(
    "arguments", [[], ["fly"], ["run"], ["phantom", "x", "--volumes", "0"], ["datalist", "x", "--validation", "2"]]
)
def test_a_wrong_command_line_ends_in_code_2(arguments, capsys):
    """argparse's message, and the code of what a user can mend."""
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    assert ended.value.code == 2
    assert "usage: ssl-ray" in capsys.readouterr().err


def test_a_typo_is_told_without_loading_torch_or_ray(tmp_path):
    """A mistake in the YAML must not wait for seconds of imports: the module works without them."""
    (tmp_path / "study.yaml").write_text("name: x\npretrian: {}\n")
    code = (
        "import sys\nfrom ssl_ray.cli import main\ncode = main(['run', 'study.yaml'])\n"
        "assert not {'torch', 'ray', 'mlflow'} & set(sys.modules), 'imported too early'\nsys.exit(code)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2, done.stderr
    assert "study.yaml: pretrian: unknown key; did you mean 'pretrain'?" in done.stderr
    assert "Traceback" not in done.stderr


def test_the_driver_trains_nothing_and_loads_no_monai():
    """Its import takes seconds; only workers need it, and the driver where it checks a transfer."""
    code = "import sys, ssl_ray.study.runner\nassert 'monai' not in sys.modules, 'imported too early'"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


def test_phantom_then_datalist(tmp_path, capsys):
    """A cohort is written with its lists; lists for the same folder can be written anew."""
    arguments = ["phantom", str(tmp_path), "--volumes", "3", "--labelled", "2", "--validation", "1", "--test", "1"]
    assert main([*arguments, "--splits", "1", "2"]) == 0
    assert json.loads((tmp_path / "labelled_1.json").read_text())["labels"]["6"] == "liver"
    assert main([*arguments, "--splits", "1", "2"]) == 0
    assert main([*arguments, "--splits", "2"]) == 2
    assert "holds the cohort" in capsys.readouterr().err
    assert main(["datalist", str(tmp_path), "--splits", "1", "--validation", "0.3"]) == 2
    assert "a list with other content is there already" in capsys.readouterr().err
    for path in tmp_path.glob("*led*.json"):
        path.unlink()
    assert main(["datalist", str(tmp_path), "--splits", "1", "--validation", "0.3"]) == 0
    assert "labelled_1.json: 1 training" in capsys.readouterr().out
