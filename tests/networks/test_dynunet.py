"""The DynUNet is MONAI's, with every tensor once, and trained with deep supervision as nnU-Net is."""

from typing import Any

import pytest
import torch
from monai.losses import DiceCELoss
from monai.networks.nets import DynUNet
from safetensors.torch import load, save
from studies import small_study

from ssl_ray.finetune.learner import SegmentationLearner
from ssl_ray.networks.dynunet.settings import DynUnet
from ssl_ray.networks.registry import build_segmentation

FILTERS = (4, 8, 12, 16, 16)


def build(**settings: Any) -> Any:
    torch.manual_seed(0)
    return build_segmentation(DynUnet(filters=FILTERS, **settings), (32, 32, 32), 2, 3)


@pytest.mark.parametrize("residual", [True, False])
@pytest.mark.parametrize("supervised", [True, False])
def test_it_is_monais(residual: bool, supervised: bool) -> None:
    """With the same seed the same outputs, in training and in evaluation."""
    ours = build(residual=residual, deep_supervision=supervised)
    torch.manual_seed(0)
    theirs = DynUNet(3, 2, 3, [3] * 5, [1, 2, 2, 2, 2], [2] * 4, FILTERS, res_block=residual,
                     deep_supervision=supervised, deep_supr_num=2)  # fmt: skip
    x = torch.rand(1, 2, 32, 32, 32)
    assert torch.equal(ours(x), theirs(x))
    assert ours(x).shape == ((1, 3, 3, 32, 32, 32) if supervised else (1, 3, 32, 32, 32))
    assert torch.equal(ours.eval()(x), theirs.eval()(x))
    assert ours(x).shape == (1, 3, 32, 32, 32)


def test_a_file_of_weights_has_every_tensor_once() -> None:
    """Safetensors refuses tensors under two names; what it gives back is the same network."""
    network, other = build(), build()
    state = network.state_dict()
    assert sum(value.numel() for value in state.values()) == sum(value.numel() for value in network.parameters())
    with torch.no_grad():
        for value in other.parameters():
            value.zero_()
    other.load_state_dict(load(save(state)))
    x = torch.rand(1, 2, 32, 32, 32)
    assert torch.equal(network.eval()(x), other.eval()(x))


def test_the_loss_of_a_level_is_half_that_of_the_one_above() -> None:
    """Their sum by weights 1, 1/2 and 1/4, each level on the grid of voxels."""
    config = small_study(finetune={"cohort": {"classes": 3}, "patch_size": 32}).finetune
    learner = SegmentationLearner(config, DynUnet(filters=FILTERS), torch.device("cpu"), 0)
    images, labels = torch.rand(1, 1, 32, 32, 32), torch.randint(3, (1, 1, 32, 32, 32), dtype=torch.uint8)
    loss = DiceCELoss(to_onehot_y=True, softmax=True)
    with torch.no_grad():
        first, second, third = learner.network(images).unbind(1)
        expected = loss(first, labels) + loss(second, labels) / 2 + loss(third, labels) / 4
        assert float(learner.objective(images, labels)) == pytest.approx(float(expected), rel=1e-6)
    assert learner.predict(torch.rand(1, 40, 33, 20)).shape == (40, 33, 20)
