"""Datalists: the published ones are read as they are, wrong ones are refused."""

import itertools
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from volumes import touch

from ssl_ray.config.schema import LabelledCohort, Source
from ssl_ray.data.consistency import check_lists
from ssl_ray.data.datalist import Case, read_datalist, read_unlabelled, stem
from ssl_ray.data.splits import Splits, read_labelled
from ssl_ray.errors import UserError

PUBLISHED = Path(__file__).parents[3] / "shared" / "datalists"
BTCV = {6: "dataset_0_init_6.json", 12: "dataset_0_init_12.json", 24: "dataset_0.json"}
ORGANS = {"0": "background", "1": "spleen", "2": "liver"}

needs_published = pytest.mark.skipif(not PUBLISHED.is_dir(), reason="the published datalists are not at hand")


def stand_ins(root: Path, datalist: Path, sections: Sequence[str] = ("training", "validation")) -> None:
    tree = json.loads(datalist.read_text())
    for entry in itertools.chain.from_iterable(tree[section] for section in sections):
        touch(root, *([entry] if isinstance(entry, str) else entry.values()))


def pair(number: int | str) -> dict[str, str]:
    return {"image": f"images/v{number}.nii.gz", "label": f"labels/v{number}.nii.gz"}


def write(root: Path, name: str = "list.json", **tree: Any) -> Path:
    (root / name).write_text(json.dumps(tree))
    return root / name


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A folder with ten image and label files, v1 to v10."""
    folder = tmp_path / "root"
    touch(folder, *[path for number in range(1, 11) for path in pair(number).values()])
    return folder


def refusal(root: Path, *, labelled: bool = True, name: str = "list.json") -> str:
    with pytest.raises(ValueError, match=r"\S") as caught:
        read_datalist(root, name, labelled=labelled)
    assert str(caught.value).startswith(f"{root / name}: ")
    return str(caught.value)


@needs_published
def test_published_btcv_lists_are_read_unchanged(tmp_path: Path) -> None:
    """BTCV's lists give the recipe's splits, its 13 organs, and no test volume, as their labels are not public."""
    stand_ins(tmp_path, PUBLISHED / "btcv" / BTCV[24])
    splits = {size: str(PUBLISHED / "btcv" / name) for size, name in BTCV.items()}
    cohort = LabelledCohort(root=str(tmp_path), classes=14, splits=splits)
    read = read_labelled(cohort, (6, 12, 24))
    numbers = {6: [*range(1, 7)], 12: [*range(1, 11), 21, 22], 24: [*range(1, 11), *range(21, 35)]}
    assert {size: [case.id for case in cases] for size, cases in read.training.items()} == {
        size: [f"img{number:04d}" for number in listed] for size, listed in numbers.items()
    }
    assert [case.id for case in read.validation] == [f"img{number:04d}" for number in range(35, 41)]
    assert read.test == ()
    assert read.organs[:4] == ("spleen", "rkid", "lkid", "gall")
    assert len(read.organs) == 13
    assert len(read.cases) == 30
    for case in read.cases:
        assert case.label == tmp_path / "labelsTr" / f"{case.id.replace('img', 'label')}.nii.gz"


@needs_published
def test_ids_and_ranges_select_the_published_splits(tmp_path: Path) -> None:
    """One list and ids give the same splits as three lists."""
    stand_ins(tmp_path, PUBLISHED / "btcv" / BTCV[24])
    by_lists = {size: str(PUBLISHED / "btcv" / name) for size, name in BTCV.items()}
    by_ids = {
        6: ("img0001..img0006",),
        12: ("img0001..img0010", "img0021", "img0022"),
        24: ("img0001..img0010", "img0021..img0034"),
    }
    expected = read_labelled(LabelledCohort(root=str(tmp_path), classes=14, splits=by_lists), (6, 12, 24))
    cohort = LabelledCohort(root=str(tmp_path), classes=14, splits=by_ids, datalist=by_lists[24])
    assert read_labelled(cohort, (6, 12, 24)) == expected


@needs_published
def test_published_tcia_list_is_read_unchanged(tmp_path: Path) -> None:
    """TCIA's list gives 600 training and 171 validation volumes without labels, each under its own id."""
    datalist = PUBLISHED / "tcia" / "dataset_split.json"
    stand_ins(tmp_path, datalist)
    training, validation = read_unlabelled([Source(root=str(tmp_path), datalist=str(datalist))])
    assert (len(training), len(validation)) == (600, 171)
    assert len({case.id for case in (*training, *validation)}) == 771
    assert all(case.label is None for case in (*training, *validation))
    assert training[0] == Case("volume-covid19-A-0656", tmp_path / "data" / "volume-covid19-A-0656.nii.gz")


