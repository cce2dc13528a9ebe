"""Networks whose parameters all matter."""

from typing import Any

from torch import nn


def shaken(network: nn.Module, std: float) -> Any:
    """The network in evaluation, with parameters that no initialisation gives, so that each of them matters."""
    for parameter in network.parameters():
        nn.init.normal_(parameter, std=std)
    return network.eval()
