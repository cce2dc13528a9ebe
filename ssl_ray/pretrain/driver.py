"""The TorchTrainer around the worker's loop, and what the driver does with its reports."""

import math
import signal
import threading
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import ray
from ray import train
from ray.train.torch import TorchTrainer
from ray.util.queue import Queue
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from ssl_ray.cluster.connect import first_error
from ssl_ray.cluster.resources import check_resources
from ssl_ray.config.schema import Pretrain
from ssl_ray.console import Bar, say
from ssl_ray.data.store import Store, Volume
from ssl_ray.networks.weight_files import load_metadata
from ssl_ray.pretrain.job import Job, Recipe, work
from ssl_ray.pretrain.samples import SampleTable
from ssl_ray.pretrain.stream import Feed
from ssl_ray.storage.folders import Folders
from ssl_ray.storage.mirror import Mirror
from ssl_ray.tracking.tracker import Run, Tracker
from ssl_ray.training.checkpoint import digest
from ssl_ray.training.meters import ObjectStore, as_system

_RESIZE_SECONDS = 60.0
"""How often Ray Train looks whether more of the workers that the experiment allows would find room."""


@dataclass(frozen=True)
class Pretrained:
    """Encoder weights (those best on validation), a key that names their content, and the MLflow run that made them.

    `run_id` is None for weights that were made elsewhere; `fresh` is True when they were trained just now.
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
        RuntimeError: when it failed more often than `max_failures` allows.
    """
    key = pretraining_key(recipe, training, validation)
    folder = folders.study / f"pretrain-{key}"
    weights = folder / "best.safetensors"
    if (done := tracker.finished("pretraining", key)) and folders.output.pull(weights):
        return Pretrained(weights, key, done)
    config = recipe.settings
    workers = config.worker_range[0]
    check_resources("pretrain.workers", f"{workers} workers", workers * config.cpus_per_worker, workers * config.gpu)
    # On the driver's node: should another one die, the records do not die with it.
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    reports = Queue(actor_options={"num_cpus": 0, "scheduling_strategy": here})
    feeds = _feed(recipe, folders, training), _feed(recipe, folders, validation)
    job = Job(recipe, *feeds, folder, folders.output, key, reports)
    table = job.training.table
    counts = {"training_volumes": len(training), "validation_volumes": len(validation), "steps": table.steps}
    run = tracker.open("pretraining", key, "pretrain", {**params, **counts})
    run.text(config_yaml, "experiment.yaml")
    trainer = TorchTrainer(
        work,
        train_loop_config=job,
        scaling_config=train.ScalingConfig(
            num_workers=config.workers,
            elastic_resize_monitor_interval_s=_RESIZE_SECONDS,
            use_gpu=config.gpu,
            resources_per_worker={"CPU": config.cpus_per_worker} | ({"GPU": 1} if config.gpu else {}),
        ),
        run_config=train.RunConfig(
            name=folder.name,
            **folders.ray_storage,
            failure_config=train.FailureConfig(max_failures=config.max_failures),
            logging_config=train.LoggingConfig("WARNING"),
        ),
    )
    try:
        with Bar("pretraining", table.steps) as bar, _Collector(reports, run, bar, folders.output) as collector:
            _fit(trainer)
        if collector.fatal:
            raise FloatingPointError(
                f"pretraining stopped after {config.max_skipped if config.on_nonfinite == 'skip' else 0} skipped steps "
                f"in a row, the weights before them are kept: {'; '.join(collector.fatal)}"
            )
        folders.output.pull(job.weights)
        facts = load_metadata(job.weights)
        run.artifact(job.weights)
        best = {"best_validation_loss": float(facts["validation_loss"]), "best_step": float(facts["step"])}
        run.metrics(best, table.steps)
    except BaseException:
        run.close("FAILED")
        raise
    run.close()
    return Pretrained(weights, key, run.id, fresh=True)


def _fit(trainer: TorchTrainer) -> None:
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


def _feed(recipe: Recipe, folders: Folders, volumes: Sequence[Volume]) -> Feed:
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


class _Collector:
    """In a thread of the driver: records from the queue to MLflow and to the progress bar."""

    def __init__(self, reports: Queue, run: Run, bar: Bar, mirror: Mirror) -> None:
        self._reports, self._run, self._bar, self._mirror = reports, run, bar, mirror
        self._known = run.logged("lr")
        self._starts = len(run.logged("started_at"))
        self._store = ObjectStore()
        self.fatal: list[str] = []
        self._thread = threading.Thread(target=self._collect, daemon=True)

    def __enter__(self) -> "_Collector":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._reports.put(None)
        self._thread.join()
        self._reports.shutdown()

    def _collect(self) -> None:
        while (item := self._reports.get()) is not None:
            kind, content = item
            if kind == "started":  # once a start: 0, and after every fault the step that training went on from
                replayed = max(self._known, default=0) - content
                self._run.metrics({"started_at": content, "replayed_steps": max(0, replayed)}, self._starts)
                self._starts += 1
                self._store.sample()  # what was spilled before is not this run's
                self._bar.update(int(content), again=True)
            elif kind == "skipped":
                say(f"WARNING: not finite, skipped: {content}")
            elif kind == "fatal":
                self.fatal.append(content)
            for record in {"record": [content], "records": content}.get(kind, ()):
                self._log(int(record["step"]), record)

    def _log(self, step: int, record: dict[str, Any]) -> None:
        metrics = {name: float(value) for name, value in record.items() if name not in ("step", "picture")}
        if step not in self._known:
            self._known.add(step)
            self._run.metrics(metrics | as_system(metrics) | self._store.sample(), step)
            if "picture" in record:
                picture = Path(record["picture"])
                with suppress(OSError):  # a picture less; the object store's fault is raised where it matters
                    if picture.is_file() or self._mirror.pull(picture):
                        self._run.artifact(picture, "pictures")
        self._bar.update(step, _facts(metrics))


def _facts(metrics: dict[str, float]) -> str:
    facts = f"loss {metrics.get('loss', math.nan):.4f}, {metrics['patches_per_second']:.0f} patches/s"
    if metrics["data_wait_share"] >= 0.05:
        facts += f", waits for data {metrics['data_wait_share']:.0%}"
    if "validation_loss" in metrics:
        facts += f", validation {metrics['validation_loss']:.4f}"
    return facts
