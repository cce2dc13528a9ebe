"""What the device can do at most: the ceilings that the steps are held against."""

import torch
from gpu_bench import Bench


def device(bench: Bench) -> None:
    """Name, versions, device memory and host copies in GB/s, matrix products in TFLOP/s on random data."""
    cuda = bench.device.type == "cuda"
    name = torch.cuda.get_device_name() if cuda else "CPU"
    bench.put("device", "name", value=f"{name}, torch {torch.__version__}, cuDNN {torch.backends.cudnn.version()}")
    megabytes, side = (16, 512) if bench.quick else (2048, 8192)
    source = torch.randint(256, (megabytes * 2**20,), dtype=torch.uint8, device=bench.device)
    target = torch.empty_like(source)
    seconds = bench.seconds(lambda: target.copy_(source))
    bench.put("device", "copy_gb_s", value=2 * source.numel() / seconds / 1e9)
    for kind, host in (("pageable", source[: 2**26].cpu()), ("pinned", pinned(source[: 2**26].cpu(), cuda))):
        seconds = bench.seconds(lambda host=host: target[: host.numel()].copy_(host, non_blocking=True))  # type: ignore[misc]
        bench.put("device", f"upload_{kind}_gb_s", value=host.numel() / seconds / 1e9)
    for dtype in (torch.bfloat16, torch.float32):
        left, right = (torch.randn(side, side, device=bench.device).to(dtype) for _ in range(2))
        seconds = bench.seconds(lambda left=left, right=right: left @ right)  # type: ignore[misc]
        bench.put("device", f"matmul_{str(dtype).removeprefix('torch.')}_tflops", value=2 * side**3 / seconds / 1e12)


def pinned(host: torch.Tensor, cuda: bool) -> torch.Tensor:
    """In page-locked memory, where there is a GPU."""
    return host.pin_memory() if cuda else host
