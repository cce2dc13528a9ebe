"""What the driver of a pretraining decides before it starts any worker."""

import itertools
import math
from pathlib import Path
from typing import Any

import pytest
from studies import small_study
from tiny_learner import make

from ssl_ray.data.store import Volume
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


def test_a_share_of_the_volumes_is_drawn_by_seed_and_content() -> None:
    """Nested, in the order of the list, whatever that is; which were drawn is in the key."""
    empty: dict[str, Any] = dict.fromkeys(Volume.__dataclass_fields__)
    volumes = [Volume(**{**empty, "key": f"k{n}", "id": f"v{n}", "content": f"c{n}"}) for n in range(20)]

    def recipe(share: float, run: int = 0) -> Recipe:
        return recipe_of(small_study(pretrain={"volumes": share, "pretrainings": 2}, finetune={"runs": 2}), run)

    draws = [driver.draw_volumes(recipe(share), volumes) for share in (0.001, 0.1, 0.5, 1)]
    assert [len(drawn) for drawn in draws] == [1, 2, 10, 20]
    for drawn, larger in itertools.pairwise(draws):
        assert drawn == [volume for volume in volumes if volume in drawn]
        assert all(volume in larger for volume in drawn)
    turned = driver.draw_volumes(recipe(0.5), volumes[::-1])
    assert turned[::-1] == draws[2] != driver.draw_volumes(recipe(0.5, 1), volumes)
    less = [one for one in volumes if one is not draws[2][0]]
    assert pretraining_key(recipe(0.5), volumes, ()) != pretraining_key(recipe(0.5), less, ())


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
    steps = [small_study(pretrain={"steps": 40, "epochs": epochs}) for epochs in (1, 2)]
    assert key(recipe_of(steps[0])) == key(recipe_of(steps[1])) != key(recipes[0]), "the epochs are not read"
    task = {"contrastive": {"enabled": True}}
    contrastive = [small_study(pretrain={"task": task, "workers": number}) for number in (1, 2)]
    assert key(recipe_of(contrastive[0])) != key(recipe_of(contrastive[1])), "negatives are the worker's own patches"
    masked = [small_study(pretrain={"patch_size": 32, "task": {"kind": "masked", "ratio": r}}) for r in (0.5, 0.75)]
    assert len({key(recipe_of(study)) for study in (*masked, small_study(pretrain={"patch_size": 32}))}) == 3
