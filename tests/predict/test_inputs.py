"""Which volumes files, folders and datalists stand for, and under which names."""

import json
from pathlib import Path

import pytest
from volumes import touch

from ssl_ray.data.datalist import read_datalist
from ssl_ray.errors import UserError
from ssl_ray.predict.evaluate import pairs_of
from ssl_ray.predict.inputs import cases_of


def names(*inputs: Path, channels: int = 1) -> dict[str, list[str]]:
    return {case.id: [path.name for path in case.images] for case in cases_of(inputs, channels)[0]}


def test_files_and_folders(tmp_path: Path) -> None:
    """All images below a folder, each once; label maps are left out and named."""
    touch(tmp_path, "imagesTs/a.nii.gz", "imagesTs/more/b.nii", "labelsTs/a.nii.gz", "readme.txt", "c_seg.nii.gz")
    cases, left_out = cases_of([tmp_path, tmp_path / "imagesTs" / "a.nii.gz"], 1)
    assert [case.id for case in cases] == ["a", "b"]
    assert {Path(path).name for path in left_out} == {"a.nii.gz", "c_seg.nii.gz"}


def test_the_output_is_no_input(tmp_path: Path) -> None:
    """Label maps of an earlier run below the scans are no scans; what lies in the same folder as a scan is one."""
    touch(tmp_path, "a.nii.gz", "sub/b.nii.gz", "sub/out/a.nii.gz", "sub/out/labelsTs/b.nii.gz")
    cases, left_out = cases_of([tmp_path], 1, output=tmp_path / "sub" / "out")
    assert [case.id for case in cases] == ["a", "b"]
    assert left_out == {str(tmp_path / "sub" / "out"): "the folder that the output goes to"}
    for output in (tmp_path, tmp_path / "new", tmp_path.parent):
        assert len(cases_of([tmp_path], 1, output=output)[0]) == 3


def test_further_channels_are_no_volumes(tmp_path: Path) -> None:
    """Where the model takes one; numbers of one series are its patients'."""
    touch(tmp_path, "two/p_0000.nii.gz", "two/p_0001.nii.gz", "two/q_0000.nii.gz", "two/q_0001.nii.gz")
    touch(tmp_path, "one/case_0000.nii.gz", "one/case_0001.nii.gz", "one/case_0002.nii.gz")
    cases, left_out = cases_of([tmp_path / "two"], 1)
    assert [case.id for case in cases] == ["p", "q"]
    assert {Path(path).name for path in left_out} == {"p_0001.nii.gz", "q_0001.nii.gz"}
    assert len(cases_of([tmp_path / "one"], 1)[0]) == 3
    assert names(tmp_path / "two" / "p_0001.nii.gz") == {"p_0001": ["p_0001.nii.gz"]}


def test_nnunets_names(tmp_path: Path) -> None:
    """Channels are one volume where the model takes several; the name goes without the channel."""
    touch(tmp_path, "p_1_0000.nii.gz", "p_1_0001.nii.gz", "p_2_0001.nii.gz", "p_2_0000.nii.gz")
    assert names(tmp_path, channels=2) == {
        "p_1": ["p_1_0000.nii.gz", "p_1_0001.nii.gz"],
        "p_2": ["p_2_0000.nii.gz", "p_2_0001.nii.gz"],
    }
    assert names(tmp_path / "p_1_0000.nii.gz") == {"p_1": ["p_1_0000.nii.gz"]}
    with pytest.raises(UserError, match="the model takes 3 images a volume, got 2"):
        names(tmp_path, channels=3)


def test_a_datalist_says_what_belongs_together(tmp_path: Path) -> None:
    """Its channels, and its parts; it may be of test volumes alone, which no training could be."""
    touch(tmp_path, "t1.nii.gz", "t2.nii.gz", "u1.nii.gz", "u2.nii.gz")
    pairs = {"test": [{"image": ["t1.nii.gz", "t2.nii.gz"]}], "validation": [{"image": ["u1.nii.gz", "u2.nii.gz"]}]}
    (tmp_path / "list.json").write_text(json.dumps(pairs))
    assert names(tmp_path / "list.json", channels=2).keys() == {"t1", "u1"}
    assert [case.id for case in cases_of([tmp_path / "list.json"], 2, "test")[0]] == ["t1"]
    with pytest.raises(UserError, match="the model takes 1 images a volume, got 2"):
        names(tmp_path / "list.json")


