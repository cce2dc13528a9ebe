"""A short pretraining on real CT against the loop that people write from MONAI's and torch's own parts."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from monai.networks.nets import ViTAutoEnc
from studies import small_study
from volumes import REAL

from ssl_ray.data.datalist import read_datalist
from ssl_ray.data.prepare import prepare_case
from ssl_ray.data.store import Store
from ssl_ray.pretrain.job import Job
from ssl_ray.pretrain.learner import PretrainingLearner
from ssl_ray.pretrain.samples import SampleTable
from ssl_ray.pretrain.stream import Feed
from ssl_ray.pretrain.tasks.restoration.corruption import corrupt, draw
from ssl_ray.storage.mirror import Mirror
from ssl_ray.study.parts import recipe_of

SIDE, STEPS, LR = 32, 12, 1e-3


@pytest.mark.skipif(not (REAL / "open_kbp").exists(), reason="the real volumes are not beside the checkout")
def test_the_loss_curve_is_that_of_monais_modules_in_a_plain_loop(tmp_path: Path) -> None:
    """Same patches, same corruptions, same first weights: twelve steps of the same losses, to float32's rounding."""
    study = small_study(
        tmp_path,
        pretrain={
            "preparation": {"spacing": 4, "hu_window": [-57, 164]},
            "patch_size": SIDE,
            "batch_size": 4,
            "optimizer": {"lr": LR, "clip_norm": 1.0},
        },
    )
    config, store = study.pretrain, Store(tmp_path / "store")
    cases = read_datalist(REAL / "open_kbp", "unlabelled.json", labelled=False).training[:3]
    volumes = [prepare_case(case, config.preparation, store)[0] for case in cases]
    table = SampleTable(3, np.array([one.shape for one in volumes]), config.patch_size, 4, config.batch_size, STEPS)
    keys, ids = (tuple(getattr(one, name) for one in volumes) for name in ("key", "id"))
    feed = Feed(table, store, keys, ids, volumes[0].dtype, volumes[0].levels)
    recipe = replace(recipe_of(study), seed=3)
    ours = PretrainingLearner(Job(recipe, feed, feed, tmp_path, Mirror(tmp_path), "key", None), torch.device("cpu"))  # type: ignore[arg-type]

    width = {"hidden_size": 48, "mlp_dim": 64, "num_heads": 3, "num_layers": 12}
    theirs = ViTAutoEnc(in_channels=1, img_size=(SIDE,) * 3, patch_size=(16,) * 3, proj_type="conv", **width)  # type: ignore[arg-type]
    theirs.load_state_dict(ours.network.state_dict())
    optimizer = torch.optim.Adam(theirs.parameters(), lr=LR)
    losses: list[tuple[float, float]] = []
    for step in range(STEPS):
        indices = np.array(table.rank_samples(step, 0, 1))
        stored = feed.read([table.sample(index) for index in indices])
        clean = torch.from_numpy(stored.astype(np.float32) / volumes[0].levels)[:, None]
        view = corrupt(clean, draw(config.task.corruption, config.patch_size, 3, indices))  # type: ignore[union-attr]
        optimizer.zero_grad()
        loss = torch.nn.L1Loss()(theirs(view)[0], clean)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(theirs.parameters(), 1.0)
        optimizer.step()
        losses.append((float(ours.step(stored, indices, LR)[0]), loss.item()))
    mine, plain = np.array(losses).T
    np.testing.assert_allclose(mine, plain, rtol=1e-5)
    assert plain[-1] < 0.9 * plain[0], "it learns, so that the weights of the two had room to part"
