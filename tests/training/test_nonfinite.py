"""Steps that were not finite: counted on any device, and kept so that they can be reproduced."""

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from ssl_ray.training.nonfinite import Fault, FiniteSum, Watch, keep

NAN = float("nan")


def test_a_sum_leaves_out_what_is_not_finite_and_starts_again() -> None:
    """Losses are means over patches, so that they count as many times."""
    total = FiniteSum()
    for loss, patches in ((1.0, 2), (NAN, 5), (4.0, 1), (float("inf"), 3)):
        total.add(torch.tensor(loss), patches)
    assert total.take() == (6.0, 3.0)
    assert total.take() == (0.0, 0.0)


@pytest.mark.parametrize(("policy", "limit", "fatal"), [("skip", 1, [False, True, False]), ("stop", 9, [True] * 3)])
def test_faults_in_a_row_are_counted_and_end_by_the_policy(policy: str, limit: int, fatal: list[bool]) -> None:
    """A finite step between two faults begins a new row; the fault names the step and says how many it is in a row."""
    watch = Watch(policy, limit)  # type: ignore[arg-type]
    norms = [1.0, NAN, NAN, 1.0, NAN]
    faults = [watch.look(step, torch.tensor(0.5), torch.tensor(norm)) for step, norm in enumerate(norms)]
    found = [fault for fault in faults if fault]
    assert [(fault.step, fault.row) for fault in found] == [(1, 1), (2, 2), (4, 1)]
    assert [fault.fatal for fault in found] == fatal


def test_the_first_three_are_kept_and_one_that_comes_again_is_replaced(tmp_path: Path) -> None:
    """After a restart the same step may fail again; one file has its tensors and where they come from."""
    patches = torch.arange(24.0).view(2, 3, 4).transpose(0, 2)
    for step in (1, 2, 3, 4, 2):
        text = keep(Fault(step - 1, 0.5, NAN, 1, False), tmp_path, "sample 8", {"images": patches}, {"seed": 7})
        assert text.startswith("loss 0.5, gradient norm nan; sample 8")
        assert (f"kept in {tmp_path}" in text) == (step != 4)
    assert sorted(path.name for path in tmp_path.iterdir()) == [f"step_000000{n}.safetensors" for n in (1, 2, 3)]
    assert torch.equal(load_file(tmp_path / "step_0000002.safetensors")["images"], patches)
    with safe_open(tmp_path / "step_0000002.safetensors", "pt") as file:
        facts = json.loads(file.metadata()["facts"])
    assert facts == {"step": 2, "loss": "0.5", "gradient_norm": "nan", "seed": 7}
