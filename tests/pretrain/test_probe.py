"""The online probe: regression and rank against references, its patches and its time; nothing depends on it."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.linear_model import Ridge
from sklearn.metrics import r2_score
from studies import small_study
from tiny_learner import LEVELS, SIDE, make, same, steps, weights
from torch import Tensor
from volumes import organ_labels

from ssl_ray.config import depends
from ssl_ray.data.store import Store, Volume, foreground_index
from ssl_ray.networks.registry import build_encoder
from ssl_ray.pretrain import probe as probing
from ssl_ray.pretrain.job import Labelled
from ssl_ray.pretrain.learner import PretrainingLearner
from ssl_ray.pretrain.probe import Probe, effective_rank, organ_shares, ridge_r2

SHAPE, CLASSES = (40, 36, 30), 4


def r2(*parts: tuple[Tensor, Tensor]) -> float:
    """Of three parts, each tokens and shares."""
    rows = [torch.cat([torch.ones(len(tokens), 1), tokens, shares], 1).double() for tokens, shares in parts]
    return ridge_r2(torch.stack([part.T @ part for part in rows]), parts[0][1].shape[1])


def drawn(count: int, hidden: int, organs: int, noise: float, seed: int) -> tuple[Tensor, Tensor]:
    """Shares that depend on some directions of the tokens, which scatter in few directions and lie far from 0."""
    mixing = torch.randn(hidden, hidden, generator=torch.Generator().manual_seed(1)) * torch.logspace(0, -3, hidden)
    weights = torch.randn(hidden, organs, generator=torch.Generator().manual_seed(2))
    random = torch.Generator().manual_seed(seed)
    tokens = torch.randn(count, hidden, generator=random) @ mixing.T + 3
    shares = tokens @ weights + noise * torch.randn(count, organs, generator=random) * torch.logspace(0, 1, organs)
    return tokens, shares


@pytest.mark.parametrize(("count", "noise"), [(400, 1.0), (400, 0.01), (30, 1.0), (12, 5.0)])
def test_the_regression_is_that_of_scikit_learn(count: int, noise: float) -> None:
    """R² of `Ridge` with the penalty that leaves the least error between the fitted parts, in units of their spread."""
    parts = [drawn(size, 20, 3, noise, seed) for seed, size in enumerate((count, count + 3, 200))]
    first, second, tested = [(tokens.double().numpy(), shares.double().numpy()) for tokens, shares in parts]
    whole = tuple(np.concatenate(pair) for pair in zip(first, second, strict=True))
    units = 1 / whole[1].std(0)

    def fitted(part: tuple[np.ndarray, ...], penalty: float) -> Ridge:
        return Ridge(alpha=len(part[0]) * penalty * part[0].var(0).mean()).fit(part[0], part[1] * units)

    def error(penalty: float) -> float:
        pairs = (first, second), (second, first)
        return sum(((fitted(a, penalty).predict(b[0]) - b[1] * units) ** 2).sum() for a, b in pairs)

    best = min(probing._PENALTIES, key=error)
    predicted = fitted(whole, best).predict(tested[0])
    expected = r2_score(tested[1] * units, predicted, multioutput="variance_weighted")
    assert r2(*parts) == pytest.approx(expected, rel=1e-4, abs=1e-5)


def test_an_organ_that_is_in_no_fitted_volume_does_not_count() -> None:
    """Without any organ, fitted or tested, there is no number."""
    parts = [drawn(100, 8, 2, 0.1, seed) for seed in range(3)]
    expected = r2(*((tokens, shares[:, :1]) for tokens, shares in parts))
    for _, shares in parts[:2]:
        shares[:, 1] = 0
    assert r2(*parts) == pytest.approx(expected)
    nothing = [(tokens, 0 * shares) for tokens, shares in parts]
    assert np.isnan(r2(*nothing))
    assert np.isnan(r2(*parts[:2], nothing[2]))


def test_tokens_that_are_all_alike_explain_nothing() -> None:
    """A collapsed encoder: the mean of the fitted tokens is all that can be said."""
    parts = [(torch.ones(100, 8), drawn(100, 8, 2, 0.1, seed)[1]) for seed in range(3)]
    assert -0.2 < r2(*parts) <= 0


def test_tokens_by_chance_are_not_held_against_the_encoder() -> None:
    """As many dimensions as tokens, and nothing in them: a large penalty is chosen, and R² stays near 0."""
    randoms = [torch.Generator().manual_seed(seed) for seed in range(3)]
    parts = [(torch.randn(60, 50, generator=one), torch.randn(60, 2, generator=one)) for one in randoms]
    assert -0.2 < r2(*parts) < 0.1


def test_the_rank_is_the_entropy_of_the_singular_values() -> None:
    """Against the singular values themselves; at its least and at its most."""
    tokens, _ = drawn(300, 20, 1, 1, 8)
    share = torch.linalg.svdvals(tokens.double())
    share = share / share.sum() + 1e-7
    expected = float(torch.exp(-(share * share.log()).sum()))
    assert effective_rank(tokens.double().T @ tokens.double()) == pytest.approx(expected, rel=1e-4)
    assert effective_rank(torch.eye(20).double()) == pytest.approx(20, rel=1e-4)
    assert effective_rank(torch.ones(20, 20).double()) == pytest.approx(1, abs=1e-3)


def test_shares_are_in_the_order_of_the_tokens() -> None:
    """The encoder's own embedding, made to average the voxels of a token, gives the shares of a label of 0 and 1."""
    side = (32, 48, 16)
    encoder = build_encoder(small_study().network, side)
    label = np.random.default_rng(0).integers(0, 2, side) * np.arange(32)[:, None, None] // 16
    for name, weight in encoder.patch_embedding.named_parameters():
        weight.data.fill_(1 / 16**3 if name.endswith("patch_embeddings.weight") else 0)
    embedded = encoder.embed(torch.from_numpy(label.astype(np.float32))[None, None])
    shares = organ_shares(label.astype(np.uint8), encoder.token, 3)
    assert shares.shape == (6, 2)
    torch.testing.assert_close(shares[:, 0], embedded[0, :, 0].detach(), rtol=1e-4, atol=1e-6)
    assert not shares[:, 1].any()


