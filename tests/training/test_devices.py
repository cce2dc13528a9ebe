"""Kinds of GPU and their peaks."""

import pytest

from ssl_ray.training.devices import DEVICES, known_device


@pytest.mark.parametrize(
    ("name", "key"),
    [
        ("NVIDIA H100 80GB HBM3", "h100"),
        ("NVIDIA H100 PCIe", "h100-pcie"),
        ("NVIDIA A100-SXM4-80GB", "a100"),
        ("NVIDIA A10G", "a10g"),
        ("NVIDIA L40S", "l40s"),
        ("Tesla V100-SXM2-16GB", "v100"),
        ("NVIDIA GeForce RTX 9990", None),
    ],
)
def test_devices_are_known_by_the_name_that_torch_has_for_them(name: str, key: str | None) -> None:
    """Similar names are kept apart; of an unknown device no peak is claimed."""
    assert known_device(name) is (DEVICES[key] if key else None)


def test_a_device_without_bfloat16_computes_in_float32() -> None:
    """As `precision.resolve` decides where the device is present."""
    assert DEVICES["v100"].dtype("auto") == "float32"
    assert DEVICES["a100"].dtype("auto") == "bfloat16"
    assert DEVICES["a100"].peak(DEVICES["a100"].dtype("float32")) == 19.5e12
