"""Floating-point operations are the networks' own, whatever way they are computed in."""

from collections.abc import Callable
from math import prod

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from ssl_ray.networks import faster as ways
from ssl_ray.networks.faster import use_fast_attention, use_patch_products
from ssl_ray.networks.flops import network_cost
from ssl_ray.networks.registry import build_autoencoder, build_segmentation
from ssl_ray.networks.unetr.settings import VIT_LAYERS, VIT_PATCH, Unetr

TINY = Unetr(hidden_size=48, mlp_dim=64, num_heads=3, feature_size=4)
WIDE = Unetr(hidden_size=192, mlp_dim=384, num_heads=3)
PATCH = (16, 32, 16)


@pytest.mark.parametrize(
    ("network", "patch"),
    [(TINY, PATCH), (WIDE, (32, 48, 64)), (Unetr(), (96, 96, 96))],
    ids=["tiny", "wide", "ViT-B"],
)
def test_the_autoencoders_count_is_that_of_plain_arithmetic(network: Unetr, patch: tuple[int, int, int]) -> None:
    """Matrix products and convolutions by their shapes; training lacks the gradient of the input alone."""
    hidden, tokens, kernel = network.hidden_size, prod(side // VIT_PATCH for side in patch), 4**3
    embedding = 2 * tokens * VIT_PATCH**3 * hidden
    block = 2 * tokens * hidden * (4 * hidden + 2 * network.mlp_dim) + 4 * tokens**2 * hidden
    decoder = 2 * tokens * hidden * 16 * kernel + 2 * tokens * kernel * 16 * kernel
    forward = embedding + VIT_LAYERS * block + decoder
    cost = network_cost(build_autoencoder, network, patch)
    assert (cost.forward, cost.training) == (forward, 3 * forward - embedding)


def test_vit_b_takes_what_the_documentation_says() -> None:
    """40 GFLOP forward in the autoencoder and 146 in the UNETR of the recipe."""
    assert round(network_cost(build_autoencoder, Unetr(), (96, 96, 96)).forward / 1e9, 1) == 40.1
    assert round(network_cost(build_segmentation, Unetr(), (96, 96, 96), 1, 14).forward / 1e9) == 146


def nothing(network: nn.Module) -> None:
    """Leave the network as its builder returns it."""


@pytest.mark.parametrize(
    ("faster", "device"),
    # torch does not count the CPU's fused attention
    [(nothing, "cpu"), (use_patch_products, "cpu"), (use_fast_attention, "meta")],
)
def test_a_step_computes_what_was_counted(
    faster: Callable[[nn.Module], None], device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A batch with content, in each of the faster ways, takes so many times the operations of a view without."""
    monkeypatch.setattr(ways, "mkl_is_narrow", lambda: False)  # nor does torch count oneDNN's products
    for network, counted in (
        (build_autoencoder(TINY, PATCH), network_cost(build_autoencoder, TINY, PATCH)),
        (build_segmentation(TINY, PATCH, 1, 5), network_cost(build_segmentation, TINY, PATCH, 1, 5)),
    ):
        faster(network.to(device))
        with FlopCounterMode(display=False) as counter:
            output = network(torch.rand(2, 1, *PATCH, device=device))
            (output[0] if isinstance(output, tuple) else output).mean().backward()
        assert 2 * counted.training == counter.get_total_flops()


def test_counting_draws_no_random_number() -> None:
    """What a worker trains must not depend on whether its operations were counted."""
    before = torch.get_rng_state()
    network_cost(build_segmentation, TINY, PATCH, 1, 7)
    assert torch.equal(before, torch.get_rng_state())
