"""What holds for every kind of network, and what tells them apart."""

from pathlib import Path
from typing import Any

import pytest
import torch
from shaking import shaken
from studies import small_study
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from ssl_ray.config import depends
from ssl_ray.config.loading import dump, parse
from ssl_ray.config.schema import Network
from ssl_ray.errors import UserError
from ssl_ray.finetune.learner import SegmentationLearner
from ssl_ray.networks.dynunet.settings import DynUnet
from ssl_ray.networks.flops import network_cost
from ssl_ray.networks.primus.settings import Primus
from ssl_ray.networks.registry import build_autoencoder, build_encoder, build_segmentation
from ssl_ray.networks.transfer import transfer
from ssl_ray.networks.unetr.settings import Unetr
from ssl_ray.networks.weight_files import describe

CPU = torch.device("cpu")
UNETR = Unetr(hidden_size=48, mlp_dim=96, num_heads=3, feature_size=4)
PRIMUS = Primus(token=8, hidden_size=48, layers=2, num_heads=4)
DYNUNET = DynUnet(filters=(4, 8, 8, 8), deep_supervision=False)
PRETRAINED = pytest.mark.parametrize("network", [UNETR, PRIMUS], ids=lambda network: network.kind)
ALL = pytest.mark.parametrize("network", [UNETR, PRIMUS, DYNUNET], ids=lambda network: network.kind)
CUBE, LONG = (32, 32, 32), (16, 32, 48)


@pytest.fixture(autouse=True)
def _fixed() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)


def without_gradient(network: nn.Module, output: Any) -> set[str]:
    (output[0] if isinstance(output, tuple) else output).square().mean().backward()
    return {name for name, parameter in network.named_parameters() if parameter.grad is None}


@ALL
@pytest.mark.parametrize("channels", [1, 2])
def test_a_segmentation_has_a_channel_a_class(network: Network, channels: int) -> None:
    """On any grid and for any number of channels, and the loss reaches every parameter that is trained."""
    made = build_segmentation(network, (32, 32, 64), channels, 5)
    logits = made(torch.rand(2, channels, 32, 32, 64))
    assert logits.shape == (2, 5, 32, 32, 64)
    frozen = {name for name, parameter in made.named_parameters() if not parameter.requires_grad}
    assert without_gradient(made, logits) == frozen


@PRETRAINED
@pytest.mark.parametrize("channels", [1, 2])
def test_an_autoencoder_is_its_encoder_and_its_decoder(network: Network, channels: int) -> None:
    """It restores patches, and holds the encoder under the encoder's own names."""
    made, alone = build_autoencoder(network, LONG, channels), build_encoder(network, LONG, channels)
    patches = torch.rand(2, channels, *LONG)
    restored = made.decode(made.encode(made.embed(patches)))
    assert restored.shape == patches.shape
    beside = {key for key in made.state_dict() if key not in alone.state_dict()}
    assert beside
    assert all(key.startswith(made.beside) for key in beside)
    assert set(alone.state_dict()) | beside == set(made.state_dict())
    frozen = {name for name, parameter in made.named_parameters() if not parameter.requires_grad}
    assert without_gradient(made, restored) == frozen


@PRETRAINED
@pytest.mark.parametrize("prefix", ["", "encoder."])
def test_a_transferred_encoder_gives_the_same_tokens(network: Network, prefix: str) -> None:
    """Out of an autoencoder's file, or of a task that holds an encoder; the decoder of the segmentation stays."""
    source = shaken(build_autoencoder(network, LONG) if not prefix else build_encoder(network, LONG), std=0.1)
    made = build_segmentation(network, LONG, 1, 3).eval()
    before = {name: value.clone() for name, value in made.state_dict().items()}
    weights = {prefix + name: value for name, value in source.state_dict().items()}
    weights |= {"decoder.positions": torch.zeros(1, 2, 3)} if prefix else {}
    report = transfer(weights, made, "weights", describe(network, LONG))
    assert (report.share, report.missing, report.unexpected, report.interpolated) == (1, (), (), ())
    patches = torch.rand(2, 1, *LONG)
    with torch.no_grad():
        expected = source.encode(source.embed(patches))
        assert torch.equal(made.encoder.encode(made.encoder.embed(patches)), expected)
    inside = {id(value) for value in made.encoder.state_dict(keep_vars=True).values()}
    for name, value in made.state_dict(keep_vars=True).items():
        assert id(value) in inside or torch.equal(value, before[name]), name