def test_equal_names_get_their_folders(tmp_path: Path) -> None:
    """So that no output overwrites another one; what would is refused."""
    touch(tmp_path, "p1/ct.nii.gz", "p2/ct.nii.gz", "p3/other.nii.gz")
    assert names(tmp_path).keys() == {"p1/ct", "p2/ct", "other"}
    touch(tmp_path, "p2/ct.nii")
    with pytest.raises(UserError, match=r"would have the output p2/ct\.nii\.gz, as .*p2/ct"):
        names(tmp_path)


def test_a_part_has_the_names_of_the_whole_list(tmp_path: Path) -> None:
    """So `evaluate` finds its label maps by the list; an image of another part counts where it is an input itself."""
    parts = {"training": ["training/p1", "training/p2"], "test": ["test/p5", "test/p6"], "validation": ["val/p7"]}
    entries = {
        part: [{"image": f"{place}/ct.nii.gz", "label": f"{place}/truth.nii.gz"} for place in places]
        for part, places in parts.items()
    }
    entries["validation"][0].pop("label")
    touch(tmp_path, *[f"{place}/ct.nii.gz" for places in parts.values() for place in places])
    listed = tmp_path / "list.json"
    listed.write_text(json.dumps(entries))
    cases, _ = cases_of([listed], 1, "test")
    assert [case.id for case in cases] == ["test/p5/ct", "test/p6/ct"]
    touch(tmp_path / "out", *[f"{case.id}.nii.gz" for case in cases])
    pairs, alone, missing = pairs_of(tmp_path / "out", listed)
    assert pairs == {case.id: (tmp_path / f"out/{case.id}.nii.gz", case.label) for case in cases}
    assert (alone, missing) == ({}, 2)
    more = cases_of([listed, tmp_path / "training/p1/ct.nii.gz"], 1, "test")[0]
    assert {case.id for case in more} == {"training/p1/ct", "test/p5/ct", "test/p6/ct"}


def test_parts_of_several_lists_are_what_any_of_them_says(tmp_path: Path) -> None:
    """Lists of folds hold out each image once: those of validation are all of them."""
    touch(tmp_path, *[f"{name}.nii.gz" for name in "abc"])
    lists = []
    for held_out in "abc":
        lists.append(tmp_path / f"{held_out}.json")
        training = [f"{name}.nii.gz" for name in "abc" if name != held_out]
        lists[-1].write_text(json.dumps({"training": training, "validation": [f"{held_out}.nii.gz"]}))
    for part in ("training", "validation"):
        assert {case.id for case in cases_of(lists, 1, part)[0]} == {*"abc"}


@pytest.mark.parametrize("label", ["../elsewhere.nii.gz", "a.nrrd", "linked/a.nii.gz"])
def test_a_label_that_nobody_needs_is_in_nobodys_way(tmp_path: Path, label: str) -> None:
    """Where a list leads out of its folder, or to another format, a scan is still one; its label is not taken."""
    root = tmp_path / "root"
    touch(root, "a.nii.gz")
    (root / "linked").symlink_to(tmp_path)
    (root / "list.json").write_text(json.dumps({"training": [{"image": "a.nii.gz", "label": label}]}))
    (case,) = cases_of([root / "list.json"], 1)[0]
    assert (case.id, case.label) == ("a", None)
    with pytest.raises(UserError, match=r"leaves the root|must end in"):
        read_datalist(root, "list.json", labelled=True)


def test_a_part_is_one_of_a_datalist(tmp_path: Path) -> None:
    """A folder has none, whatever its folders are called: it would stand for all of its scans."""
    touch(tmp_path, "training/a.nii.gz", "test/b.nii.gz")
    with pytest.raises(UserError, match=r"--part test: is a part of a datalist \(\.json\), and .* is none"):
        cases_of([tmp_path], 1, "test")


def test_what_is_no_volume_is_refused(tmp_path: Path) -> None:
    """With what was found instead."""
    touch(tmp_path, "labels/a.nii.gz", "a.dcm")
    with pytest.raises(UserError, match=r"no volume in it; .*a\.nii\.gz: a label map"):
        names(tmp_path / "labels" / "..")
    with pytest.raises(UserError, match=r"must be a folder, a \.nii or \.nii\.gz file, or a datalist"):
        names(tmp_path / "a.dcm")
    for place in ("nowhere", "nowhere.nii.gz"):
        with pytest.raises(UserError, match=rf"{place}: no such file or folder"):
            names(tmp_path / place)
    with pytest.raises(UserError, match=r"no volume in it; .*labels/a\.nii\.gz: a label map"):
        names(tmp_path / "labels")
