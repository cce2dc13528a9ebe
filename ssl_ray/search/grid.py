"""Ray Tune over the cells of the fine-tuning grid: labelled split x initialisation x learning rate x seed."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ray import tune

from ssl_ray.cluster.resources import check_resources
from ssl_ray.config.schema import Finetune, Network
from ssl_ray.console import Bar
from ssl_ray.networks.weight_files import load_metadata, load_weights
from ssl_ray.search.callbacks import TrialCallback
from ssl_ray.search.cells import BAD_VOLUMES, CELLS, Cell
from ssl_ray.search.job import GridJob
from ssl_ray.tracking.tracker import Run, Tracker


@dataclass(frozen=True)
class GridResult:
    """The grid's MLflow run, how many cells were trained now or before, and which failed for good."""

    run_id: str
    trained: int
    finished: int
    failed: tuple[str, ...]


def check_transfer(config: Finetune, network: Network, weights: Path) -> dict[str, Any]:
    """The report of a weight transfer into the UNETR of a fine-tuning, before any trial starts.

    Raises:
        UserError: when anything of the encoder does not match.
    """
    from ssl_ray.networks.transfer import transfer  # MONAI takes seconds to load: only where it is needed
    from ssl_ray.networks.unetr import build_unetr

    unetr = build_unetr(network, config.patch_size, config.cohort.classes)
    return asdict(transfer(load_weights(weights), unetr, str(weights), load_metadata(weights)))


def finetune(job: GridJob, tracker: Tracker, params: Mapping[str, str], config_yaml: str) -> GridResult:
    """Train every cell that is not finished yet.

    Args:
        job: the grid.
        tracker: the study's MLflow experiment.
        params: of every MLflow run.
        config_yaml: the resolved experiment, kept with the grid's run.

    Raises:
        UserError: when the pretrained weights do not match, or the cluster cannot hold a trial.
    """
    grid_run = _open(job, tracker, params, config_yaml)
    pending = [cell for cell, key in job.keys.items() if not tracker.finished("trial", key)]
    finished = [cell for cell in job.keys if cell not in pending]
    for cell in finished:  # a driver that was killed may not have come to this
        job.trial_folder(cell).clear()
    with Bar("fine-tuning", len(job.keys) * job.config.steps) as bar:
        runs = TrialCallback(job, tracker, grid_run.id, params, bar, len(finished) * job.config.steps)
        try:
            if job.pretrained:
                report = check_transfer(job.config, job.network, job.pretrained.weights)
                grid_run.text(json.dumps(report, indent=1), "weight_transfer.json")
                grid_run.metrics({"transferred_share": report["share"]}, 0)
            if pending:
                needed = job.config.cpus_per_trial, job.config.gpus_per_trial
                check_resources("finetune.cpus_per_trial, finetune.gpus_per_trial", "the steps of a trial", *needed)
                _tune(job, pending, runs)
        except BaseException as error:
            runs.abandon()
            grid_run.close("KILLED" if isinstance(error, KeyboardInterrupt) else "FAILED")
            raise
    grid_run.close()
    return GridResult(grid_run.id, runs.completed, len(finished), tuple(runs.failed))


def _open(job: GridJob, tracker: Tracker, params: Mapping[str, str], config_yaml: str) -> Run:
    """The grid's MLflow run, with the experiment, the volumes that were left out, and the key of every cell."""
    run = tracker.open("grid", job.key, "grid", params)
    run.text(config_yaml, "experiment.yaml")
    if (job.folders.study / BAD_VOLUMES).is_file():
        run.artifact(job.folders.study / BAD_VOLUMES)
    # A grid that had more cells before keeps them: each key says what its cell depends on, so none is wrong now.
    before = json.loads(tracker.read(run.id, CELLS) or b"{}")
    run.text(json.dumps(before | {cell.name: key for cell, key in job.keys.items()}, indent=1), CELLS)
    return run


def _tune(job: GridJob, pending: Sequence[Cell], runs: TrialCallback) -> None:
    config = job.config

    def trainable(space: Mapping[str, Any]) -> None:
        import torch

        from ssl_ray.finetune.trial import Trial  # the trial's process loads MONAI, the driver does not

        torch.set_num_threads(max(1, int(config.cpus_per_trial)))
        device = torch.device("cuda" if config.gpus_per_trial else "cpu")
        try:
            trial = Trial(job.trial(space["cell"]), device)
            for step, metrics in trial.train():
                tune.report({"step": step, "metrics": metrics})
            tune.report({"step": config.steps, "metrics": trial.evaluate()})
        except FloatingPointError as error:  # reported, not raised: Tune would try the trial again, with the same end
            tune.report({"failure": str(error)})

    resources = {"cpu": config.cpus_per_trial, "gpu": config.gpus_per_trial}
    tune.Tuner(
        tune.with_resources(trainable, resources),
        param_space={"cell": tune.grid_search(pending)},
        tune_config=tune.TuneConfig(
            max_concurrent_trials=config.max_concurrent_trials,
            reuse_actors=True,
            trial_dirname_creator=lambda trial: trial.trial_id,
        ),
        run_config=tune.RunConfig(
            name=job.folder.name,
            **job.folders.ray_storage,
            failure_config=tune.FailureConfig(max_failures=config.max_failures),
            callbacks=[runs],
            verbose=0,
        ),
    ).fit()