def test_entries_may_be_paths_or_mappings(root: Path) -> None:
    """A path alone is an image; both forms may stand in one list; labels are left out where none are wanted."""
    write(root, training=["images/v1.nii.gz", pair(2)], validation=["./images/../images/v3.nii.gz"])
    listed = read_datalist(root, "list.json", labelled=False)
    assert listed.training == (Case("v1", root / "images/v1.nii.gz"), Case("v2", root / "images/v2.nii.gz"))
    assert listed.validation == (Case("v3", root / "images/v3.nii.gz"),)


def test_test_entries_without_label_are_left_out(root: Path) -> None:
    """Of the test volumes only those with a label count, and the others need not be there."""
    write(root, training=[pair(1)], validation=[pair(2)], test=["elsewhere.nii.gz", pair(3), {"image": "no.nii.gz"}])
    assert [case.id for case in read_datalist(root, "list.json", labelled=True).test] == ["v3"]


def test_labels_name_the_organs(root: Path) -> None:
    """Organs are named by value; a value without a name is called by its number."""
    write(root, training=[pair(1)], validation=[pair(2)], labels={"2": "liver", "0": "background"})
    cohort = LabelledCohort(root=str(root), classes=4, splits={1: "list.json"})
    assert read_labelled(cohort, [1]).organs == ("label 1", "liver", "label 3")


@pytest.mark.parametrize(
    ("names", "ids"),
    [
        (("a/v.nii.gz", "b/w.nii.gz"), ("v", "w")),
        (("a/v.nii.gz", "b/v.nii.gz", "c/w.nii"), ("a/v.nii.gz", "b/v.nii.gz", "w")),
        (("a/v.nii.gz", "a/v.nii"), ("a/v.nii.gz", "a/v.nii")),
        (("a/v.nii.gz", "a/v.nii", "b/v.nii"), ("a/v.nii.gz", "a/v.nii", "b/v.nii")),
    ],
)
def test_ids_are_unique(tmp_path: Path, names: Sequence[str], ids: Sequence[str]) -> None:
    """A file name is the id where it is the only one of its name, otherwise the path below the root is."""
    touch(tmp_path, *names)
    write(tmp_path, training=list(names))
    assert tuple(case.id for case in read_datalist(tmp_path, "list.json", labelled=False).training) == tuple(ids)


