"""What the driver of a pretraining decides before it starts any worker."""

import math
from pathlib import Path

import pytest
from studies import small_study
from tiny_learner import make

from ssl_ray.pretrain import driver
from ssl_ray.pretrain.driver import pretraining_key
from ssl_ray.pretrain.job import Recipe
from ssl_ray.study.parts import recipe_of
from ssl_ray.training.checkpoint import load_latest, save_latest

BEST = {10: math.inf, 20: 0.5, 30: 0.4, 40: 0.4}
"""The lowest validation loss so far, by the step of the checkpoint: it was found between 20 and 30."""


@pytest.mark.parametrize(
    ("kept", "start"), [((10, 20, 30, 40), 20), ((10, 40), 10), ((30, 40), 0), ((20,), 0), ((10,), 10)]
)
def test_weights_that_were_deleted_are_found_again(
    tmp_path: Path, kept: tuple[int, ...], start: int, capsys: pytest.CaptureFixture[str]
) -> None:
    """Training goes back to before they were found, or to step 0, never on to others under the same key."""
    job = make(tmp_path).job
    for step in kept:
        save_latest(job.folder / "checkpoints", {"step": step, "key": job.key, "best": BEST[step]}, job.mirror, keep=9)
    driver._rewind(job)
    found = load_latest(job.folder / "checkpoints", job.key, job.mirror)
    assert (found["step"] if found else 0) == start
    assert ("was deleted" in capsys.readouterr().out) == (kept != (10,))


def test_weights_that_are_there_change_nothing(tmp_path: Path) -> None:
    """A training that was cut off goes on from its newest checkpoint."""
    job = make(tmp_path).job
    save_latest(job.folder / "checkpoints", {"step": 40, "key": job.key, "best": BEST[40]}, job.mirror)
    job.weights.touch()
    driver._rewind(job)
    found = load_latest(job.folder / "checkpoints", job.key, job.mirror)
    assert found
    assert found["step"] == 40


def test_pretrainings_of_a_study_differ_in_their_seed_alone() -> None:
    """The first has the study's own; each has a key, and what says how it is carried out is in none."""

    def key(recipe: Recipe) -> str:
        return pretraining_key(recipe, (), ())

    study = small_study(pretrain={"pretrainings": 3, "precision": "auto"}, finetune={"runs": 3})
    recipes = [recipe_of(study, number) for number in range(3)]
    assert recipes[0].seed == study.seed
    assert len({recipe.seed for recipe in recipes}) == len({key(recipe) for recipe in recipes}) == 3
    elsewhere = {"precision": "auto", "gpu": True, "workers": 2, "microbatch": 1}
    elsewhere |= {"task": {"contrastive": {"temperature": 1}}}
    assert key(recipe_of(small_study(pretrain=elsewhere))) == key(recipes[0])
    task = {"contrastive": {"enabled": True}}
    contrastive = [small_study(pretrain={"task": task, "workers": number}) for number in (1, 2)]
    assert key(recipe_of(contrastive[0])) != key(recipe_of(contrastive[1])), "negatives are the worker's own patches"
    masked = [small_study(pretrain={"patch_size": 32, "task": {"kind": "masked", "ratio": r}}) for r in (0.5, 0.75)]
    assert len({key(recipe_of(study)) for study in (*masked, small_study(pretrain={"patch_size": 32}))}) == 3
