"""Which floating-point type a step computes in."""

from contextlib import AbstractContextManager
from pathlib import Path

import torch

from ssl_ray.config.common import Precision
from ssl_ray.storage.files import write_file
from ssl_ray.storage.mirror import Mirror

_FILE = "precision.txt"


def resolve(precision: Precision, device: torch.device) -> torch.dtype:
    """The dtype of `precision` on a device; `auto` is bfloat16 where the hardware multiplies in it, else float32.

    Float32 means what torch means by it: matrix products in float32, cuDNN's convolutions in TF32. TF32 for all is not
    offered: a GPU that has it has bfloat16 too, which takes a third of its time (ViT-B, 64 patches a step on an H100:
    226 ms in float32, 108 in TF32, 32 in bfloat16).
    """
    if precision == "auto":
        on_gpu = device.type == "cuda"
        fast = torch.cuda.is_bf16_supported(including_emulation=False) if on_gpu else _cpu_multiplies_bfloat16()
        return torch.bfloat16 if fast else torch.float32
    return {"float32": torch.float32, "bfloat16": torch.bfloat16}[precision]


def named(dtype: torch.dtype) -> str:
    """A dtype as `precision` names it, e.g. `bfloat16`."""
    return str(dtype).removeprefix("torch.")


def settled(setting: Precision, folder: Path, mirror: Mirror) -> str | None:
    """The type that trainings compute in for which a folder stands, on whatever machine; None before one has begun."""
    if setting != "auto":
        return setting
    return (folder / _FILE).read_text() if mirror.pull(folder / _FILE) else None


def settle(setting: Precision, here: str, folder: Path, mirror: Mirror) -> str:
    """The same once one begins: what `auto` comes to `here`, where the first step is taken, is written down.

    Of several that begin at once, all get what the first of them wrote; in an object store, where the last writer wins,
    all that look after it.
    """
    known = settled(setting, folder, mirror)
    if known is None:
        write_file(folder / _FILE, here.encode(), replace=False)
        mirror.push(folder / _FILE)
        known = settled(setting, folder, mirror)
        assert known
    return known


def autocast(device: torch.device, dtype: torch.dtype) -> AbstractContextManager[object]:
    """Context in which a forward pass computes in `dtype`; weights, losses and gradients stay float32."""
    return torch.autocast(device.type, dtype=dtype, enabled=dtype != torch.float32)


def _cpu_multiplies_bfloat16() -> bool:
    """Whether this CPU multiplies in bfloat16 itself; torch has no public function that tells."""
    try:
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported() and torch.cpu._is_avx512_bf16_supported())
    except (AttributeError, RuntimeError):  # a torch that does not say
        return False
