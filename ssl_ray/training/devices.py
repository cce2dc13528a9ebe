"""What kinds of GPU can compute; without torch, as the command line lists their names."""

import re
from dataclasses import dataclass


@dataclass(frozen=True)
class Device:
    """A kind of GPU: peak FLOP/s of dense products by the vendor's data sheet; `bfloat16` is None where it has none."""

    name: str
    bfloat16: float | None
    float32: float

    def dtype(self, precision: str) -> str:
        """What the setting `precision` means on it: as `precision.resolve` decides for a GPU that is present."""
        return "float32" if precision == "float32" or self.bfloat16 is None else "bfloat16"

    def peak(self, dtype: str) -> float:
        """FLOP/s in float32 or bfloat16."""
        return self.float32 if dtype == "float32" or self.bfloat16 is None else self.bfloat16


_T = 1e12
DEVICES = {
    "a10": Device("A10", 125 * _T, 31.2 * _T),
    "a10g": Device("A10G", 70 * _T, 31.5 * _T),
    "a40": Device("A40", 149.7 * _T, 37.4 * _T),
    "a100": Device("A100", 312 * _T, 19.5 * _T),
    "b200": Device("B200", 2250 * _T, 75 * _T),
    "h100": Device("H100 SXM", 989 * _T, 67 * _T),
    "h100-pcie": Device("H100 PCIe", 756 * _T, 51 * _T),
    "h200": Device("H200", 989 * _T, 67 * _T),
    "l4": Device("L4", 121 * _T, 30.3 * _T),
    "l40s": Device("L40S", 362 * _T, 91.6 * _T),
    "t4": Device("T4", None, 8.1 * _T),
    "v100": Device("V100", None, 15.7 * _T),
}
"""By the name that `--gpu` takes. float32 is without TF32, which stays off for matrix products."""


def known_device(name: str) -> Device | None:
    """The device that `torch.cuda.get_device_name` calls by this name; None for one that is not in `DEVICES`."""
    words = re.split(r"[\s_-]+", name.lower())
    for key in sorted(DEVICES, key=len, reverse=True):
        if all(part in words for part in key.split("-")):
            return DEVICES[key]
    return None
