"""Primus against the equations of its papers, and against its authors' code where that is installed."""

import itertools
import math
import re
from typing import Any

import pytest
import torch
from shaking import shaken
from torch import Tensor

from ssl_ray.networks.flops import counted
from ssl_ray.networks.primus.network import rotation, turned
from ssl_ray.networks.primus.settings import Primus
from ssl_ray.networks.registry import build_autoencoder, build_encoder, build_segmentation

TINY = Primus(token=4, hidden_size=48, layers=2, num_heads=4)
PATCH, GRID = (8, 16, 12), (2, 4, 3)


@pytest.fixture(autouse=True)
def _fixed() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)


def test_positions_turn_pairs_of_numbers_along_three_axes() -> None:
    """Each pair, as a complex number, is multiplied by exp(i * place * 10000^(-j / b)); what is left stays."""
    width, bands = 20, 3
    x = torch.randn(1, 1, math.prod(GRID), width)
    found = torch.view_as_complex(turned(x, rotation(GRID, width)).unflatten(-1, (-1, 2)))
    pairs = torch.view_as_complex(x.unflatten(-1, (-1, 2)))
    for number, place in enumerate(itertools.product(*map(range, GRID))):
        for axis, band in itertools.product(range(3), range(bands)):
            turn = torch.polar(torch.tensor(1.0), torch.tensor(place[axis] * 10_000.0 ** (-band / bands)))
            pair = axis * bands + band
            torch.testing.assert_close(found[0, 0, number, pair], pairs[0, 0, number, pair] * turn)
    assert torch.equal(found[..., 3 * bands :], pairs[..., 3 * bands :])


