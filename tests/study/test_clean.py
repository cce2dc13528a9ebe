"""`ssl-ray clean`: what a result or an unfinished training needs is never removed, and every byte is accounted for."""

import io
import json
from pathlib import Path

import pytest
from journals import begin, begin_cells, delivered, train, write
from studies import small_tree, write_study

from ssl_ray.cli.main import main
from ssl_ray.config.schema import Search
from ssl_ray.evaluate.scores import DICE_FOREGROUND
from ssl_ray.search.cells import STOPPED
from ssl_ray.study.clean import inventory
from ssl_ray.study.experiment import load
from ssl_ray.study.lock import only_one
from ssl_ray.study.parts import folders_of

SPACE = {"finetune.optimizer.lr": {"loguniform": (1e-4, 1e-2)}}


@pytest.fixture
def experiment(tmp_path: Path) -> Path:
    """A study with a finished and an unfinished pretraining, four cells that ended in four ways, and Ray's files."""
    path = write_study(tmp_path / "small.yaml", small_tree(tmp_path, finetune={"runs": 2}))
    study = load(path)
    folders = folders_of(study)
    begin(folders, "pretraining", "done").close()
    train(begin(folders, "pretraining", "open"), 5, 1.0)
    for key in ("done", "open"):
        for name in ("best.safetensors", "records.jsonl", "checkpoints/00000005/state.pt"):
            write(folders.study / f"pretrain-{key}" / name, 1000)
        write(folders.study / "ray" / f"pretrain-{key}" / "log", 10)
    ends = ["FINISHED", "FINISHED", "FAILED", None]
    for end, (name, key) in zip(ends, begin_cells(study, folders).items(), strict=True):
        trial = begin(folders, "trial", key, name, size=2, init="random")
        cell = folders.study / "finetune-trials" / f"{name}-{key[:8]}"
        for file in ("checkpoints/00000005/state.pt", "faults/step_1.safetensors"):
            write(cell / file, 500)
        if end:
            trial.metrics({f"selected/validation/{DICE_FOREGROUND}": 0.5 + int(key[:8]) / 10}, 5)
            trial.close(end)
            delivered(trial)
        if end == "FINISHED":
            write(cell / "model.safetensors", 300)
            write(cell / "evaluation.json", 30)
    write(tmp_path / "output" / "cache" / "00" / "volume" / "image.npy", 77)
    write(tmp_path / "output" / "small-until-20260101-000000" / "report.md", 7)
    return path


def removable(path: Path, keep: str = "all") -> set[str]:
    study = load(path)
    folders = folders_of(study)
    items = inventory(study, folders, keep)  # type: ignore[arg-type]
    return {item.path.relative_to(folders.study).as_posix() for item in items if not item.needed}


def cells_of(path: Path) -> list[str]:
    return sorted(cell.name for cell in (folders_of(load(path)).study / "finetune-trials").iterdir())


def test_only_what_is_over_can_go(experiment: Path) -> None:
    """States of what has finished; all of what failed, is open, or has lost its weights stays."""
    first, second, *_ = sorted(cells_of(experiment), key=lambda name: name[-8:])
    states = {f"finetune-trials/{cell}/{part}" for cell in (first, second) for part in ("checkpoints", "faults")}
    assert removable(experiment) == states | {"pretrain-done/checkpoints"}
    assert removable(experiment, "best") - removable(experiment) == {f"finetune-trials/{first}/model.safetensors"}
    (folders_of(load(experiment)).study / "pretrain-done" / "best.safetensors").unlink()
    assert removable(experiment) == states


def test_the_best_of_a_search_is_by_its_own_metric(experiment: Path) -> None:
    """The first cell is the worse one by Dice, and the better one by distance."""
    study = load(experiment)
    folders = folders_of(study)
    first, second, *_ = sorted(cells_of(experiment), key=lambda name: name[-8:])
    for number, (name, key) in enumerate(begin_cells(study, folders).items()):
        trial = begin(folders, "trial", key, name, size=2, init="random")
        if number < 2:
            trial.metrics({"selected/validation/original_hd95": 5.0 + number}, 5)
            trial.close("FINISHED")
            delivered(trial)
    searched = study.model_copy(update={"search": Search(metric="original_hd95", space=SPACE)})
    for of, worse in ((study, first), (searched, second)):
        gone = {item.path.parent.name for item in inventory(of, folders, "best") if item.path.suffix == ".safetensors"}
        assert gone == {worse}


