"""How fine-tuning treats the encoder: frozen or not, slower in lower blocks, permuted as a control."""

from pathlib import Path
from typing import Any

import pytest
import torch
from studies import small_study
from torch import Tensor

from ssl_ray.finetune.learner import SegmentationLearner, layer_scales
from ssl_ray.networks.registry import build_autoencoder
from ssl_ray.networks.weight_files import describe, export

CPU = torch.device("cpu")
LR = 1e-3


def make(seed: int = 0, weights: Path | None = None, permuted: bool = False, **encoder: Any) -> SegmentationLearner:
    """A tiny UNETR on patches of 16³, without weight decay."""
    study = small_study(finetune={"cohort": {"classes": 3}, "optimizer": {"weight_decay": 0}, "encoder": encoder})
    return SegmentationLearner(study.finetune, study.network, CPU, seed, weights, permuted)


def weights_of(made: SegmentationLearner) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in made.network.named_parameters()}


def run(made: SegmentationLearner, steps: range) -> None:
    """Steps on patches that depend on the step alone."""
    for step in steps:
        random = torch.Generator().manual_seed(step)
        images = torch.rand(2, 1, 16, 16, 16, generator=random)
        labels = torch.randint(3, images.shape, generator=random, dtype=torch.uint8)
        made.thaw(step)
        made.step(images, labels, LR)


def moved(before: dict[str, Tensor], after: dict[str, Tensor]) -> set[str]:
    return {name for name, value in after.items() if not torch.equal(value, before[name])}


def scale_of_mae(name: str, blocks: int, decay: float) -> float:
    """`param_groups_lrd` of MAE's util/lr_decay.py, whose names begin alike."""
    layers = blocks + 1
    if name.startswith("patch_embed"):
        layer = 0
    elif name.startswith("blocks"):
        layer = int(name.split(".")[1]) + 1
    else:
        layer = layers
    return decay ** (layers - layer)


def test_layer_decay_is_that_of_mae() -> None:
    """Of every weight of the ViT; the decoder is in no scale, and without decay all are 1."""
    made = make(layer_decay=0.75)
    vit = made.network.encoder
    scales = layer_scales(vit, 0.75)
    for name, weight in vit.named_parameters():
        assert scales[weight] == pytest.approx(scale_of_mae(name, len(vit.blocks), 0.75)), name
    assert len(scales) == len(list(vit.parameters()))
    assert set(layer_scales(vit, 1.0).values()) == {1.0}
    (only,) = make().optimizer.param_groups
    assert "lr_scale" not in only, "the recipe's optimizer is the one that it was"


def test_a_step_is_as_long_as_its_layer_says() -> None:
    """Adam's first step moves a weight by its learning rate, whatever its gradient: the rate times the layer's scale.

    A scheduled rate scales all layers alike.
    """
    made = make(layer_decay=0.5)
    before = weights_of(made)
    run(made, range(1))
    after = weights_of(made)
    blocks = len(made.network.encoder.blocks)
    for name in moved(before, after):
        scale = scale_of_mae(name.removeprefix("vit."), blocks, 0.5) if name.startswith("vit.") else 1.0
        longest = float((after[name] - before[name]).abs().max())
        assert longest <= LR * scale * 1.001 + 1.2e-7, name  # as 1 + lr rounds
        if name.startswith("vit.blocks") and name.endswith("linear1.weight"):
            assert longest == pytest.approx(LR * scale, rel=0.05, abs=2e-8), name
    rates = {group["lr"] for group in made.optimizer.param_groups}
    assert max(rates) == LR
    assert min(rates) == pytest.approx(LR * 0.5 ** (blocks + 1))


def test_a_frozen_encoder_stays_as_it_is() -> None:
    """The decoder learns; no moment is kept of the encoder."""
    made = make(freeze="all")
    before = weights_of(made)
    run(made, range(2))
    changed = moved(before, weights_of(made))
    assert changed
    assert not any(name.startswith("vit.") for name in changed)
    assert len(made.optimizer.state) == sum(not name.startswith("vit.") for name in before)


def test_an_encoder_frozen_for_some_steps_is_trained_from_then_on() -> None:
    """Until then all is as with a frozen one; then it moves, but for what no loss reaches, as if Adam began."""
    some, never, always = make(freeze=2, layer_decay=0.5), make(freeze="all"), make()
    idle = {name for name, weight in always.network.named_parameters() if not weight.requires_grad}
    before = weights_of(some)
    run(some, range(2))
    run(never, range(2))
    assert not moved(weights_of(some), weights_of(never))
    run(some, range(2, 3))
    changed = moved(before, weights_of(some))
    assert {name for name in before if name.startswith("vit.")} - idle <= changed
    assert not changed & idle
    begun = {float(state["step"]) for state in some.optimizer.state.values()}
    assert begun == {1.0, 3.0}


@pytest.fixture
def pretrained(tmp_path: Path) -> Path:
    """Weights of an autoencoder of its own seed."""
    study, path = small_study(), tmp_path / "weights.safetensors"
    torch.manual_seed(99)
    autoencoder = build_autoencoder(study.network, (16, 16, 16))
    export(path, autoencoder.state_dict(), describe(study.network, (16, 16, 16)))
    return path


def test_permuted_weights_are_the_pretrained_ones_in_another_order(pretrained: Path) -> None:
    """Tensor by tensor the same numbers; by seed; the decoder is that of the other arms."""
    random, kept = weights_of(make()), weights_of(make(weights=pretrained))
    control, again = (weights_of(make(weights=pretrained, permuted=True)) for _ in range(2))
    other = weights_of(make(1, pretrained, permuted=True))
    assert not moved(control, again)
    for name, value in control.items():
        if not name.startswith("vit."):
            assert torch.equal(value, random[name]), name
            continue
        assert torch.equal(value.flatten().sort().values, kept[name].flatten().sort().values), name
        if kept[name].flatten().unique().numel() > 10:
            assert not torch.equal(value, kept[name]), name
            assert not torch.equal(value, other[name]), name