def test_attention_sees_differences_of_places_alone() -> None:
    """Tokens anywhere in the grid are encoded as the same tokens moved by a step along every axis."""
    encoder = shaken(build_encoder(TINY, (16, 16, 16)), std=0.2)
    tokens = torch.randn(2, 3, 48)
    at = torch.tensor([[0, 5, 20], [1, 4, 21]])  # places in a grid of 4 x 4 x 4, none of them at its end
    with torch.no_grad():
        for block in encoder.blocks:
            block.attn.q_proj.weight.mul_(30)  # attention that depends on its tokens clearly
        here, there = encoder.encode(tokens, at), encoder.encode(tokens, at + 16 + 4 + 1)
        other = encoder.encode(tokens, at.flip(1))
    torch.testing.assert_close(there, here, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(other, here, atol=1e-2)


def test_tokens_are_encoded_by_their_places_in_any_order() -> None:
    """All tokens in another order, with their places, give the same tokens in that order."""
    encoder = shaken(build_encoder(TINY, PATCH), std=0.2)
    order = torch.stack([torch.randperm(24), torch.randperm(24)])
    with torch.no_grad():
        tokens = encoder.embed(torch.rand(2, 1, *PATCH))
        whole = encoder.encode(tokens)
        mixed = encoder.encode(torch.stack([one[at] for one, at in zip(tokens, order, strict=True)]), order)
    torch.testing.assert_close(mixed, torch.stack([one[at] for one, at in zip(whole, order, strict=True)]))


def test_a_token_is_a_box_of_voxels() -> None:
    """Token (x, y, z) of the grid, z fastest, sees its box of the patch and nothing else."""
    encoder = shaken(build_encoder(TINY, PATCH, channels=2), std=0.2)
    image = torch.zeros(1, 2, *PATCH)
    with torch.no_grad():
        before = encoder.embed(image)
        image[0, 1, 4:8, 8:12, 4:8] = 1  # the box of token (1, 2, 1)
        changed = (encoder.embed(image) != before).any(2)[0]
    assert changed.nonzero().flatten().tolist() == [1 * 12 + 2 * 3 + 1]
    assert encoder.grid == GRID


def test_a_block_is_that_of_the_paper() -> None:
    """Written out with a plain softmax: norms before, rotary queries and keys, norm after the attention, SwiGLU with a
    norm, layer scale."""
    encoder = shaken(build_encoder(TINY, PATCH), std=0.2)
    block, x = encoder.blocks[0], torch.randn(2, 24, 48)
    turns = rotation(GRID, 12)

    def heads(values: Tensor) -> Tensor:
        return values.reshape(2, 24, 4, 12).permute(0, 2, 1, 3)

    with torch.no_grad():
        y, attention, mlp = block.norm1(x), block.attn, block.mlp
        q, k, v = (heads(project(y)) for project in (attention.q_proj, attention.k_proj, attention.v_proj))
        weights = (turned(q, turns) @ turned(k, turns).mT / math.sqrt(12)).softmax(-1)
        mixed = (weights @ v).permute(0, 2, 1, 3).reshape(2, 24, 48)
        expected = x + block.gamma_1 * attention.proj(attention.norm(mixed))
        y = block.norm2(expected)
        gate = mlp.fc1_g(y)
        expected = expected + block.gamma_2 * mlp.fc2(mlp.norm(gate * gate.sigmoid() * mlp.fc1_x(y)))
        torch.testing.assert_close(block(x, turns), expected, rtol=1e-4, atol=1e-4)


def test_the_decoder_is_light() -> None:
    """Primus-M on 96³: over 98 % of its weights are in the encoder."""
    with torch.device("meta"):
        network: Any = build_segmentation(Primus(hidden_size=864, layers=16), (96, 96, 96), 1, 14)
    inside, whole = (sum(p.numel() for p in part.parameters()) for part in (network.encoder, network))
    assert inside / whole > 0.98


@pytest.mark.parametrize("network", [TINY, Primus(token=2, hidden_size=24, layers=1, num_heads=2), Primus()])
def test_operations_are_those_of_plain_arithmetic(network: Primus) -> None:
    """Matrix products and convolutions by their shapes, of the autoencoder."""
    patch = (96, 96, 96) if network == Primus() else PATCH
    side, hidden = network.token, network.hidden_size
    tokens, inner = math.prod(patch) // side**3, 8 * hidden // 3
    block = 2 * tokens * hidden * (4 * hidden + 3 * inner) + 4 * tokens**2 * hidden
    steps = int(math.log2(side))
    widths = [hidden, *(8 * max(1, round(hidden / (hidden / 2) ** (n / steps) / 8)) for n in range(1, steps)), 1]
    grown = [tokens * 8**n for n in range(steps)]
    decoder = sum(2 * count * a * b * 8 for count, (a, b) in zip(grown, itertools.pairwise(widths), strict=True))
    forward = 2 * tokens * side**3 * hidden + network.layers * block + decoder
    with torch.device("meta"):
        made = build_autoencoder(network, patch)
        cost = counted(made, lambda: made.decode(made.encode(made.embed(torch.empty(1, 1, *patch)))))
    assert cost.forward == forward


@pytest.mark.parametrize(
    ("settings", "rule"),
    [
        ({"token": 12}, "should be 2, 4, 8, 16 or 32"),
        ({"hidden_size": 100}, r"an even number from 6 on.* got 100 / 12 = 8.33333"),
        ({"hidden_size": 48}, r"got 48 / 12 = 4"),
    ],
)
def test_settings_that_cannot_be_built_are_refused(settings: dict[str, int], rule: str) -> None:
    """With the arithmetic."""
    with pytest.raises(ValueError, match=rule):
        Primus(**settings)


@pytest.mark.parametrize("settings", [TINY, Primus(token=8, hidden_size=132, layers=3, num_heads=2)])
def test_it_computes_what_its_authors_code_does(settings: Primus) -> None:
    """With the same weights; `dynamic-network-architectures` and timm are no dependencies."""
    theirs = pytest.importorskip("dynamic_network_architectures.architectures.primus")
    side = (settings.token,) * 3
    ours = shaken(build_segmentation(settings, (16, 16, 16), 2, 3), std=0.2)
    reference = theirs.Primus(
        2,
        settings.hidden_size,
        side,
        3,
        settings.layers,
        settings.num_heads,
        (16, 16, 16),
        init_values=0.1,
        scale_attn_inner=True,
    ).eval()
    last, state = int(math.log2(settings.token)) - 1, {}
    for name, value in ours.state_dict().items():
        name = re.sub(r"^encoder\.", "eva.", name).replace("eva.patch_embedding.", "down_projection.proj.")
        if found := re.fullmatch(r"decoder\.(\d+)\.(.+)", name):  # theirs has a Sequential for each step but the last
            step, layer = divmod(int(found[1]), 3)
            name = f"up_projection.decode.{step}.{'' if step == last else f'{layer}.'}{found[2]}"
        state[name] = value
    missing, unexpected = reference.load_state_dict(state, strict=False)
    assert unexpected == []
    assert set(missing) <= {"mask_token"}
    x = torch.rand(2, 2, 16, 16, 16)
    with torch.no_grad():
        torch.testing.assert_close(ours(x), reference(x), rtol=1e-4, atol=1e-4)
