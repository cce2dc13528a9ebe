"""`ssl-ray check`: facts, pictures and one page, of what a run would train on."""

import base64
import json
import re
import shutil
from pathlib import Path

import matplotlib.image
import pytest
from studies import small_tree, write_study

from ssl_ray.cli.main import main
from ssl_ray.config.schema import PhantomCohort
from ssl_ray.phantom.cohort import write_cohort


@pytest.fixture
def experiment(cohort: Path, tmp_path: Path) -> Path:
    tree = small_tree(tmp_path, cohort, finetune={"cohort": {"splits": {4: "labelled_4.json"}}})
    return write_study(tmp_path / "small.yaml", tree)


def test_the_page_shows_every_part_and_json_has_the_facts(
    experiment: Path, cohort: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The numbers of the lists, a picture a part that is more than one grey, and nothing that leads out of the page."""
    assert main(["check", str(experiment), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    listed = json.loads((cohort / "labelled_4.json").read_text()) | {
        f"free {part}": entries for part, entries in json.loads((cohort / "unlabelled.json").read_text()).items()
    }
    numbers = {part: facts["volumes"] for part, facts in found["parts"].items()}
    assert numbers == {
        "unlabelled training": len(listed["free training"]),
        "unlabelled validation": len(listed["free validation"]),
        "labelled training": len(listed["training"]),
        "labelled validation": len(listed["validation"]),
        "labelled test": len(listed["test"]),
    }
    least, middle, most = found["organs"]["liver"]["ml"]
    assert 500 < least <= middle <= most < 3000, "a liver"
    folder = Path(found["page"]).parent
    assert folder == experiment.parent / "output" / "small" / "check"
    pictures = {path.stem: matplotlib.image.imread(path) for path in folder.glob("*.png")}
    assert set(pictures) == {part.replace(" ", "_") for part in numbers}
    assert all(picture[..., :3].std() > 0.05 for picture in pictures.values())
    assert any(
        (picture[..., :3].max(axis=2) - picture[..., :3].min(axis=2)).max() > 0.5 for picture in pictures.values()
    )
    page = Path(found["page"]).read_text()
    embedded = [base64.b64decode(text) for text in re.findall(r"data:image/png;base64,([^\"]+)", page)]
    assert embedded == [(folder / f"{part.replace(' ', '_')}.png").read_bytes() for part in numbers]
    assert "<script" not in page
    assert json.loads((folder / "check.json").read_text()) == found


def test_what_a_run_would_refuse_is_told_with_its_file(
    experiment: Path, cohort: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Exit code 2, while the others are looked at; what is no CT leaves its part without a picture."""
    bad = tmp_path / "bad"
    bad.mkdir()
    (bad / "page.nii.gz").write_bytes(b"<html>404</html>")
    (bad / "other.nii.gz").write_bytes(b"")
    entries = {"training": ["page.nii.gz"], "validation": ["other.nii.gz"]}
    (bad / "unlabelled.json").write_text(json.dumps(entries))
    place = f'pretrain.sources=[{{root: "{bad}", datalist: unlabelled.json}}]'
    assert main(["check", str(experiment), "--set", place]) == 2
    printed = capsys.readouterr().out
    assert f"REFUSED: {bad / 'page.nii.gz'}" in printed
    assert "a web page" in printed
    page = (tmp_path / "output" / "small" / "check" / "check.html").read_text()
    assert str(bad / "other.nii.gz") in page
    assert page.count("<figure>") == 3
    assert main(["check", str(experiment), "--set", place, "--set", "on_bad_volume=skip"]) == 0, "a run goes on without"


def test_labels_beyond_the_classes_are_told(
    experiment: Path, cohort: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Where the list does not name them: too few classes are what is looked for, and have neither name nor picture."""
    root = shutil.copytree(cohort, tmp_path / "nameless", ignore=shutil.ignore_patterns("store"))
    listed = json.loads((root / "labelled_4.json").read_text())
    (root / "labelled_4.json").write_text(json.dumps({key: listed[key] for key in listed if key != "labels"}))
    given = f"finetune.cohort={{root: {root}, classes: 2, splits: {{4: labelled_4.json}}}}"
    assert main(["check", str(experiment), "--set", given]) == 2
    printed = capsys.readouterr()
    assert "REFUSED" in printed.out, printed.err
    folder = experiment.parent / "output" / "small" / "check"
    assert {path.stem for path in folder.glob("*.png")} == {"unlabelled_training", "unlabelled_validation"}


def test_only_so_many_volumes_are_read(experiment: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Of each part, evenly along its list, and the page says so; a warning is not part of the JSON."""
    more = ["--set", "finetune.cohort.classes=15"]
    assert main(["check", str(experiment), "--volumes", "2", "--json", *more]) == 0
    printed = capsys.readouterr()
    assert "does any volume have a 14?" in printed.err
    parts = json.loads(printed.out)["parts"]
    assert {part: found["read"] for part, found in parts.items()} == {
        part: min(2, found["volumes"]) for part, found in parts.items()
    }


def test_every_channel_is_shown(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A patch has a row for each of two channels, and the page says whose values it tells."""
    numbers = {"unlabelled": 3, "labelled": 1, "validation": 1, "test": 1, "splits": (1,), "seed": 3}
    write_cohort(PhantomCohort(root=str(tmp_path), **numbers, modality="MRI"))
    stage = {"preparation": {"spacing": 9, "normalise": "percentile", "channels": 2}}
    splits = {"cohort": {"splits": {1: "labelled_1.json"}}}
    tree = small_tree(tmp_path, tmp_path, pretrain=stage, finetune=stage | splits)
    assert main(["check", str(write_study(tmp_path / "mri.yaml", tree))]) == 0
    assert "Of several channels, values and what is clipped are the first one's." in capsys.readouterr().out
    (folder,) = tmp_path.glob("output/small/check")
    high, wide = matplotlib.image.imread(folder / "unlabelled_training.png").shape[:2]
    assert high > wide, "two states of two channels; of one they are wider than high"
