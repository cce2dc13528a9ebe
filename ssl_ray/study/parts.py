"""What the rooms below get of a study: its folders, its MLflow experiment, the parameters of its runs."""

from pathlib import Path
from typing import TYPE_CHECKING

from ssl_ray.config.loading import flatten
from ssl_ray.config.schema import Study
from ssl_ray.pretrain.job import Recipe
from ssl_ray.random import run_seed
from ssl_ray.storage.folders import Folders
from ssl_ray.tracking.uri import tracking_uri

if TYPE_CHECKING:
    from ssl_ray.tracking.tracker import Tracker


def folders_of(study: Study) -> Folders:
    """Where the study keeps what it writes; a UserError where it cannot be kept there, MLflow's runs included."""
    folders = Folders.of(study.name, study.output, study.cache, study.scratch)
    tracking_uri(study.tracking, folders)
    return folders


def tracker_of(study: Study, create: bool = True) -> "Tracker":
    """The study's MLflow experiment; made where it is missing, unless `create` is False."""
    from ssl_ray.tracking.tracker import Tracker  # it loads MLflow, which nobody needs who asks only for folders

    return Tracker(study.tracking, folders_of(study), create)


def recipe_of(study: Study, number: int = 0) -> Recipe:
    """What the weights of a pretraining of the study depend on, beside the volumes."""
    given = study.pretrain.weights
    weights = Path(given).absolute() if given else None  # workers have another working directory
    return Recipe(study.pretrain, study.network, run_seed(study.seed, "pretrain", number), weights)


def run_params(study: Study, section: str) -> dict[str, str]:
    """Flat parameters for the MLflow runs of one section (`pretrain`, `finetune`): the same names in all of them."""
    flat = flatten(study)
    return {key: value for key, value in flat.items() if key.partition(".")[0] in ("seed", "network", section)}