@PRETRAINED
def test_another_patch_interpolates_the_positions(network: Network) -> None:
    """And nothing else: rotary positions are computed, not stored."""
    source = shaken(build_autoencoder(network, CUBE), std=0.1)
    made = build_segmentation(network, (32, 32, 64), 1, 3)
    report = transfer(source.state_dict(), made, "weights", describe(network, CUBE))
    assert report.interpolated == (made.encoder.positions,)
    state = made.encoder.state_dict()
    same = [key for key in state if key != made.encoder.positions]
    assert all(torch.equal(state[key], source.state_dict()[key]) for key in same)


@pytest.mark.parametrize(("source", "target"), [(UNETR, PRIMUS), (PRIMUS, UNETR)])
@pytest.mark.parametrize("told", [True, False])
def test_weights_of_another_kind_are_refused(source: Network, target: Network, told: bool) -> None:
    """Whether their metadata name the kind or only their names show it; nothing is copied."""
    weights, made = build_autoencoder(source, CUBE).state_dict(), build_segmentation(target, CUBE, 1, 3)
    before = {name: value.clone() for name, value in made.state_dict().items()}
    rule = f"trained with kind {source.kind}, but this network has {target.kind}" if told else "not the weights of this"
    with pytest.raises(UserError, match=rule):
        transfer(weights, made, "weights", describe(source, CUBE) if told else {})
    assert all(torch.equal(value, before[name]) for name, value in made.state_dict().items())


@pytest.mark.parametrize("key", ["num_heads", "token", "layers"])
def test_weights_of_another_primus_are_refused(key: str) -> None:
    """By their metadata, also where every shape is the same."""
    other = PRIMUS.model_copy(update={key: {"num_heads": 2, "token": 4, "layers": 3}[key]})
    weights = build_autoencoder(other, CUBE).state_dict()
    with pytest.raises(UserError, match=f"trained with {key} "):
        transfer(weights, build_segmentation(PRIMUS, CUBE, 1, 3), "weights", describe(other, CUBE))


@ALL
def test_a_step_computes_what_was_counted(network: Network) -> None:
    """Two patches take twice the operations of one."""
    counted = network_cost(build_segmentation, network, CUBE, 1, 5)
    with torch.device("meta"):
        made = build_segmentation(network, CUBE, 1, 5)
        with FlopCounterMode(display=False) as counter:
            made(torch.rand(2, 1, *CUBE)).mean().backward()
    assert counter.get_total_flops() == 2 * counted.training
    assert counted.weights_bytes == sum(weight.nbytes for weight in made.parameters())


@ALL
def test_a_trial_learns_with_any_network(network: Network) -> None:
    """One patch is learned in some steps, in the same way twice, and a volume of any shape is segmented."""
    config = small_study(finetune={"cohort": {"classes": 3}, "patch_size": 32}).finetune
    images = torch.rand(1, 1, 32, 32, 32)
    labels = (images > 0.5).to(torch.uint8) + (torch.arange(32) > 15)[None, None, :, None, None].to(torch.uint8)
    losses = []
    for _ in range(2):
        learner = SegmentationLearner(config, network, CPU, 0)
        losses.append([float(learner.step(images, labels, 3e-3)[0]) for _ in range(8)])
    assert losses[0] == losses[1]
    assert losses[0][-1] < losses[0][0] - 0.05
    learner.network.eval()
    assert learner.predict(torch.rand(1, 40, 20, 33)).shape == (40, 20, 33)


