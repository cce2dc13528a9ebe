"""One model on several workers: DDP, or FSDP2, which spreads weights, gradients and the optimizer's state over them.

What is saved is the same for both and for one worker: whole tensors by the names of their parameters, so that a run may
go on with another number of workers, sharded or not.
"""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import distributed, nn
from torch.distributed.checkpoint import state_dict as states
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel


def parallel(model: nn.Module, blocks: Iterable[nn.Module], device: torch.device, shard: bool) -> nn.Module:
    """The model as every worker trains it: gradients are the mean over workers, where there are several.

    With `shard` (FSDP2 instead of DDP) the weights of each of the `blocks` are gathered when it is computed: forward
    and backward passes, and the model's methods `validate` and `tokens`, need all ranks. They are gathered in float32,
    and autocast rounds them as everywhere else. FSDP's own mixed precision would also round what autocast does not
    (norms, position embeddings), and results would not be those of DDP.
    """
    if not distributed.is_initialized() or distributed.get_world_size() == 1:
        return model
    if not shard:
        devices = [device] if device.type == "cuda" else None
        return DistributedDataParallel(model, device_ids=devices, gradient_as_bucket_view=True)
    mesh = init_device_mesh(device.type, (distributed.get_world_size(),))
    for part in (*blocks, model):
        fully_shard(part, mesh=mesh)
    for method in ("validate", "tokens"):
        register_fsdp_forward_method(model, method)
    return model


def whole_weights(network: nn.Module) -> dict[str, Any]:
    """Weights by name. Sharded ones are gathered on the CPU of rank 0; all ranks must ask, and the others get none."""
    return states.get_model_state_dict(network, options=_options(network))


def whole_state(network: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """`model` and `optimizer`, both by the names of parameters; sharded ones as for `whole_weights`."""
    model, moments = states.get_state_dict(network, optimizer, options=_options(network))
    return {"model": model, "optimizer": moments}


def load(network: nn.Module, optimizer: torch.optim.Optimizer, state: Mapping[str, Any]) -> None:
    """Take over what `whole_state` returned. All ranks must call it; they get what rank 0 has, each its shard of it."""
    options = states.StateDictOptions(full_state_dict=True, broadcast_from_rank0=distributed.is_initialized())
    # Not `set_state_dict`: a rank without a model's state would leave out its part of the broadcast, for which the
    # others then wait for ever (torch 2.13).
    states.set_model_state_dict(network, dict(state.get("model", {})), options=options)
    states.set_optimizer_state_dict(network, optimizer, dict(state.get("optimizer", {})), options=options)


def _options(network: nn.Module) -> states.StateDictOptions:
    sharded = any(isinstance(weight, DTensor) for weight in network.parameters())
    return states.StateDictOptions(full_state_dict=True, cpu_offload=sharded)
