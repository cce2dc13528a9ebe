import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from monai.networks.nets import UNETR, ViTAutoEnc
from scipy import ndimage
from torch import Tensor
from torch.backends import mkl, mkldnn
from torch.utils._python_dispatch import TorchDispatchMode

from ssl_ray.networks import faster
from ssl_ray.networks.faster import use_fast_attention, use_onednn, use_patch_products
from ssl_ray.networks.primus.settings import Primus
from ssl_ray.networks.registry import build_autoencoder, build_encoder, build_segmentation
from ssl_ray.networks.transfer import transfer
from ssl_ray.networks.unetr.settings import Unetr
from ssl_ray.networks.weight_files import describe

TINY = Unetr(hidden_size=48, mlp_dim=96, num_heads=3, feature_size=4)
CUBE, LONG = (32, 32, 32), (48, 32, 32)
MONAIS = {"VitAutoencoder": "ViTAutoEnc(", "Segmentation": "UNETR(", "VitEncoder": "ViT("}
POSITIONS = "patch_embedding.position_embeddings"

State = dict[str, Tensor]


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)


def trained(patch_size: tuple[int, int, int] = CUBE, network: Unetr = TINY) -> ViTAutoEnc:
    """An autoencoder in which every parameter differs from what any initialisation gives."""
    autoencoder = build_autoencoder(network, patch_size).eval()
    for parameter in autoencoder.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    return autoencoder


def unetr_of(patch_size: tuple[int, int, int] = CUBE, classes: int = 3) -> Any:
    return build_segmentation(TINY, patch_size, 1, classes)


def tokens(vit: Any, x: Tensor) -> Tensor:
    """The normed tokens (batch, tokens, hidden), written out as in both of MONAI's forward passes."""
    x = vit.patch_embedding(x)
    for block in vit.blocks:
        x = block(x)
    return torch.as_tensor(vit.norm(x))


@pytest.mark.parametrize("patch_size", [CUBE, LONG])
def test_the_steps_of_an_autoencoder_give_what_its_forward_gives(patch_size: tuple[int, int, int]) -> None:
    """Embedding, encoding and decoding one after the other, to the bit; the tokens are those of the encoder alone."""
    autoencoder, encoder, x = trained(patch_size), build_encoder(TINY, patch_size), torch.rand(2, 1, *patch_size)
    state = autoencoder.state_dict()
    encoder.load_state_dict({name: state[name] for name in encoder.state_dict()})
    encoded = autoencoder.encode(autoencoder.embed(x))
    assert torch.equal(autoencoder.decode(encoded), autoencoder(x)[0])
    assert torch.equal(encoder.encode(encoder.embed(x)), encoded)
    assert encoded.shape == (2, np.prod(encoder.grid), encoder.hidden_size)


def test_tokens_are_in_c_order_of_their_grid() -> None:
    """The token of a place is what the voxels there become, z fastest."""
    encoder, patch = build_encoder(TINY, LONG), torch.rand(1, 1, *LONG)
    x, y, z = encoder.grid
    before = encoder.embed(patch)
    for place in range(x * y * z):
        corner = [index * encoder.token for index in np.unravel_index(place, (x, y, z))]
        other = patch.clone()
        other[(0, 0, *(slice(first, first + 16) for first in corner))] += 1
        changed = (encoder.embed(other) != before).any(dim=2)[0]
        assert changed.nonzero().flatten().tolist() == [place]


def test_networks_are_the_tutorials() -> None:
    """Parameters have the names and shapes of the tutorial's networks at full width."""
    with torch.device("meta"):
        ours = build_autoencoder(Unetr(), (96,) * 3), build_segmentation(Unetr(), (96,) * 3, 1, 14)
        theirs = (
            ViTAutoEnc(
                in_channels=1,
                img_size=(96, 96, 96),
                patch_size=(16, 16, 16),
                proj_type="conv",
                hidden_size=768,
                mlp_dim=3072,
            ),
            UNETR(
                in_channels=1,
                out_channels=14,
                img_size=(96, 96, 96),
                feature_size=16,
                hidden_size=768,
                mlp_dim=3072,
                num_heads=12,
                proj_type="conv",
                norm_name="instance",
                res_block=True,
                dropout_rate=0.0,
            ),
        )
    for our, their in zip(ours, theirs, strict=True):
        # Ours are MONAI's own with the steps of an encoder.
        shown = re.sub(r"(VitAutoencoder|Segmentation|VitEncoder)\(", lambda name: MONAIS[name[1]], str(our))
        assert shown == str(their)
        assert {k: v.shape for k, v in our.state_dict().items()} == {k: v.shape for k, v in their.state_dict().items()}


