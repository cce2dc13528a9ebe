"""A study from its volumes to its answer; each step finds out what is done already and does the rest."""

from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING

from ssl_ray.cluster.connect import connect, tell_if_passing
from ssl_ray.config.schema import Preparation, Study
from ssl_ray.console import say
from ssl_ray.errors import UserError
from ssl_ray.storage.folders import Folders
from ssl_ray.study import identity
from ssl_ray.study.cohorts import read_cohorts
from ssl_ray.study.experiment import Step, keep
from ssl_ray.study.live import LivePage
from ssl_ray.study.parts import folders_of, tracker_of

if TYPE_CHECKING:
    from ssl_ray.tracking.tracker import Tracker


def carry_out(study: Study, last: Step, verify: bool = False, fresh: bool = False) -> tuple[str, ...]:
    """Prepare, pretrain, fine-tune, report, as far as the step `last`; return the names of cells that failed for good.

    With `verify`, all sources and stored volumes are read, also those whose times say that they have not changed. With
    `fresh`, what the study has written before is set aside, once all that can be looked at beforehand is right.

    Raises:
        UserError: when something else was begun under the study's name, when MLflow does not answer, and for what is
            wrong with its places, datalists, volumes or weights.
    """
    folders = check_places(study, fresh)
    if last == "pretrain" and not study.needs_weights:
        raise UserError("finetune.grid.init: this study trains only from random weights")
    cohorts = read_cohorts(study)
    _check_weights(study)
    if fresh and (kept := identity.set_aside(study, folders)):
        say(f"the old study is kept: {kept}")
    with LivePage(study, folders) if last == "report" else nullcontext() as page:
        with ThreadPoolExecutor(1) as pool:  # Ray's processes take three seconds to start, and so does this
            tracker = pool.submit(_meanwhile, study, last)
            connect(study.cluster)
        keep(study, folders)

        from ssl_ray.study.stages import carry_out_stages

        failed = carry_out_stages(study, folders, cohorts, tracker.result(), last, verify)
        if page:
            from ssl_ray.study.reporting import report

            page.end()
            report(study, folders)
    return failed


def _check_weights(study: Study) -> None:
    """Look at the weights that are given to start from."""
    if study.finetune.weights:
        from ssl_ray.search.grid import check_given  # it loads torch

        for file, prefix in check_given(study.finetune, study.network).items():
            if prefix:
                say(f"{file}: the encoder's keys begin with {prefix!r}; only they are taken, without it")
            _say_preparation(file, study.finetune.preparation)
    elif study.needs_weights and (given := study.pretrain.weights):
        from ssl_ray.pretrain.tasks.registry import check_start  # MONAI takes seconds to load

        whole = check_start(study.pretrain, study.network, given)
        decoder = "its decoder is taken too" if whole else "the decoder is new"
        say(f"pretraining goes on from {given}; {decoder}")
        _say_preparation(given, study.pretrain.preparation)


def _say_preparation(weights: str, preparation: Preparation) -> None:
    """Say where given weights learned from scans that look otherwise; a study may want that, as the recipe does."""
    from ssl_ray.networks.weight_files import prepared_otherwise  # it loads torch

    if differing := prepared_otherwise(Path(weights), preparation):
        say(f"WARNING: {weights} learned from scans that were prepared otherwise: {'; '.join(differing)}")


def _meanwhile(study: Study, last: Step) -> "Tracker | None":
    """Open the study's MLflow experiment, and load what is needed then; Ray is left to the thread that starts it."""
    tracker = None if last == "prepare" else tracker_of(study)
    import_module("torch")
    if last == "report":
        import_module("ssl_ray.study.reporting")
    return tracker


def check_places(study: Study, fresh: bool = False) -> Folders:
    """The study's folders, once they can be written to and hold no study of this name with another configuration.

    Or one that is to be set aside (`fresh`), from whose weights nothing is to start.
    """
    folders = folders_of(study)
    folders.check_writable()
    if fresh:
        for file in filter(None, (*(study.finetune.weights or ()), study.pretrain.weights)):
            if Path(file).resolve().is_relative_to(folders.study.resolve()):
                rule = "--fresh would move these weights away with the old study: copy them elsewhere, or give this"
                raise UserError(f"{file}: {rule} study another name")
    else:
        identity.check_unchanged(study, folders)
    if not folders.output.origin:
        tell_if_passing("the output folder", study.output)
    return folders
