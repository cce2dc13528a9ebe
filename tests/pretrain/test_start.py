"""A pretraining that goes on from weights: strictly, and under a key of its own."""

from pathlib import Path
from typing import Any

import pytest
import torch
from studies import small_study
from tiny_learner import MASKED, make, same, steps, weights

from ssl_ray.errors import UserError
from ssl_ray.networks.registry import build_segmentation
from ssl_ray.networks.transfer import transfer
from ssl_ray.networks.weight_files import describe, export, load_metadata, load_weights
from ssl_ray.pretrain.driver import pretraining_key
from ssl_ray.pretrain.learner import PretrainingLearner
from ssl_ray.pretrain.tasks.registry import start_from
from ssl_ray.study.parts import recipe_of

RESTORATION: dict[str, Any] = {"patch_size": 32}
TASKS = {"restoration": RESTORATION, "masked": MASKED}


def trained(folder: Path, **settings: Any) -> tuple[PretrainingLearner, Path]:
    """A learner after three steps, and its file of weights."""
    folder.mkdir(exist_ok=True)
    made = make(folder, **settings)
    steps(made, 0, 3)
    made._export(3)
    return made, made.job.weights


def encoder(made: PretrainingLearner) -> dict[str, torch.Tensor]:
    state = made.task.encoder.state_dict()
    return {name: value.clone() for name, value in state.items() if not name.startswith("conv3d_transpose")}


@pytest.mark.parametrize("after", TASKS)
@pytest.mark.parametrize("before", TASKS)
def test_it_starts_from_the_encoder_of_any_task_and_from_the_decoder_of_its_own(
    tmp_path: Path, before: str, after: str
) -> None:
    """The decoder of another task stays what the seed gives."""
    source, path = trained(tmp_path / "before", **TASKS[before])
    fresh = make(tmp_path / "fresh", **TASKS[after])
    made = make(tmp_path / "after", **TASKS[after], weights=str(path))
    assert same(encoder(made), encoder(source))
    if before == after:
        assert same(weights(made), weights(source))
    else:
        inside = {id(value) for part in made.task.encoder.parts for value in part.parameters()}
        beside = [name for name, value in made.network.named_parameters() if id(value) not in inside]
        assert beside
        assert all(torch.equal(weights(made)[name], weights(fresh)[name]) for name in beside)
    assert start_from(path, fresh.task) == (before == after)


def test_what_was_masked_goes_into_a_segmentation_network(tmp_path: Path) -> None:
    """The encoder, complete, by its name in the file; the decoder is left."""
    source, path = trained(tmp_path, **MASKED)
    unetr = build_segmentation(source.job.recipe.network, (32, 32, 32), 1, 3)
    report = transfer(load_weights(path), unetr, str(path), load_metadata(path))
    assert (report.prefix, report.share, report.interpolated) == ("encoder.", 1, ())
    assert same(dict(unetr.vit.state_dict()), encoder(source))
    assert load_metadata(path)["task"] == "masked"


def test_a_file_of_the_tutorial_is_taken_whole(tmp_path: Path) -> None:
    """As its script saves it: a torch file, the names those of DDP, no metadata."""
    source, _ = trained(tmp_path, **RESTORATION)
    path = tmp_path / "tutorial.pt"
    torch.save({"epoch": 1, "state_dict": {f"module.{name}": value for name, value in weights(source).items()}}, path)
    assert same(weights(make(tmp_path / "after", **RESTORATION, weights=str(path))), weights(source))


def test_a_file_that_does_not_match_is_refused_and_nothing_is_changed(tmp_path: Path) -> None:
    """A block missing, NaN, another width: the line names the file and the cause."""
    source, path = trained(tmp_path, **RESTORATION)
    made, network = make(tmp_path / "after", **MASKED), source.job.recipe.network
    before = weights(made)
    good, facts = load_weights(path), describe(network, (32, 32, 32))
    wrong = {
        "missing": {name: value for name, value in good.items() if not name.startswith("blocks.7.")},
        "NaN or infinite": good | {"norm.weight": good["norm.weight"] * torch.nan},
        "of another shape": good | {"norm.weight": torch.ones(96)},
    }
    for cause, state in wrong.items():
        export(tmp_path / "wrong.safetensors", state, facts)
        with pytest.raises(UserError, match=rf"wrong\.safetensors: .*{cause}"):
            start_from(tmp_path / "wrong.safetensors", made.task)
        assert same(weights(made), before)
    with pytest.raises(UserError, match=r"nowhere\.pt: cannot read the weights"):
        start_from(tmp_path / "nowhere.pt", source.task)


def test_the_content_of_the_file_counts_and_its_place_does_not(tmp_path: Path) -> None:
    """The key is another one with weights, with other weights, and the same where they lie elsewhere."""

    def key(weights: Path | None = None) -> str:
        return pretraining_key(recipe_of(small_study(pretrain={"weights": weights and str(weights)})), (), ())

    one, moved, other = (tmp_path / name for name in ("one.pt", "moved.pt", "other.pt"))
    one.write_bytes(b"weights")
    moved.write_bytes(b"weights")
    other.write_bytes(b"others")
    assert key(one) == key(moved)
    assert len({key(), key(one), key(other)}) == 3
    assert recipe_of(small_study(pretrain={"weights": "here.pt"})).weights == Path("here.pt").absolute()