def test_volumes_of_one_name_in_different_splits_are_different_cases(root: Path) -> None:
    """Two splits may each have a volume `v`, from different folders; both are prepared."""
    touch(root, "a/v.nii.gz", "b/v.nii.gz", "labels/a.nii.gz", "labels/b.nii.gz")
    for name in "ab":
        entry = {"image": f"{name}/v.nii.gz", "label": f"labels/{name}.nii.gz"}
        extra = [pair(1)] if name == "b" else []
        write(root, f"{name}.json", training=[entry, *extra], validation=[pair(9)])
    splits = read_labelled(LabelledCohort(root=str(root), classes=3, splits={1: "a.json", 2: "b.json"}), (1, 2))
    assert {case.image.relative_to(root).as_posix() for case in splits.cases} == {
        "a/v.nii.gz", "b/v.nii.gz", "images/v1.nii.gz", "images/v9.nii.gz",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("tree", "rule"),
    [
        ({"training": [pair(1), pair(77)]}, "no such file: {root}/images/v77.nii.gz"),
        ({"training": [{"image": "images/v1.nii.gz", "label": "no.nii.gz"}]}, "no such file: {root}/no.nii.gz"),
        ({"training": [{"image": "images/v1.nii.gz", "label": "labels"}]}, "0.label: 'labels' must end in .nii"),
        ({"training": [{"image": "dir.nii", "label": "dir.nii"}]}, "no such file: {root}/dir.nii"),
        ({"training": [{"image": "x" * 5000 + ".nii", "label": "dir.nii"}]}, "no such file: "),
        ({"training": [pair(1), pair(2), pair(1)]}, "training.2: {root}/images/v1.nii.gz is listed twice, first in "),
        ({"training": [pair(1), {**pair(1), "image": "images/./v1.nii.gz"}]}, "is listed twice"),
        ({"training": [pair(1), {**pair(1), "image": "link.nii.gz"}]}, "link.nii.gz is listed twice"),
        ({"training": [pair(1)], "validation": [pair(1)]}, "listed twice, first in {root}/list.json: training.0"),
        ({"training": [pair(1)], "validation": [{**pair(2), "image": "link.nii.gz"}]}, "validation.0: {root}/link"),
        ({"training": [pair(1)], "test": [pair(1)]}, "test.0: {root}/images/v1.nii.gz is listed twice"),
        ({"training": [{**pair(1), "image": "../out.nii.gz"}]}, "0.image: ../out.nii.gz leaves the root {root}"),
        ({"training": [{**pair(1), "label": "a/../../out.nii.gz"}]}, "training.0.label: a/../../out.nii.gz leaves"),
        ({"training": [{**pair(1), "image": "{out}"}]}, "training.0.image: {out} leaves the root"),
        ({"training": [pair(1), {**pair(1), "image": "escape.nii.gz"}]}, "training.1.image: escape.nii.gz leaves"),
        ({"training": [{**pair(1), "image": "outside/out.nii.gz"}]}, "outside/out.nii.gz leaves the root"),
        ({"training": [{**pair(1), "image": "loop.nii.gz"}]}, "no such file: {root}/loop.nii.gz"),
        ({"training": [{**pair(1), "image": "a.mha"}]}, "training.0.image: 'a.mha' must end in .nii or .nii.gz"),
        ({"training": []}, "training: list should have at least 1 item"),
        ({"validation": [pair(1)]}, "training: this key is required; got ['validation']"),
        ({"training": [pair(1), "images/v2.nii.gz"]}, "training.1: needs a 'label', got only images/v2.nii.gz"),
        ({"training": [pair(1)], "validation": [{"image": "images/v2.nii.gz"}]}, "validation.0: needs a 'label'"),
        ({"training": {"image": "a"}}, "training: input should be a valid array, got {{'image': 'a'}}"),
        ({"training": None}, "training: input should be a valid array, got None"),
        ({"training": [pair(1)], "validation": "images/v2.nii.gz"}, "validation: input should be a valid array"),
        ({"training": [pair(1), 5]}, "training.1: must be a path or {{image, label}}, got 5"),
        ({"training": [[pair(1)]]}, "training.0: must be a path or {{image, label}}"),
        ({"training": [{"label": "labels/v1.nii.gz"}]}, "training.0.image: this key is required; got ['label']"),
        ({"training": [{**pair(1), "image": ""}]}, "training.0.image: '' must end in .nii or .nii.gz"),
        ({"training": [""]}, "training.0: needs a 'label', got only "),
        ({"training": [{**pair(1), "image": "a\0.nii"}]}, "0.image: 'a\\x00.nii' must end in .nii"),
        ({"training": [{**pair(1), "image": "\ud800.nii"}]}, "invalid JSON: "),
        ({"training": [{**pair(1), "image": {"path": 1}}]}, "0.image: input should be a valid "),
        ({"training": [{**pair(1), "label": None}]}, "training.0: needs a 'label'"),
        ({"training": [pair(1)], "labels": ["background"]}, "labels: input should be an object, got ['background']"),
        ({"train": [pair(1)]}, "training: this key is required; did you mean 'train'?"),
        ({"training": [pair(1)], "labels": {"spleen": 1, "liver": 1}}, "labels.spleen: input should be a valid integ"),
        ({"training": [pair(1)], "labels": {"spleen": "one"}}, "labels.spleen: input should be a valid integer"),
        ({"training": [pair(1)], "labels": None}, "labels: input should be an object, got None"),
    ],
)  # fmt: skip
def test_a_wrong_list_is_refused(root: Path, tree: dict[str, Any], rule: str) -> None:
    """Every mistake in a list is refused with the list, the entry, the rule and the value."""
    out = root.parent / "out.nii.gz"
    out.touch()
    (root / "dir.nii").mkdir()
    (root / "link.nii.gz").symlink_to("images/v1.nii.gz")
    (root / "escape.nii.gz").symlink_to(out)
    (root / "outside").symlink_to(root.parent)
    (root / "loop.nii.gz").symlink_to("loop.nii.gz")
    (root / "list.json").write_text(json.dumps(tree).replace("{out}", str(out)))
    assert rule.format(root=root, out=out) in refusal(root)