def test_fast_attention_equals_the_plain_path() -> None:
    """The fused kernel changes neither the outputs nor the gradients of a network."""
    plain, fast = trained(), build_autoencoder(TINY, CUBE).eval()
    fast.load_state_dict(plain.state_dict())
    use_fast_attention(fast)
    x = torch.rand(2, 1, *CUBE)
    outputs = [network(x)[0] for network in (plain, fast)]
    for output in outputs:
        output.square().mean().backward()
    torch.testing.assert_close(outputs[1], outputs[0], rtol=1e-5, atol=1e-5)
    for ours, theirs in zip(fast.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-4, atol=1e-5)


class Called(TorchDispatchMode):
    """Names of the operators that were called, after `aten::`."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.add(func.name().removeprefix("aten::"))
        return func(*args, **(kwargs or {}))


@pytest.mark.skipif(not mkldnn.is_available(), reason="this torch was built without oneDNN")
@pytest.mark.parametrize("network", [TINY, Primus(token=8, hidden_size=24, layers=2, num_heads=2)])
@pytest.mark.parametrize("task", ["restoring", "segmenting"])
def test_onednn_equals_the_plain_path(network: Any, task: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Outputs and gradients stay, a frozen weight stays without one, and under autocast the way is torch's own."""
    monkeypatch.setattr(faster, "mkl_is_narrow", lambda: True)
    outputs, gradients = [], []
    for change in (None, use_onednn):
        torch.manual_seed(0)
        built: Any = build_autoencoder(network, CUBE)
        if task == "segmenting":
            built = build_segmentation(network, CUBE, 1, 3)
        if change:
            change(built)
            use_patch_products(built)
        frozen = next(weight for name, weight in built.named_parameters() if ".mlp." in name)
        frozen.requires_grad_(False)
        x = torch.rand(2, 1, *CUBE)

        def compute(net: Any = built, x: Tensor = x) -> Tensor:
            return torch.as_tensor(net(x) if task == "segmenting" else net.decode(net.encode(net.embed(x))))

        with Called() as called:
            outputs.append(compute())
            outputs[-1].square().mean().backward()
        assert ({"mkldnn_linear", "mkldnn_linear_backward"} <= called.names) == bool(change)
        gradients.append({name: weight.grad for name, weight in built.named_parameters()})
        assert frozen.grad is None
        with torch.autocast("cpu", torch.bfloat16), torch.inference_mode(), Called() as called:
            compute()
        assert "mkldnn_linear" not in called.names
    torch.testing.assert_close(outputs[1], outputs[0], rtol=1e-4, atol=1e-5)
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, rtol=1e-3, atol=1e-5, msg=name)


@pytest.mark.parametrize(
    ("listed", "widest", "narrow"),
    [
        ("vendor_id\t: AuthenticAMD\ncpu family\t: 26\n", "AVX512", True),
        ("vendor_id\t: AuthenticAMD\ncpu family\t: 26\n", "AVX2", False),
        ("vendor_id\t: AuthenticAMD\ncpu family\t: 25\n", "AVX512", False),
        ("vendor_id\t: GenuineIntel\ncpu family\t: 6\n", "AVX512", False),
        ("processor\t: 0\nFeatures\t: fp asimd\n", "AVX512", False),
        (None, "AVX512", False),
    ],
)
def test_mkl_is_narrow_where_it_was_measured(
    listed: str | None, widest: str, narrow: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On AMD's processors with units of 512 bits; without a list, or with another maker's, torch's own way stays."""
    if listed:
        (tmp_path / "cpuinfo").write_text(listed)
    monkeypatch.setattr(faster, "_CPUS", tmp_path / "cpuinfo")
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: widest)
    for library in (mkl, mkldnn):
        monkeypatch.setattr(library, "is_available", lambda: True)
    assert faster.mkl_is_narrow.__wrapped__() == narrow


