"""Two workers outside Ray: FSDP2 computes what DDP and one process do, and all of them write and read one state."""

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny_learner import BATCH, LEVELS, MASKED_PRIMUS, SIDE, make, same
from torch import Tensor, distributed
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from ssl_ray.networks.weight_files import load_weights
from ssl_ray.pretrain.learner import PretrainingLearner
from ssl_ray.pretrain.samples import SampleTable
from ssl_ray.pretrain.stream import Feed
from ssl_ray.training.nonfinite import Watch

pytestmark = pytest.mark.slow

WORLD = 2
SETTINGS: dict[str, dict[str, Any]] = {
    "clipped": {"optimizer": {"name": "adamw", "weight_decay": 0.1, "clip_norm": 0.01}},
    # Three passes of one patch, of which the second rank has but two.
    "accumulated": {"batch_size": 5, "microbatch": 1},
    "contrastive": {"task": {"contrastive": {"enabled": True}}, "workers": WORLD},
    "bfloat16": {"precision": "bfloat16"},
    "masked": MASKED_PRIMUS,
}


class Blobs(Feed):
    """Validation patches that no file is needed for."""

    def read(self, samples: Any) -> Any:
        return np.stack([batch(sample.volume, 1)[0] for sample in samples])


def batch(seed: int, size: int) -> Any:
    return np.random.default_rng(seed).integers(0, LEVELS + 1, (size,) + (SIDE,) * 3, dtype=np.uint8)


def train(made: PretrainingLearner, first: int, last: int, rank: int = 0, world: int = 1) -> list[tuple[float, float]]:
    """Loss of the whole batch and gradient norm of the steps [first, last)."""
    size, found = made.config.batch_size, []
    for step in range(first, last):
        mine = SampleTable(0, np.array([[32] * 3]), (SIDE,) * 3, 2, size, 1).rank_samples(step, rank, world)
        images = batch(step, size)[mine.start - step * size : mine.stop - step * size]
        loss, norm = made.step(images, np.arange(mine.start, mine.stop), 1e-3 / (1 + step))
        loss = loss * len(mine) / size
        if world > 1:
            distributed.all_reduce(loss)
        found.append((float(loss), float(norm)))
    return found


def validating(made: PretrainingLearner) -> PretrainingLearner:
    """With three validation patches: the second of two ranks has one less."""
    table = SampleTable(0, np.array([[32] * 3] * 3), (SIDE,) * 3, 1, BATCH, 1)
    made.job = replace(made.job, validation=Blobs(table, Path(), ("a",) * 3, ("a",) * 3, "uint8", LEVELS))
    return made


def work(rank: int, folder: Path) -> None:
    """One of two workers: everything that the tests look at, in one go, since starting them takes seconds."""
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", f"file://{folder / 'store'}", rank=rank, world_size=WORLD)
    found: dict[Any, Any] = {}
    for kind, shard in {"ddp": False, "fsdp": True}.items():
        for name, settings in SETTINGS.items():
            made = make(folder, shard=shard, **settings)
            found[kind, name] = train(made, 0, 3, rank, WORLD), made.state()
            if name == "masked":
                found[kind, "masked validation"] = validating(made).validate(3, picture=False)
        whole = make(folder, shard=shard)
        train(whole, 0, 3, rank, WORLD)
        if (state := whole.state()) and rank == 0:
            torch.save(state, folder / kind / "state.pt")
        distributed.barrier()
        found[kind, "end"] = train(whole, 3, 6, rank, WORLD), whole.state()
    for kind, shard in {"ddp": False, "fsdp": True}.items():
        for origin in ("ddp", "fsdp", "one"):
            made = make(folder, shard=shard)
            state = torch.load(folder / origin / "state.pt")
            made.load(state if rank == 0 else {"best": state["best"]})
            found[kind, "from", origin] = copy.deepcopy(made.state())
            if origin == kind:
                found[kind, "resumed"] = train(made, 3, 6, rank, WORLD), made.state()

        made = validating(make(folder / kind, shard=shard, microbatch=1))
        train(made, 0, 2, rank, WORLD)
        found[kind, "validation"] = made.validate(2, picture=False)
        with torch.no_grad():  # as the probe asks for them
            found[kind, "tokens"] = made.task.tokens(torch.from_numpy(batch(7, 2))[:, None] / LEVELS)
        if isinstance(made.model, FSDPModule):
            made.model.reshard()
        assert all(isinstance(weight, DTensor) == shard for weight in made.network.parameters()), "freed again"
        found[kind, "best"] = copy.deepcopy(made.state()["model"]), train(made, 2, 3, rank, WORLD)

        made, other = make(folder, shard=shard), make(folder, shard=shard)
        train(made, 0, 2, rank, WORLD), train(other, 0, 2, rank, WORLD)
        before = copy.deepcopy(made.state())
        watch = Watch("skip", 10)
        poisoned = lambda *call: call[-1] * (torch.nan if rank == 1 else 1)  # noqa: E731
        handle = made.network.patch_embedding.register_forward_hook(poisoned)
        loss, norm = made.step(batch(2, 2), np.arange(2), 1e-3)
        handle.remove()
        after = copy.deepcopy(made.state())
        ends = [train(one, 2, 4, rank, WORLD) for one in (made, other)]
        found[kind, "skipped"] = float(loss), watch.look(2, loss, norm) is not None, before, after, ends

    moments = [value for values in made.optimizer.state.values() for value in values.values() if value.ndim]
    found["local"] = [sum(value.to_local().numel() for value in kind) for kind in (made.network.parameters(), moments)]
    torch.save(found, folder / f"rank{rank}.pt")
    distributed.destroy_process_group()


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> list[dict[Any, Any]]:
    """What each of two workers found, one of whose states to go on from is this process's."""
    folder = tmp_path_factory.mktemp("workers")
    for name in ("ddp", "fsdp", "one"):
        (folder / name).mkdir()
    made = make(folder)
    train(made, 0, 3)
    torch.save(made.state(), folder / "one" / "state.pt")
    torch.multiprocessing.spawn(work, (folder,), nprocs=WORLD)
    ranks = [torch.load(folder / f"rank{rank}.pt", weights_only=False) for rank in range(WORLD)]
    ranks[0]["folder"] = folder
    return ranks