def test_names_may_be_in_nnunets_order(root: Path) -> None:
    """Its second version has {"spleen": 1} where the Decathlon has {"1": "spleen"}."""
    for labels in ({"0": "background", "1": "spleen"}, {"background": 0, "spleen": 1}):
        (root / "list.json").write_text(json.dumps({"training": [pair(1)], "labels": labels}))
        assert read_datalist(root, "list.json", labelled=True).labels == {0: "background", 1: "spleen"}


@pytest.mark.parametrize("labels", [{"1": "liver", "2": "ignore"}, {"background": 0, "liver": 1, "ignore": 2}])
def test_voxels_to_ignore_are_not_trained_on(root: Path, labels: dict[str, Any]) -> None:
    """As an organ they would be learned, and scored; for a trained model the list is good."""
    (root / "list.json").write_text(json.dumps({"training": [pair(1)], "labels": labels}))
    assert "voxels to ignore are nothing to train on" in refusal(root)
    assert read_datalist(root, "list.json", labelled=None).labels[2] == "ignore"


def test_one_label_map_of_two_images_is_told(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A line that was copied, with another image alone: on one grid nothing else would show it."""
    lists = {"training": [pair(1), {**pair(2), "label": pair(1)["label"]}], "validation": [pair(3)]}
    (root / "list.json").write_text(json.dumps(lists))
    cohort = LabelledCohort(root=str(root), classes=2, pool="list.json", sizes=(1,))
    read_labelled(cohort, (1,))
    told = " ".join(capsys.readouterr().out.split())
    assert "training.1: " in told
    assert f"{root}/labels/v1.nii.gz is the label map of {root}/images/v1.nii.gz, too" in told


@pytest.mark.parametrize("text", ["", "{", "{'training': []}", "\ufeff{}", "[" * 100_000, '{"training": [NULL]}'])
def test_a_list_that_is_no_json_is_refused(root: Path, text: str) -> None:
    """What is no JSON is refused, however deep it goes."""
    (root / "list.json").write_text(text)
    assert "invalid JSON" in refusal(root)


@pytest.mark.parametrize("text", ["[]", "5", "null", '"training"'])
def test_a_list_that_is_no_object_is_refused(root: Path, text: str) -> None:
    """What is JSON, but no object, is refused."""
    (root / "list.json").write_text(text)
    assert "list.json: input should be an object, got " in refusal(root)


def test_a_list_that_cannot_be_read_is_refused(root: Path) -> None:
    """A missing list, a folder and bytes that are no text are refused."""
    assert "cannot read the datalist: No such file" in refusal(root, name="no.json")
    assert "cannot read the datalist: Is a directory" in refusal(root, name="images")
    (root / "list.json").write_bytes(b"\xff\xfe{")
    assert "invalid JSON" in refusal(root)


def test_a_root_may_be_a_link(root: Path) -> None:
    """A root that is itself a link to the data leads to the same volumes."""
    write(root, training=[pair(1)])
    link = root.parent / "link"
    link.symlink_to(root)
    assert read_datalist(link, "list.json", labelled=True).training[0].image == link / "images/v1.nii.gz"


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=4) | st.sampled_from(["v.nii", "w.nii"]),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["image", "label", "0", "1"]) | st.text(max_size=3), inner, max_size=3)
    ),
    max_leaves=8,
)


@given(st.dictionaries(st.sampled_from(["training", "validation", "test", "labels"]), JSON), st.booleans())
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_json_is_read_or_refused(tmp_path: Path, tree: dict[str, Any], labelled: bool) -> None:
    """Whatever JSON a list holds, the outcome is a Datalist of files that exist or a ValueError that names the list."""
    touch(tmp_path, "v.nii", "w.nii")
    path = write(tmp_path, **tree)
    listed, message = None, f"{path}: "
    try:
        listed = read_datalist(tmp_path, path, labelled=labelled)
    except ValueError as error:
        message = str(error)
    assert message.startswith(f"{path}: ")
    if listed:
        assert all(case.image.is_file() for case in (*listed.training, *listed.validation, *listed.test))


def test_sources_are_joined(root: Path) -> None:
    """The volumes of all sources count together; one source with validation volumes is enough."""
    write(root, "one.json", training=["images/v1.nii.gz"])
    write(root, "two.json", training=["images/v2.nii.gz"], validation=["images/v3.nii.gz"])
    sources = [Source(root=str(root), datalist=f"{name}.json") for name in ("one", "two")]
    training, validation = read_unlabelled(sources)
    assert [case.id for case in training] == ["v1", "v2"]
    assert [case.id for case in validation] == ["v3"]
    with pytest.raises(ValueError, match=re.escape(f"{root / 'one.json'}: 'validation' must list a volume")):
        read_unlabelled(sources[:1])


@pytest.mark.parametrize("second", ["same.json", "one.json"])
@pytest.mark.parametrize("section", ["training", "validation"])
def test_a_volume_belongs_to_one_source(root: Path, section: str, second: str) -> None:
    """A volume in two sources is refused, through a link too, and so is a list that is named twice."""
    (root / "link.nii.gz").symlink_to("images/v1.nii.gz")
    write(root, "one.json", training=["images/v1.nii.gz"], validation=["images/v3.nii.gz"])
    tree = {"training": ["images/v4.nii.gz"], "validation": ["images/v5.nii.gz"]} | {section: ["link.nii.gz"]}
    write(root, "same.json", **tree)
    with pytest.raises(ValueError, match="a volume belongs to one source") as caught:
        read_unlabelled([Source(root=str(root), datalist=name) for name in ("one.json", second)])
    assert str(root / "one.json") in str(caught.value)


@pytest.mark.parametrize("section", ["validation", "test"])
def test_held_out_volumes_are_not_pretrained_on(root: Path, section: str) -> None:
    """A labelled validation or test volume among the unlabelled ones is refused; a labelled training volume is not."""
    held = Case("held", root / "images/v2.nii.gz", root / "labels/v2.nii.gz")
    train = Case("train", root / "images/v1.nii.gz", root / "labels/v1.nii.gz")
    other = Case("other", root / "images/v3.nii.gz", root / "labels/v3.nii.gz")
    both = {"validation": (other,), "test": ()} | {section: (held,)}
    splits = Splits(training={1: (train,)}, organs=("spleen",), **both)
    check_lists([train, Case("v4", root / "images/v4.nii.gz")], [], splits)
    (root / "link.nii.gz").symlink_to("images/v2.nii.gz")
    for image in ("images/v2.nii.gz", "link.nii.gz"):
        for parts in (([train, Case("x", root / image)], []), ([], [train, Case("x", root / image)])):
            with pytest.raises(UserError, match=f"is in labelled {section} .* and also in unlabelled") as caught:
                check_lists(*parts, splits)
            assert str(held.image) in str(caught.value)


@pytest.mark.parametrize(
    ("change", "rule"),
    [
        ({"training": [pair(1)]}, "two.json: the split of 2 volumes lists 1 for training"),
        ({"validation": [pair(8)]}, "two.json: 'validation' differs from that of"),
        ({"validation": []}, "two.json: 'validation' differs from that of"),
        ({"validation": [{**pair(9), "label": "labels/v8.nii.gz"}]}, "two.json: 'validation' differs from that of"),
        ({"test": [pair(8)]}, "two.json: 'test' differs from that of"),
        (
            {"labels": {**ORGANS, "3": "gall"}},
            "two.json: labels [3] are beyond the study's: finetune.cohort.class",
        ),
        ({"labels": {**ORGANS, "2": "kidney"}}, "two.json: label 2 is 'kidney', but 'liver' in "),
    ],
)
def test_splits_that_do_not_fit_together_are_refused(root: Path, change: dict[str, Any], rule: str) -> None:
    """Splits have the size that they are named by, share what they are compared on, and keep to the classes."""
    tree = {"training": [pair(1), pair(2)], "validation": [pair(9)], "test": [pair(10)], "labels": ORGANS}
    write(root, "one.json", **tree | {"training": [pair(1)]})
    write(root, "two.json", **tree)
    cohort = LabelledCohort(root=str(root), classes=3, splits={1: "one.json", 2: "two.json"})
    assert len(read_labelled(cohort, (1, 2)).cases) == 4
    write(root, "two.json", **tree | change)
    with pytest.raises(ValueError, match=re.escape(rule)):
        read_labelled(cohort, (1, 2))
    assert list(read_labelled(cohort, (1,)).training) == [1], "a split that the grid leaves out is not read"


def test_splits_need_validation(root: Path) -> None:
    """A labelled cohort without validation volumes is refused."""
    write(root, training=[pair(1)])
    with pytest.raises(ValueError, match="'validation' must list at least one labelled volume"):
        read_labelled(LabelledCohort(root=str(root), classes=3, splits={1: "list.json"}), (1,))


@pytest.mark.parametrize(
    ("ids", "expected"),
    [
        (("v3", "v1"), ["v3", "v1"]),
        (("v1..v3",), ["v1", "v2", "v3"]),
        (("v8..v10",), ["v8", "v9", "v10"]),
        (("v2", "v5..v5"), ["v2", "v5"]),
    ],
)
def test_ids_keep_their_order(root: Path, ids: tuple[str, ...], expected: list[str]) -> None:
    """A split by ids has its volumes in the order of the ids."""
    touch(root, *pair("z").values())
    write(root, training=[pair(number) for number in range(1, 11)], validation=[pair("z")])
    cohort = LabelledCohort(root=str(root), classes=3, splits={len(expected): ids}, datalist="list.json")
    assert [case.id for case in read_labelled(cohort, (len(expected),)).training[len(expected)]] == expected


@pytest.mark.parametrize(
    ("ids", "rule"),
    [
        (("v1", "v9"), "splits.2: no training volume has the id 'v9'"),
        (("v1..w2",), "splits.2: no training volume has the id 'v1..w2'"),
        (("v7..v99999999999",), "splits.2: no training volume has the id 'v9'"),
        (("v7..v9999999999999999999",), "splits.2: no training volume has the id 'v7..v9999999999999999999'"),
        (("v7..v9",), "splits.2: no training volume has the id 'v9'"),
        (("v1", "v1..v1"), "the split of 2 volumes lists 1 for training"),
        (("v1..v3",), "the split of 2 volumes lists 3 for training"),
        (("v3..v1",), "the split of 2 volumes lists 0 for training"),
    ],
)
def test_wrong_ids_are_refused(root: Path, ids: tuple[str, ...], rule: str) -> None:
    """An id that is unknown, in validation or named twice is refused; so is a split of another size."""
    write(root, training=[pair(number) for number in range(1, 9)], validation=[pair(9)])
    cohort = LabelledCohort(root=str(root), classes=3, splits={2: ids}, datalist="list.json")
    with pytest.raises(ValueError, match=re.escape(f"{root / 'list.json'}: {rule}")):
        read_labelled(cohort, (2,))


def test_stem_takes_off_nifti_suffixes_only() -> None:
    """Points in a name are part of it."""
    assert [stem(Path(name)) for name in ("a/b.c.nii.gz", "b.NII", "b.gz", "B.Nii.GZ")] == ["b.c", "b", "b.gz", "B"]
