"""A pretraining as the driver sees it: the key of its result, the TorchTrainer around the workers."""

import math
import signal
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import ray
from ray import train
from ray.train.torch import TorchTrainer
from ray.util.queue import Queue
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from ssl_ray.cluster.connect import check_resources, first_error
from ssl_ray.cluster.private import leave_out_actors
from ssl_ray.config import depends
from ssl_ray.console import Bar, say
from ssl_ray.data.store import Store, Volume
from ssl_ray.networks.weight_files import load_metadata
from ssl_ray.pretrain.collector import Collector
from ssl_ray.pretrain.job import Job, Labelled, Recipe
from ssl_ray.pretrain.samples import SampleTable
from ssl_ray.pretrain.stream import Feed
from ssl_ray.random import number
from ssl_ray.storage.files import file_digest
from ssl_ray.storage.folders import Folders
from ssl_ray.text import reason
from ssl_ray.tracking.models import told
from ssl_ray.tracking.run import NetworkFile, Run, ending
from ssl_ray.tracking.tracker import Tracker
from ssl_ray.training.checkpoint import load_latest, saved_steps
from ssl_ray.training.precision import settled


@dataclass(frozen=True)
class Pretrained:
    """The autoencoder that did best on validation, and the key of what it depends on.

    `run_id` is MLflow's id of the run that made it, `precision` the type it was computed in, None where that was
    elsewhere; `fresh` means trained just now.
    """

    weights: Path
    key: str
    run_id: str | None = None
    precision: str | None = None
    fresh: bool = False


def pretraining_key(recipe: Recipe, training: Sequence[Volume], validation: Sequence[Volume]) -> str:
    """Digest of everything that the pretrained weights depend on; `training` is what their volumes are drawn from."""
    volumes = [[volume.key for volume in part] for part in (draw_volumes(recipe, training), validation)]
    started = [file_digest(recipe.weights)] if recipe.weights else []
    return depends.digest(depends.pretraining(recipe.settings, recipe.network), recipe.seed, volumes, *started)


def pretrain(
    recipe: Recipe,
    training: Sequence[Volume],
    validation: Sequence[Volume],
    folders: Folders,
    tracker: Tracker,
    params: Mapping[str, str],
    config_yaml: str,
    name: str,
    labelled: Labelled | None = None,
) -> Pretrained:
    """Pretrain, or find that it is done already; a run that was cut off goes on from its last checkpoint.

    `name` is that of its run in MLflow, which gets `params`. `labelled` is for its probe, and no weight depends on it.

    Workers that failed more often than `max_failures` are a RuntimeError; more steps in a row that were not finite than
    `on_nonfinite` and `max_skipped` allow a FloatingPointError.
    """
    known, training = known_pretraining(recipe, training, validation, folders, tracker), draw_volumes(recipe, training)
    key, folder = known.key, known.weights.parent
    if known.run_id and folders.output.pull(known.weights):
        return replace(known, precision=settled(recipe.settings.precision, folder, folders.output))
    workers = recipe.settings.worker_range[0]
    share = recipe.settings.cpus_per_worker, float(recipe.settings.gpu)
    check_resources("pretrain.workers", f"{workers} workers", workers, *share)
    # On the driver's node: when another one dies, the records do not die with it.
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    reports = Queue(actor_options={"num_cpus": 0, "scheduling_strategy": here})
    feeds = feed_of(recipe, folders, training), feed_of(recipe, folders, validation)
    job = Job(recipe, *feeds, folder, folders.output, key, reports, labelled)
    steps = job.training.table.steps
    recipe.settings.optimizer.check_warmup(steps, "pretrain.")
    counts = {"training_volumes": len(training), "validation_volumes": len(validation), "steps": steps}
    run = tracker.open("pretraining", key, name, {**params, **counts})
    run.text(config_yaml, "experiment.yaml")
    run.datasets(_datasets(recipe, training, validation))
    with ending(run):
        _rewind(job)
        unlearned = _train(job, folders, run)
        precision = settled(recipe.settings.precision, folder, folders.output)
        run.params({"precision": precision})
        folders.output.pull(job.weights)
        facts = load_metadata(job.weights)
        run.artifact(job.weights)
        selected, grid = int(facts["step"]), recipe.settings.preparation
        made = str(job.weights), file_digest(job.weights), selected, False, grid.channels, grid.spacing
        run.model(NetworkFile(f"encoder-{key[:6]}", *made))
        best = {"best_validation_loss": float(facts["validation_loss"]), "best_step": float(facts["step"])}
        run.metrics(best, steps, {})
    if (lowest := best["best_validation_loss"]) >= unlearned:
        say(
            f"WARNING: the lowest validation loss is {lowest:.4f}, and what needs no learning gives {unlearned:.4f}: "
            "such weights can be worse than random ones"
        )
    return Pretrained(known.weights, key, run.id, precision, fresh=True)


