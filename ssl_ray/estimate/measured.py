"""Seconds on a named GPU, by the share of its bfloat16 peak that an H100 or H200 reached (docs/performance.md).

What was not measured has none: other networks and tasks, smaller steps, float32.
"""

from ssl_ray.config.schema import Finetune, Network, Pretrain
from ssl_ray.networks.flops import network_cost
from ssl_ray.networks.registry import build_segmentation
from ssl_ray.training.devices import Device

_PRETRAINING = {
    ("restoration", "unetr"): {0.95e12: 0.16, 7.6e12: 0.31, 15.2e12: 0.34},
    ("masked", "unetr"): {2.4e12: 0.23},
    ("masked", "primus"): {20.7e12: 0.21},
}
"""Task and network -> FLOPs of a worker's step from which a share holds: 8 to 128 patches of 96³, `compile: true`."""
_TRIAL = {False: 0.030, True: 0.058}
"""A step of UNETR on 4 patches of 96³, compiled or not."""
_WINDOWS = {1: 0.011, 4: 0.026, 16: 0.042}
"""`sliding_window_batch` from which a share holds, in predictions of UNETR."""
_LEAST = 1.7e12
"""FLOPs of a trial's smallest step that was measured."""


def pretraining_seconds(config: Pretrain, network: Network, flops: float, device: Device) -> float | None:
    """Of a worker's step of so many FLOPs."""
    shares = _PRETRAINING.get((config.task.kind, network.kind), {})
    measured = [share for least, share in shares.items() if least <= flops]
    if not measured or device.dtype(config.precision) != "bfloat16":
        return None
    return flops / (max(measured) * device.peak("bfloat16"))


def trial_seconds(config: Finetune, network: Network, device: Device) -> tuple[float | None, float | None]:
    """Of a step and of a window; trials that share a GPU share its time, as two of them gain a twentieth together."""
    shapes = config.patch_size, config.preparation.channels, config.cohort.classes
    cost = network_cost(build_segmentation, network, *shapes)
    flops = config.volumes_per_step * config.patches_per_volume * cost.training
    if network.kind != "unetr" or flops < _LEAST or device.dtype(config.precision) != "bfloat16":
        return None, None
    peak = device.peak("bfloat16") * min(1.0, config.gpus_per_trial or 1.0)
    window = max(share for least, share in _WINDOWS.items() if least <= config.sliding_window_batch)
    return flops / (_TRIAL[config.compile] * peak), cost.forward / (window * peak)