@pytest.fixture
def labelled(tmp_path: Path) -> Labelled:
    """Five volumes whose intensities show their organs; the last has none, and is shorter than a patch."""
    stored, store = [], Store(tmp_path)
    for number in range(5):
        shape = SHAPE if number < 4 else (10, 36, 30)
        label = organ_labels(shape, CLASSES, number) if number < 4 else np.zeros(shape, np.uint8)
        noise = np.random.default_rng(number).integers(0, 20, shape)
        image = (label.astype(np.int64) * 60 + noise).astype(np.uint8)
        folder = store.path(f"labelled{number}")
        folder.mkdir(parents=True)
        for name, array in {"image": image, "label": label, "foreground": foreground_index(label)}.items():
            np.save(folder / f"{name}.npy", array)
        empty: dict[str, Any] = dict.fromkeys(Volume.__dataclass_fields__)
        stored.append(Volume(**{**empty, "key": f"labelled{number}", "id": f"l{number}", "shape": shape}))
    return Labelled((*stored[:2], stored[4]), tuple(stored[2:4]), CLASSES)


@pytest.fixture
def learner(tmp_path: Path) -> PretrainingLearner:
    return make(tmp_path)


def test_it_says_what_an_encoder_knows_and_leaves_no_trace(learner: PretrainingLearner, labelled: Labelled) -> None:
    """The same numbers twice; weights, moments, random numbers and mode of training stay."""
    steps(learner, 0, 1)
    probe, before, moments = Probe(learner, labelled), weights(learner), learner.state()
    random = torch.get_rng_state()
    found = probe.measure()
    assert found == probe.measure()
    assert set(found) == {"probe_r2", "probe_rank"}
    assert -np.inf < found["probe_r2"] <= 1
    assert 1 <= found["probe_rank"] <= learner.network.hidden_size
    assert same(before, weights(learner))
    assert same(moments, learner.state())
    assert torch.equal(random, torch.get_rng_state())
    assert learner.model.training
    assert all(weight.grad is None for weight in learner.network.parameters())


