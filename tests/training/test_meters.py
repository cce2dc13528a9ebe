"""What a running training uses, as MLflow's system metrics, and the line that a person watches."""

from types import SimpleNamespace

import pytest
import torch
from rich.console import Console

from ssl_ray import console
from ssl_ray.console import Bar
from ssl_ray.pretrain.collector import progress
from ssl_ray.training.meters import arithmetic_rate, peak_memory

H100 = "NVIDIA H100 80GB HBM3"


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """A clock that stands still until it is told to go on."""
    time = SimpleNamespace(now=1000.0)
    monkeypatch.setattr(console, "console", Console(get_time=lambda: time.now))
    return time


def test_memory_is_that_of_this_process() -> None:
    """In bytes: at least what it holds now, and it grows with what is allocated."""
    before = peak_memory(torch.device("cpu"))
    held = torch.ones(64 * 2**20)
    assert 50e6 < before < 1e12
    assert peak_memory(torch.device("cpu")) >= max(before, 4.0 * len(held))


def test_utilisation_is_a_share_of_the_known_peak(monkeypatch: pytest.MonkeyPatch) -> None:
    """989 TFLOP/s at 200 of them on each of two workers; of an unknown device and of a CPU only the rate."""
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: H100)
    found = arithmetic_rate(400e12, 2, torch.device("cuda"), torch.bfloat16)
    assert found["system/mfu_percentage"] == pytest.approx(100 * 200 / 989)
    assert found["system/teraflops_per_second_per_worker"] == 200
    slow = arithmetic_rate(67e12, 1, torch.device("cuda"), torch.float32)
    assert slow["system/mfu_percentage"] == 100
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Abacus 9")
    for device in ("cuda", "cpu"):
        assert set(arithmetic_rate(1e12, 1, torch.device(device), torch.bfloat16)) == {
            "system/teraflops_per_second_per_worker"
        }


def test_the_time_that_is_left_counts_from_where_the_work_started(
    clock: SimpleNamespace, capsys: pytest.CaptureFixture[str]
) -> None:
    """A run that goes on in its middle has not done the first half in no time."""
    with Bar("pretraining", 1000) as bar:
        bar.update(480, "old")  # a record of the run before
        bar.update(500, again=True)
        clock.now += 50
        bar.update(600, "loss 0.1")
    line = capsys.readouterr().out.splitlines()[0]
    assert line == "pretraining 600/1000 0:00:50 03:20 left loss 0.1"


def test_a_narrow_terminal_keeps_the_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    """On 80 columns the step, the time and the loss can be read; only what is behind them is cut."""
    screen = Console(width=80, force_terminal=True, record=True, highlight=False)
    monkeypatch.setattr(console, "console", screen)
    with Bar("pretraining", 1260) as bar:
        bar.update(0)
        bar.update(630, "loss 0.0912, 264 patches/s, waits for data 12%, validation 0.1034")
    last = "pretraining" + screen.export_text().rstrip().rpartition("pretraining")[2].splitlines()[0]
    assert len(last) <= 80
    assert "630/1260" in last
    assert "loss 0.0912, 264 patches/s" in last


def test_waiting_is_told_where_it_matters() -> None:
    """A few percent are not worth the space."""
    record = {"loss": 0.5, "system/patches_per_second": 99.6, "system/data_wait_percentage": 20}
    assert progress(record) == "loss 0.5000, 100 patches/s, waits for data 20%"
    assert "waits" not in progress(record | {"system/data_wait_percentage": 1})