@ALL
def test_gradients_in_bfloat16_come_out_of_nothing_but_the_patch(network: Network) -> None:
    """As deep as `thin` says a patch must be on a CPU, whatever lay in memory before (oneDNN: see the learner)."""
    unit, _ = network.multiple
    sides = ((network.thin // unit + 1) * unit, 32, 32)
    network.check_patch("finetune.patch_size", sides)
    config = small_study(finetune={"cohort": {"classes": 3}}).finetune
    config = config.model_copy(update={"patch_size": sides, "precision": "bfloat16"})
    made = SegmentationLearner(config, network, CPU, 0)
    images, labels = torch.rand(1, 1, *sides), torch.ones(1, 1, *sides, dtype=torch.uint8)
    gradients = []
    for _ in range(3):
        rubbish = [torch.full((10**power,), torch.nan) for power in (3, 4, 5, 6)]
        del rubbish
        made.network.zero_grad()
        made.objective(images, labels).backward()
        gradients.append([p.grad.clone() for p in made.network.parameters() if p.grad is not None])
    for first, *others in zip(*gradients, strict=True):
        assert torch.isfinite(first).all()
        assert all(torch.equal(first, other) for other in others)


STUDY = Path(__file__).parents[2] / "experiments" / "real_ct.yaml"


def refusal(*overrides: str) -> str:
    with pytest.raises(UserError) as caught:
        parse(STUDY.read_text(), "demo.yaml", overrides)
    return str(caught.value)


def test_a_kind_is_named_shortly_or_with_its_settings() -> None:
    """A string is the kind alone; without a kind it is a UNETR; what is written out gives the same study."""
    text = STUDY.read_text()
    assert parse(text, "demo", ["network=unetr"]).network == Unetr()
    assert parse(text, "demo", ["network={num_heads: 8}"]).network == Unetr(num_heads=8)
    primus = parse(text, "demo", ["network={kind: primus, hidden_size: 72, num_heads: 6}"])
    assert primus.network == Primus(hidden_size=72, num_heads=6)
    assert parse(dump(primus), "again") == primus


def test_mistakes_in_a_network_are_told_with_its_own_keys() -> None:
    """The kind is no part of a key, the nearest key is one of its own, an unknown kind is told with the others."""
    assert "demo.yaml: network.hiden_size: unknown key; did you mean 'hidden_size'?" in refusal("network.hiden_size=5")
    text = refusal("network={kind: primus, feature_size: 5}")
    assert "demo.yaml: network.feature_size: unknown key" in text
    assert "unetr" not in text
    assert "demo.yaml: network.layers: input should be greater than 0" in refusal("network={kind: primus, layers: 0}")
    text = refusal("network=unet")
    assert "demo.yaml: network: must be one of " in text
    assert all(f"'{kind}'" in text for kind in ("unet", "unetr", "primus", "dynunet"))


def test_patches_are_of_whole_tokens() -> None:
    """The token is the chosen network's."""
    text = refusal("network={kind: primus, token: 8}", "finetune.patch_size=20")
    assert "finetune.patch_size: a side must be a multiple of 8, the side of a token (primus), got [20, 20, 20]" in text
    assert text.endswith(": 20 = 2 x 8 + 4")
    assert parse(STUDY.read_text(), "demo", ["network=primus", "finetune.patch_size=24"]).finetune.patch_size[0] == 24


def test_a_pretraining_depends_on_what_its_network_reads() -> None:
    """Not on the decoder that only segments; on the kind, the token and the layers."""
    study = small_study()

    def key(network: Network) -> Any:
        return depends.pretraining(study.pretrain, network)

    assert key(UNETR) == key(UNETR.model_copy(update={"feature_size": 8}))
    others = [PRIMUS, *(PRIMUS.model_copy(update=change) for change in ({"token": 4}, {"layers": 3}))]
    assert len({str(key(network)) for network in (UNETR, *others)}) == 4


def test_without_pretraining_there_is_nothing_to_transfer() -> None:
    """Told when the YAML is read; and where weights are given all the same, nothing is copied."""
    rule = "finetune.grid.init: a dynunet is not pretrained here, so that [random] is all that it can start from"
    assert f"{rule}, got ['random', 'pretrained']" in refusal("network=dynunet", "finetune.patch_size=64")
    fitting = ["network=dynunet", "finetune.patch_size=64", "finetune.grid.init=[random]"]
    assert not parse(STUDY.read_text(), "demo", fitting).pretrains
    assert f"{rule}, got ['random'] and finetune.weights" in refusal(
        *fitting, "finetune.weights=a.safetensors", "pretrain.pretrainings=1"
    )
    weights = build_autoencoder(UNETR, CUBE).state_dict()
    with pytest.raises(UserError, match="weights: a DynUNet has no encoder"):
        transfer(weights, build_segmentation(DYNUNET, CUBE, 1, 3), "weights")


def test_levels_fit_the_patch() -> None:
    """With the arithmetic of the halvings, and of what is left at the lowest level."""
    text = refusal("network=dynunet", "finetune.patch_size=48", "finetune.grid.init=[random]")
    assert "a side must be a multiple of 32, 2^5 for 6 levels (dynunet), got [48, 48, 48]: 48 = 1 x 32 + 16" in text
    text = refusal("network=dynunet", "finetune.patch_size=32", "finetune.grid.init=[random]")
    assert "6 levels leave one voxel of [32, 32, 32], too few for instance norm" in text