def test_weights_that_mlflow_has_not_got_stay(experiment: Path) -> None:
    """The journal of a cell may refer to them."""
    journals = folders_of(load(experiment)).study / "journal"
    for state in journals.glob("*/trial-*/state.json"):
        state.unlink()
    assert removable(experiment, "best") == removable(experiment)


def test_without_journals_nothing_is_known_to_be_over(experiment: Path, tmp_path: Path) -> None:
    """They may lie on another machine."""
    (folders_of(load(experiment)).study / "journal").rename(tmp_path / "journal")
    assert removable(experiment, "best") == set()


def test_what_is_all_over_loses_rays_files_and_what_a_search_stopped_its_states(tmp_path: Path) -> None:
    path = write_study(tmp_path / "small.yaml", small_tree(tmp_path))
    folders = folders_of(load(path))
    trial = begin(folders, "trial", "00000000cell", "n02")
    trial.tags({STOPPED: "at step 3"})
    trial.close("KILLED")
    begin(folders, "search", "s").close()
    for name in ("ray/finetune-s/log", "ray/finetune-other/log", "finetune-trials/n02-00000000/checkpoints/3/state.pt"):
        write(folders.study / name, 1)
    assert removable(path) == {"ray/finetune-s", "finetune-trials/n02-00000000/checkpoints"}


def test_every_byte_is_accounted_for(experiment: Path, tmp_path: Path) -> None:
    """Those of the study's folder once, and beside them the store, MLflow's and an old study, which all stay."""
    study = load(experiment)
    folders = folders_of(study)
    items = inventory(study, folders)
    own = [item for item in items if item.path.is_relative_to(folders.study)]
    assert sum(item.bytes for item in own) == sum(p.stat().st_size for p in folders.study.rglob("*") if p.is_file())
    beside = {item.path.name: (item.bytes, item.needed) for item in items if item not in own}
    assert beside == {"cache": (77, True), "small-until-20260101-000000": (7, True)}


def test_nothing_is_removed_unasked_and_what_can_go_is_removed_with_yes(
    experiment: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Without a terminal the answer is no; `--yes` removes exactly what a dry run lists."""
    folder = folders_of(load(experiment)).study
    before = {path for path in folder.rglob("*") if path.is_file()}
    for arguments in (["--dry-run"], [], ["--json"]):
        assert main(["clean", str(experiment), *arguments]) == 0
        assert {path for path in folder.rglob("*") if path.is_file()} == before
    listed = {folder / name for name in removable(experiment)}
    capsys.readouterr()
    assert main(["clean", str(experiment), "--yes", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["removed_bytes"] == 1000 + 2 * (500 + 500)
    left = {path for path in folder.rglob("*") if path.is_file()}
    assert before - left == {path for path in before if any(path.is_relative_to(one) for one in listed)}
    assert removable(experiment) == set()


class Terminal(io.StringIO):
    """A person's, with what they type; at its end they press Ctrl-D."""

    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize(("typed", "code"), [("n\n", 0), ("y\n", 0), ("", 1)])
def test_it_asks_where_something_can_go(
    experiment: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], typed: str, code: int
) -> None:
    """Only yes removes; who leaves at the question has not found a fault of the program's."""
    before = removable(experiment)
    monkeypatch.setattr("sys.stdin", Terminal(typed))
    assert main(["clean", str(experiment)]) == code
    printed = capsys.readouterr()
    assert "remove what can go?" in printed.out
    assert "raised at" not in printed.err
    assert ("interrupted" in printed.err) == bool(code)
    assert removable(experiment) == (set() if typed == "y\n" else before)
    if typed == "y\n":
        assert main(["clean", str(experiment)]) == 0
        assert "remove what can go?" not in capsys.readouterr().out


def test_a_study_that_runs_is_not_cleaned(experiment: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """It is refused with who works on it; looking is allowed."""
    with only_one(folders_of(load(experiment))):
        assert main(["clean", str(experiment), "--yes"]) == 2
        assert "another process works on this study" in capsys.readouterr().err
        assert main(["clean", str(experiment), "--dry-run"]) == 0
    assert removable(experiment)
