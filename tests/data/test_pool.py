"""A pool of labelled volumes, out of which every run draws its own."""

import json
from pathlib import Path

import pytest
from volumes import touch

from ssl_ray.config.schema import LabelledCohort
from ssl_ray.data.splits import read_labelled
from ssl_ray.errors import UserError


@pytest.fixture
def cohort(tmp_path: Path) -> LabelledCohort:
    """A pool of five volumes, with one for validation and one for test."""
    entries = [{"image": f"images/{name}.nii.gz", "label": f"labels/{name}.nii.gz"} for name in "abcdevt"]
    touch(tmp_path, *(path for entry in entries for path in entry.values()))
    tree = {"training": entries[:5], "validation": entries[5:6], "test": entries[6:], "labels": {"1": "liver"}}
    (tmp_path / "all.json").write_text(json.dumps(tree))
    return LabelledCohort(root=str(tmp_path), classes=2, pool="all.json", sizes=(2, 5))


def test_a_pool_is_read_whole(cohort: LabelledCohort) -> None:
    """Its validation and test volumes are those of every draw, and every case of it counts as one of the study."""
    splits = read_labelled(cohort, (2, 5))
    assert (splits.pool, list(splits.training)) == (True, [5])
    assert ([case.id for case in splits.validation], [case.id for case in splits.test]) == (["v"], ["t"])
    assert {case.id for case in splits.cases} == set("abcdevt")
    usable = {str(case.image) for case in splits.cases}
    assert len(splits.draw(2, 0, 0, usable)) == 2
    assert {case.id for case in splits.draw(5, 0, 0, usable)} == set("abcde")


def test_more_than_the_pool_has_is_refused(cohort: LabelledCohort) -> None:
    """Before anything is prepared, naming the list."""
    with pytest.raises(UserError, match=r"all.json: 6 subjects are to be drawn from a pool of 5"):
        read_labelled(cohort, (2, 6))