def known_pretraining(
    recipe: Recipe, training: Sequence[Volume], validation: Sequence[Volume], folders: Folders, tracker: Tracker
) -> Pretrained:
    """Where the weights lie, or are to lie, and the run that made them, if it is finished; they may be gone since."""
    key = pretraining_key(recipe, training, validation)
    weights = folders.study / f"pretrain-{key}" / "best.safetensors"
    return Pretrained(weights, key, tracker.finished("pretraining", key))


def draw_volumes(recipe: Recipe, training: Sequence[Volume]) -> list[Volume]:
    """The recipe's share, as listed: the first in an order by seed and content, so that shares of one seed nest."""
    order = sorted(training, key=lambda volume: number(recipe.seed, "unlabelled", volume.content))
    drawn = {volume.key for volume in order[: recipe.settings.drawn(len(training))]}
    return [volume for volume in training if volume.key in drawn]


def _datasets(recipe: Recipe, training: Sequence[Volume], validation: Sequence[Volume]) -> list[dict[str, Any]]:
    """The unlabelled volumes by part, for MLflow."""
    roots = [Path(source.root) for source in recipe.settings.sources]
    name, place = " and ".join(root.name for root in roots), " ".join(str(root.absolute()) for root in roots)
    parts = ("pretraining", f"{name} pretraining", training), ("validation", f"{name} held out", validation)
    return [told(context, of, place, [(one.key, one.subject) for one in read]) for context, of, read in parts]


def _rewind(job: Job) -> None:
    """Where the best weights were deleted, go back to the newest checkpoint from before they were found, or to step 0.

    Going on from a later one would give back the weights of another step under the same key.
    """
    folder, mirror = job.checkpoints, job.mirror
    state = None if mirror.kept(job.weights).list() else load_latest(folder, job.key, mirror)
    best = state["best"] if state else math.inf
    if math.isinf(best):  # nothing was selected yet
        return
    while state and state["best"] <= best:
        for step, path in saved_steps(folder, mirror).items():
            if step >= state["step"]:
                mirror.drop(path)
        state = load_latest(folder, job.key, mirror)
    say(
        f"WARNING: {job.weights} was deleted, which had the weights that did best on validation; training goes on from "
        f"step {state['step'] if state else 0}, before they were found, to find them again"
    )


def _train(job: Job, folders: Folders, run: Run) -> float:
    """Until all steps are done -> the validation loss of what needs no learning; nan if no worker told it."""

    def work(job: Job) -> None:  # sent by value: Ray's controller need not import what this module or the worker does
        from ssl_ray.pretrain.begin import begin

        beginning = begin(job)
        from ssl_ray.pretrain.worker import train_loop  # this takes seconds

        train_loop(job, beginning)

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
    leave_out_actors(trainer)
    steps = job.training.table.steps
    with Bar("pretraining", steps) as bar, Collector(job, run, bar) as collector:
        _fit(trainer)
    selected = bool(job.mirror.kept(job.weights).list())
    if collector.fatal:
        raise FloatingPointError(
            "pretraining stopped after too many steps in a row that were not finite (on_nonfinite, max_skipped)"
            f"{'; the best weights so far are kept' if selected else ''}: {'; '.join(collector.fatal)}"
        )
    if steps not in saved_steps(job.checkpoints, job.mirror):
        raise RuntimeError(f"pretraining ended before its last step, and what its workers said is lost: {job.folder}")
    if not selected:
        raise FloatingPointError("pretraining: no validation loss was finite, so that no weights were selected")
    return collector.unlearned


def _fit(trainer: TorchTrainer) -> None:
    """`trainer.fit()`, whose errors become one line, and after which signals do what they did before.

    Ray Train's own handler of Ctrl-C stops the workers before it leaves. SIGTERM (`ray job stop`) does the same here:
    workers that train on while the driver takes its leave would be trained for nothing.
    """
    main = threading.current_thread() is threading.main_thread()
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        if main:
            signal.signal(signal.SIGTERM, lambda *_: signal.raise_signal(signal.SIGINT))
        trainer.fit()
    except SystemExit as error:  # Ray Train's own handler of Ctrl-C leaves with code 0, and stays installed
        raise KeyboardInterrupt from error
    except train.WorkerGroupError as error:
        rank, cause = next(iter(error.worker_failures.items()))
        what = first_error(str(cause)) or reason(cause)
        raise RuntimeError(f"pretraining failed on rank {rank} of the workers: {what}") from error
    finally:
        for number, handler in before.items():
            if main and handler is not None:  # None: one that was not installed from Python
                signal.signal(number, handler)


def feed_of(recipe: Recipe, folders: Folders, volumes: Sequence[Volume]) -> Feed:
    """The samples of these volumes, and where their voxels lie."""
    config = recipe.settings
    shapes = np.array([volume.shape for volume in volumes], dtype=np.int64)
    draws = config.patches_per_volume, config.batch_size, config.epochs, config.steps
    table, first = SampleTable(recipe.seed, shapes, config.patch_size, *draws), volumes[0]
    keys, ids = (tuple(getattr(volume, name) for volume in volumes) for name in ("key", "id"))
    return Feed(table, Store(folders.cache, folders.scratch), keys, ids, first.dtype, first.levels)
