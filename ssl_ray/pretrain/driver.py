"""A pretraining as the driver sees it: the key of its result, and the TorchTrainer around the workers' loop."""

import signal
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import ray
from ray import train
from ray.train.torch import TorchTrainer
from ray.util.queue import Queue
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from ssl_ray.cluster.connect import first_error
from ssl_ray.cluster.resources import check_resources
from ssl_ray.config.schema import Pretrain
from ssl_ray.console import Bar
from ssl_ray.data.store import Store, Volume
from ssl_ray.networks.weight_files import load_metadata
from ssl_ray.pretrain.collector import Collector
from ssl_ray.pretrain.entry import work
from ssl_ray.pretrain.job import Job, Recipe
from ssl_ray.pretrain.samples import SampleTable
from ssl_ray.pretrain.stream import Feed
from ssl_ray.storage.folders import Folders
from ssl_ray.tracking.tracker import Run, Tracker
from ssl_ray.training.checkpoint import digest


@dataclass(frozen=True)
class Pretrained:
    """The autoencoder that did best on validation, and the key of what it depends on.

    `run_id` is MLflow's id of the run that made it, None where that was elsewhere; `fresh` means trained just now.
    """

    weights: Path
    key: str
    run_id: str | None = None
    fresh: bool = False


def pretraining_key(recipe: Recipe, training: Sequence[Volume], validation: Sequence[Volume]) -> str:
    """Digest of everything that the pretrained weights depend on."""
    config = recipe.settings
    settings = config.model_dump(mode="json", exclude=Pretrain.HOW | {"sources"})
    return digest(
        settings,
        # Negatives of the contrastive loss are the rank's own patches.
        config.workers if config.contrastive.enabled else None,
        # What `auto` precision means depends on the kind of device.
        config.gpu if config.precision == "auto" else None,
        recipe.network.model_dump(mode="json", exclude={"feature_size"}),
        recipe.seed,
        [volume.key for volume in training],
        [volume.key for volume in validation],
    )


def pretrain(
    recipe: Recipe,
    training: Sequence[Volume],
    validation: Sequence[Volume],
    folders: Folders,
    tracker: Tracker,
    params: Mapping[str, str],
    config_yaml: str,
) -> Pretrained:
    """Pretrain, or find that it is done already; a run that was cut off goes on from its last checkpoint.

    Raises:
        RuntimeError: when workers failed more often than `max_failures` allows.
        FloatingPointError: when more steps in a row were not finite than `on_nonfinite` and `max_skipped` allow.
    """
    key = pretraining_key(recipe, training, validation)
    folder = folders.study / f"pretrain-{key}"
    weights = folder / "best.safetensors"
    if (done := tracker.finished("pretraining", key)) and folders.output.pull(weights):
        return Pretrained(weights, key, done)
    workers = recipe.settings.worker_range[0]
    cpus, gpus = workers * recipe.settings.cpus_per_worker, workers * recipe.settings.gpu
    check_resources("pretrain.workers", f"{workers} workers", cpus, gpus)
    # On the driver's node: when another one dies, the records do not die with it.
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    reports = Queue(actor_options={"num_cpus": 0, "scheduling_strategy": here})
    feeds = feed_of(recipe, folders, training), feed_of(recipe, folders, validation)
    job = Job(recipe, *feeds, folder, folders.output, key, reports)
    steps = job.training.table.steps
    counts = {"training_volumes": len(training), "validation_volumes": len(validation), "steps": steps}
    run = tracker.open("pretraining", key, "pretrain", {**params, **counts})
    run.text(config_yaml, "experiment.yaml")
    try:
        _train(job, folders, run)
        folders.output.pull(job.weights)
        facts = load_metadata(job.weights)
        run.artifact(job.weights)
        best = {"best_validation_loss": float(facts["validation_loss"]), "best_step": float(facts["step"])}
        run.metrics(best, steps)
    except BaseException:
        run.close("FAILED")
        raise
    run.close()
    return Pretrained(weights, key, run.id, fresh=True)


def _train(job: Job, folders: Folders, run: Run) -> None:
    config = job.recipe.settings
    trainer = TorchTrainer(
        work,
        train_loop_config=job,
        scaling_config=train.ScalingConfig(
            num_workers=config.workers,
            use_gpu=config.gpu,
            resources_per_worker={"CPU": config.cpus_per_worker} | ({"GPU": 1} if config.gpu else {}),
        ),
        run_config=train.RunConfig(
            name=job.folder.name,
            **folders.ray_storage,
            failure_config=train.FailureConfig(max_failures=config.max_failures),
            logging_config=train.LoggingConfig("WARNING"),
        ),
    )
    with (
        Bar("pretraining", job.training.table.steps) as bar,
        Collector(job.reports, run, bar, folders.output) as collector,
    ):
        _fit(trainer)
    if collector.fatal:
        raise FloatingPointError(f"pretraining stopped, the weights before are kept: {'; '.join(collector.fatal)}")


def _fit(trainer: TorchTrainer) -> None:
    """`trainer.fit()`, whose errors become one line, and after which Ctrl-C does what it did before."""
    interrupt = signal.getsignal(signal.SIGINT)
    try:
        trainer.fit()
    except SystemExit as error:  # Ray Train's own handler of Ctrl-C leaves with code 0, and stays installed
        raise KeyboardInterrupt from error
    except train.WorkerGroupError as error:
        rank, cause = next(iter(error.worker_failures.items()))
        what = first_error(str(cause)) or f"{type(cause).__name__}: {' '.join(str(cause).split())[:300]}"
        raise RuntimeError(f"pretraining failed on rank {rank} of the workers: {what}") from error
    finally:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGINT, interrupt)


def feed_of(recipe: Recipe, folders: Folders, volumes: Sequence[Volume]) -> Feed:
    """The samples of these volumes, and where their voxels lie."""
    config = recipe.settings
    table = SampleTable(
        seed=recipe.seed,
        shapes=np.array([volume.shape for volume in volumes], dtype=np.int64),
        patch_size=config.patch_size,
        patches_per_volume=config.patches_per_volume,
        batch_size=config.batch_size,
        epochs=config.epochs,
    )
    first = volumes[0]
    keys, ids = (tuple(getattr(volume, name) for volume in volumes) for name in ("key", "id"))
    return Feed(table, Store(folders.cache, folders.scratch), keys, ids, first.dtype, first.levels)