def assert_close(one: dict[str, Tensor], other: dict[str, Tensor], atol: float) -> None:
    assert one.keys() == other.keys()
    for name, value in other.items():
        assert torch.allclose(one[name], value, rtol=0, atol=atol), name


@pytest.mark.parametrize("name", SETTINGS)
def test_sharded_steps_are_those_of_ddp_and_of_one_process(found: Any, tmp_path: Path, name: str) -> None:
    """Losses and gradient norms to 1e-5, weights to 1e-6 after three steps: with FSDP as with DDP, in bfloat16 too.

    One process adds up in another order: weights to 1e-5 of its; in bfloat16 all to 1e-2.
    """
    settings, (steps, state) = SETTINGS[name], found[0]["fsdp", name]
    ddp_steps, ddp = found[0]["ddp", name]
    np.testing.assert_allclose(steps, ddp_steps, rtol=1e-5)
    assert_close(state["model"], ddp["model"], atol=1e-6)
    if name != "contrastive":  # its negatives are a worker's own
        one = make(tmp_path, **settings)
        rounding = 1e-2 if name == "bfloat16" else 1e-5
        np.testing.assert_allclose(steps, train(one, 0, 3), rtol=rounding)
        assert_close(state["model"], one.state()["model"], atol=rounding)


@pytest.mark.parametrize("origin", ["ddp", "fsdp", "one"])
@pytest.mark.parametrize("kind", ["ddp", "fsdp", "one"])
def test_a_state_goes_from_any_to_any(found: Any, tmp_path: Path, origin: str, kind: str) -> None:
    """What DDP, FSDP or one process saved and another one has loaded is, saved again, the same to the bit."""
    state = torch.load(found[0]["folder"] / origin / "state.pt")
    if kind == "one":
        made = make(tmp_path)
        made.load(copy.deepcopy(state))
        assert same(made.state(), state)
    else:
        assert same(found[0][kind, "from", origin], state)


@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_a_resumed_run_goes_on_bit_by_bit(found: Any, kind: str) -> None:
    """Six steps in one go, or three and, from their state, three more: the same losses and the same state."""
    assert found[0][kind, "resumed"][0] == found[0][kind, "end"][0]
    assert same(found[0][kind, "resumed"][1], found[0][kind, "end"][1])


@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_a_loss_that_is_not_finite_on_one_rank_skips_the_step_on_all(found: Any, kind: str) -> None:
    """Both see it, though the loss of one is finite; weights and moments stay to the bit, and the next step is as if it
    had not been."""
    for rank in range(WORLD):
        loss, noticed, before, after, (made, other) = found[rank][kind, "skipped"]
        assert np.isfinite(loss) == (rank == 0)
        assert noticed
        assert same(after["model"], before["model"])
        assert same(after["optimizer"].get("state"), before["optimizer"].get("state"))  # FSDP: rank 0 has all
        assert made == other


def test_the_weights_that_did_best_are_exported_whole(found: Any) -> None:
    """A validation where a rank has a patch less ends and exports what a checkpoint has; training goes on after it and
    after a look at the tokens."""
    for kind in ("ddp", "fsdp"):
        model, _ = found[0][kind, "best"]
        assert same(load_weights(found[0]["folder"] / kind / "best.safetensors"), model)
        assert found[0][kind, "validation"] == found[1][kind, "validation"]
    for name in ("validation", "masked validation"):
        assert found[0]["fsdp", name] == found[1]["fsdp", name] == pytest.approx(found[0]["ddp", name], rel=1e-5)
    torch.testing.assert_close(found[0]["fsdp", "tokens"], found[0]["ddp", "tokens"], rtol=0, atol=1e-5)
    np.testing.assert_allclose(found[0]["fsdp", "best"][1], found[0]["ddp", "best"][1], rtol=1e-5)


def test_each_worker_holds_its_share(found: Any, tmp_path: Path) -> None:
    """Of weights and of the optimizer's moments, all workers together hold one copy."""
    made = make(tmp_path)
    everything = list(made.network.parameters())
    weights = sum(parameter.numel() for parameter in everything)
    moments = 2 * sum(parameter.numel() for parameter in everything if parameter.requires_grad)
    assert sum(rank["local"][0] for rank in found) == weights
    assert sum(rank["local"][1] for rank in found) == moments
    for rank in found:
        assert rank["local"][0] < 0.6 * weights