def test_tokens_that_hold_the_organs_are_seen_to(
    learner: PretrainingLearner, labelled: Labelled, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An encoder whose tokens are some voxels' means, in images that show the organs, explains most of the shares."""
    probe = Probe(learner, labelled)
    blind = probe.measure()["probe_r2"]

    def means(patches: Tensor) -> Tensor:
        """(B, 1, 16, 16, 16) -> (B, 1, hidden): the share of voxels near each organ's intensity."""
        near = [((patches - 60 * organ / LEVELS).abs() < 25 / LEVELS).float().mean((1, 2, 3, 4)) for organ in range(4)]
        return torch.stack(near * (learner.network.hidden_size // 4), 1)[:, None]

    monkeypatch.setattr(learner.task, "tokens", means)
    assert probe.measure()["probe_r2"] > max(0.95, blind)


@pytest.mark.parametrize("world", [2, 3, 5])
def test_workers_add_up_to_one(learner: PretrainingLearner, labelled: Labelled, world: int) -> None:
    """Each takes its part of the patches; none is counted twice or lost, though some worker may have none left."""
    probe = Probe(learner, labelled)
    for part in (slice(12), slice(12, 20), slice(18, 20)):
        samples, found = probe._samples[part], []
        for place in [(0, 1), *((rank, world) for rank in range(world))]:
            learner.rank, learner.world = place
            found.append(probe._products(samples, probe._shares[part]))
        whole, parts = found[0], torch.stack(found[1:]).sum(0)
        assert whole[0, 0] == len(samples)
        torch.testing.assert_close(parts, whole, rtol=1e-4, atol=1e-4)


def test_patches_lie_around_labelled_voxels(learner: PretrainingLearner, labelled: Labelled) -> None:
    """Inside their volumes, four of each, most of them with an organ, the same in every run."""
    probe = Probe(learner, labelled)
    volumes = (*labelled.fitted, *labelled.tested)
    assert [sample.volume for sample in probe._samples] == [number // 4 for number in range(20)]
    for sample in probe._samples:
        room = np.maximum(np.array(volumes[sample.volume].shape) - SIDE, 0)
        assert (np.array(sample.origin) >= 0).all()
        assert (np.array(sample.origin) <= room).all()
    shown = probe._shares.sum((1, 2)) > 0
    assert shown.sum() == 16
    assert not shown[8:12].any(), "the volume without an organ"
    assert probe._samples == Probe(learner, labelled)._samples


def test_it_waits_until_there_is_time(
    learner: PretrainingLearner, labelled: Labelled, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the next one, all of it takes at most 3 % of the time so far."""
    now = [0.0]
    monkeypatch.setattr(probing, "time", SimpleNamespace(monotonic=lambda: now[0]))
    probe = Probe(learner, labelled)
    assert probe.due
    tokens = learner.task.tokens

    def slow(patches: Tensor) -> Tensor:
        now[0] += 0.5
        return tokens(patches)

    monkeypatch.setattr(learner.task, "tokens", slow)
    probe.measure()
    spent = now[0]
    assert spent > 0
    assert not probe.due
    now[0] = 2 * spent / 0.03 * 1.01
    assert probe.due
    probe.measure()
    assert not probe.due


def test_no_key_depends_on_it() -> None:
    """It may be switched on or off before a pretraining goes on."""
    on, off = (small_study(pretrain={"probe": value}) for value in (True, False))
    assert depends.pretraining(on.pretrain, on.network) == depends.pretraining(off.pretrain, off.network)