@pytest.mark.parametrize("patch_size", [CUBE, LONG])
def test_transferred_vit_gives_the_autoencoders_tokens(patch_size: tuple[int, int, int]) -> None:
    """After a transfer both encoders give the same tokens, block by block, and the decoder is as it was."""
    autoencoder, unetr = trained(patch_size), unetr_of(patch_size).eval()
    before = {key: value.clone() for key, value in unetr.state_dict().items()}
    report = transfer(autoencoder.state_dict(), unetr, "weights")

    x = torch.rand(2, 1, *patch_size)
    with torch.no_grad():
        last, hidden = unetr.vit(x)
        assert torch.equal(last, tokens(autoencoder, x))
        assert all(torch.equal(a, b) for a, b in zip(hidden, autoencoder(x)[1], strict=True))
    after = unetr.state_dict()
    assert all(torch.equal(after[key], value) for key, value in before.items() if not key.startswith("vit."))
    assert report.share == 1
    assert report.loaded == len(unetr.vit.state_dict())
    assert report.interpolated == report.missing == report.unexpected == ()


@pytest.mark.parametrize("prefix", ["model.", "module.", "vit.", "encoder.", "net.student.backbone."])
def test_an_encoder_under_a_prefix_is_the_same_encoder(prefix: str) -> None:
    """What a trainer or a larger network puts before the names changes nothing; its other parts are left out."""
    state, plain, found = trained().state_dict(), unetr_of(), unetr_of()
    inside = {f"{prefix}{key}": value for key, value in state.items()}
    transfer(state, plain, "weights")
    report = transfer(inside | {"head.weight": torch.ones(2), f"{prefix}conv3d_transpose.x": torch.ones(1)}, found, "w")
    assert (report.prefix, report.unexpected, report.share) == (prefix, (), 1)
    assert all(torch.equal(value, found.vit.state_dict()[key]) for key, value in plain.vit.state_dict().items())


def as_written_by(version: str, state: State) -> State:
    """The state dict under the names that ViTAutoEnc of an older MONAI gave it (compared with the releases)."""
    old = {key: value for key, value in state.items() if "norm_cross_attn" not in key}
    if version == "0.8":
        old["patch_embedding.cls_token"] = torch.zeros(1, 1, 48)
    if version in ("1.4", "1.5"):
        for i in range(12):
            old |= {f"blocks.{i}.norm_cross_attn.{name}": torch.ones(48) for name in ("weight", "bias")}
            old |= {f"blocks.{i}.cross_attn.to_{name}.weight": torch.rand(48, 48) for name in "qkv"}
            old[f"blocks.{i}.cross_attn.out_proj.weight"] = torch.rand(48, 48)
            old[f"blocks.{i}.cross_attn.out_proj.bias"] = torch.rand(48)
    return old


@pytest.mark.parametrize(
    ("version", "missing", "unexpected"), [("0.8", 24, 1), ("0.9", 24, 0), ("1.3", 24, 0), ("1.4", 0, 60)]
)
def test_weights_of_older_releases_transfer(version: str, missing: int, unexpected: int) -> None:
    """Checkpoints that differ in idle parameters alone give the same tokens, and the report names those."""
    autoencoder, unetr = trained(), unetr_of().eval()
    report = transfer(as_written_by(version, autoencoder.state_dict()), unetr, "weights")
    x = torch.rand(1, 1, *CUBE)
    with torch.no_grad():
        assert torch.equal(unetr.vit(x)[0], tokens(autoencoder, x))
    assert (len(report.missing), len(report.unexpected)) == (missing, unexpected)
    assert (report.share == 1) == (missing == 0)


def rename(state: State, old: str, new: str) -> State:
    return {key.replace(old, new): value for key, value in state.items()}


