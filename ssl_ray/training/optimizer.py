"""Optimizer and learning rate, shared by pretraining and fine-tuning."""

import math
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from ssl_ray.config.schema import Optimizer


def build_optimizer(
    config: Optimizer, parameters: Iterable[nn.Parameter], scales: Mapping[nn.Parameter, float] | None = None
) -> torch.optim.Optimizer:
    """Adam or AdamW over the trainable parameters; `scales` has those whose learning rate is a multiple of the rate."""
    kind = torch.optim.AdamW if config.name == "adamw" else torch.optim.Adam
    groups: dict[float, dict[str, Any]] = {}
    for parameter in parameters:
        if parameter.requires_grad:
            scale = (scales or {}).get(parameter, 1.0)
            group = groups.setdefault(scale, {"params": []} | ({} if scale == 1 else {"lr_scale": scale}))
            group["params"].append(parameter)
    return kind(groups.values(), lr=config.lr, betas=config.betas, weight_decay=config.weight_decay, fused=True)


def learning_rate(config: Optimizer, step: int, steps: int) -> float:
    """Learning rate of step `step` of `steps`: a pure function, so that nothing of it needs a checkpoint.

    Linear warm-up from lr / warmup_steps; then constant, or a half cosine down to 0 (Loshchilov & Hutter, ICLR 2017).
    """
    if step < config.warmup_steps:
        return config.lr * (step + 1) / config.warmup_steps
    if config.schedule == "constant":
        return config.lr
    progress = (step - config.warmup_steps) / max(1, steps - config.warmup_steps)
    return config.lr * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))


def first_gradient(loss: torch.Tensor, go: torch.Tensor) -> torch.Tensor:
    """What `backward` begins with: 1, or NaN where the loss is not finite or `go` is False.

    A NaN or infinite loss can still give finite gradients. This way the gradient norm shows it, on every rank, and
    `take_step` skips the step.
    """
    return torch.where(torch.isfinite(loss) & go, 1.0, torch.nan)


def take_step(optimizer: torch.optim.Optimizer, config: Optimizer, lr: float | torch.Tensor) -> torch.Tensor:
    """Clip gradients, update the weights and clear the gradients; where one is not finite, only clear them.

    Returns the gradients' global norm before clipping, still on the device; not finite if the step was skipped. An `lr`
    on the device is read there by the optimizer's kernel, and nothing waits for it.
    """
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    norm = nn.utils.get_total_norm(gradients)
    if isinstance(norm, DTensor):  # the norm of this rank's shards alone; all ranks must decide alike
        norm = norm.full_tensor()
    if config.clip_norm:
        nn.utils.clip_grads_with_norm_(parameters, config.clip_norm, norm)
    for group in optimizer.param_groups:
        group["lr"] = lr * group["lr_scale"] if "lr_scale" in group else lr
    # Torch's fused kernels read this on the device, as they do for its gradient scaler: the host need not wait for it.
    optimizer.found_inf = (~torch.isfinite(norm)).float()  # type: ignore[attr-defined]
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return norm
