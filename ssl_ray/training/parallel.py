"""One model on several workers: DDP, or FSDP2, which spreads weights, gradients and the optimizer's state over them.

What is saved is the same for both and for one worker, whole tensors in torch's own state dicts, so that a run may go on
in another way than it was begun.
"""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.parallel import DistributedDataParallel


def parallel(model: nn.Module, blocks: Iterable[nn.Module], device: torch.device, shard: bool) -> nn.Module:
    """The model as every worker trains it: gradients are the mean over workers, where there are several.

    Sharded, weights are gathered in float32 and autocast rounds them as everywhere else. FSDP's own mixed precision
    would round what autocast does not (norms, position embeddings), so that results were no longer DDP's.

    Args:
        model: on the device; has a method `restore` beside `forward`.
        blocks: parts of it whose weights are gathered one after the other, each when it is computed.
        device: of this worker.
        shard: FSDP2 instead of DDP. Forward and backward passes are then collective.
    """
    if not distributed.is_initialized() or distributed.get_world_size() == 1:
        return model
    if not shard:
        devices = [device] if device.type == "cuda" else None
        return DistributedDataParallel(model, device_ids=devices, gradient_as_bucket_view=True)
    mesh = init_device_mesh(device.type, (distributed.get_world_size(),))
    for part in (*blocks, model):
        fully_shard(part, mesh=mesh)
    register_fsdp_forward_method(model, "restore")
    return model


def gathered(state: Any, here: bool) -> Any:
    """Nested containers in which sharded tensors are whole, on the CPU; where any are sharded, all ranks must call it.

    Args:
        state: dicts and lists of tensors and plain values.
        here: whether this rank wants the whole tensors; if not, None is in their place.
    """
    if isinstance(state, DTensor):
        whole = state.full_tensor()
        return whole.cpu() if here else None
    if isinstance(state, Mapping):
        return {key: gathered(value, here) for key, value in state.items()}
    if isinstance(state, list):
        return [gathered(value, here) for value in state]
    return state


def load(network: nn.Module, optimizer: torch.optim.Optimizer, state: Mapping[str, Any]) -> None:
    """Take over `model` and `optimizer` of a gathered state, of which each rank keeps its shard; all ranks must."""
    own = network.state_dict()
    network.load_state_dict({name: _scattered(value, own.get(name)) for name, value in state["model"].items()})
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    moments = {
        number: {name: _scattered(value, parameters[number]) for name, value in values.items()}
        for number, values in state["optimizer"]["state"].items()
    }
    optimizer.load_state_dict({**state["optimizer"], "state": moments})


def _scattered(whole: Tensor, like: Tensor | None) -> Tensor:
    if isinstance(like, DTensor) and whole.shape == like.shape:  # the optimizer's count of steps is a number
        return distribute_tensor(whole, like.device_mesh, like.placements)
    return whole