@pytest.mark.parametrize(
    ("spoil", "expected"),
    [
        (lambda s: {k: v for k, v in s.items() if k != "blocks.3.norm1.weight"}, "missing: blocks.3.norm1.weight"),
        (lambda s: {k: v for k, v in s.items() if k != POSITIONS}, f"missing: {POSITIONS}"),
        (lambda s: s | {"blocks.0.attn.qkv.bias": torch.zeros(144)}, "unexpected: blocks.0.attn.qkv.bias"),
        (lambda s: s | rename(s, "blocks.", "blocks.1"), "unexpected: blocks.12."),
        (lambda s: rename(s, "blocks.", "encoder.blocks."), "and 153 more"),
        (lambda s: {k.replace("norm", "swin"): v for k, v in s.items()}, "missing: "),
        (lambda s: s | {f"teacher.{k}": v for k, v in s.items()}, "holds 2 encoders, under '', 'teacher.'"),
        (lambda s: {f"vit.{k}": v for k, v in s.items() if k != "norm.bias"}, "missing: norm.bias"),
        (lambda s: {f"vit.{k}": v for k, v in s.items()} | {"vit.x.y": torch.ones(1)}, "unexpected: x.y"),
        (lambda s: rename(s, "patch_embeddings.", "patch_embeddings.1."), "patch_embeddings.1.weight"),
        (lambda s: s | {"norm.bias": torch.full((48,), torch.nan)}, "norm.bias: NaN or infinite"),
        (lambda s: s | {"conv3d_transpose.bias": torch.full((16,), -torch.inf)}, "NaN or infinite"),
        (lambda s: s | {POSITIONS: torch.rand(1, 12, 48)}, "the grid of its 12 tokens cannot be told"),
        (lambda s: s | {POSITIONS: torch.rand(8, 48)}, "is (8, 48), expected (1, 8, 48)"),
        (lambda s: {}, "missing"),
    ],
)
def test_anything_but_a_whole_encoder_is_refused(spoil: Callable[[State], State], expected: str) -> None:
    """A transfer that would be partial says which file and why, and leaves the network as it was."""
    unetr = unetr_of()
    before = {key: value.clone() for key, value in unetr.state_dict().items()}
    with pytest.raises(ValueError, match=r"^run/weights\.pt: ") as error:
        transfer(spoil(trained().state_dict()), unetr, "run/weights.pt")
    assert expected in str(error.value)
    assert all(torch.equal(value, before[key]) for key, value in unetr.state_dict().items())


@pytest.mark.parametrize(
    ("width", "cause", "shapes"),
    [
        ({"hidden_size": 96}, "hidden_size 96, but this network has 48", "is (1, 8, 96), expected (1, 8, 48)"),
        ({"mlp_dim": 64}, "mlp_dim 64, but this network has 96", "is (64, 48), expected (96, 48)"),
    ],
)
def test_another_width_is_refused_with_its_cause(width: dict[str, int], cause: str, shapes: str) -> None:
    """Weights of a wider or narrower ViT are refused: by the setting in their metadata, or else by both shapes."""
    network = TINY.model_copy(update=width)
    other = build_autoencoder(network, CUBE).state_dict()
    with pytest.raises(ValueError, match=cause):
        transfer(other, unetr_of(), "weights", describe(network, CUBE))
    with pytest.raises(ValueError, match=re.escape(shapes)):
        transfer(other, unetr_of(), "weights")


@pytest.mark.parametrize(
    ("source", "target", "told"),
    [((64, 64, 64), LONG, False), (CUBE, (48, 48, 48), False), (LONG, (32, 48, 32), True), (LONG, (64, 48, 16), True)],
)
def test_position_embeddings_follow_the_patch(
    source: tuple[int, int, int], target: tuple[int, int, int], told: bool
) -> None:
    """Another patch resamples the embeddings as scipy does, even where the number of tokens is the same."""
    state, unetr = trained(source).state_dict(), unetr_of(target)
    report = transfer(state, unetr, "weights", describe(TINY, source) if told else None)
    assert report.interpolated == (POSITIONS,)
    assert report.share == 1

    grid, goal = [s // 16 for s in source], [t // 16 for t in target]
    field = state[POSITIONS].numpy().reshape(*grid, 48)
    zoom = [g / s for g, s in zip(goal, grid, strict=True)]
    expected = ndimage.zoom(field, (*zoom, 1), order=1, mode="nearest", grid_mode=True).reshape(1, -1, 48)
    np.testing.assert_allclose(unetr.vit.state_dict()[POSITIONS], expected, atol=1e-6)


def test_metadata_that_contradicts_the_weights_is_refused() -> None:
    """A patch size that gives another number of tokens is an error, whatever it looks like."""
    for text in ("[96, 96, 96]", "96", "[]", "none", "[0, 0, 0]"):
        with pytest.raises(ValueError, match=r"the grid of its 8 tokens cannot be told.* got "):
            transfer(trained().state_dict(), unetr_of(), "weights", {"patch_size": text})


def test_ambiguous_grid_is_refused() -> None:
    """64 tokens may be a cube or the elongated grid of the network: without metadata, neither is assumed."""
    state, unetr = trained((128, 64, 32)).state_dict(), unetr_of((128, 64, 32))
    with pytest.raises(ValueError, match="the grid of its 64 tokens cannot be told"):
        transfer(state, unetr, "weights")
    assert transfer(state, unetr, "weights", describe(TINY, (128, 64, 32))).interpolated == ()
