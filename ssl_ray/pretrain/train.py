"""The TorchTrainer around the worker's loop, and what the driver does with its reports."""

import re
import signal
import threading
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from ray import train
from ray.train.torch import TorchTrainer
from ray.util.queue import Queue

from ssl_ray.checkpoint import digest
from ssl_ray.cluster import check_pretraining
from ssl_ray.cohort.cache import Volume
from ssl_ray.config import Study
from ssl_ray.console import Bar
from ssl_ray.networks import load_metadata
from ssl_ray.pretrain.loop import Job, train_loop
from ssl_ray.pretrain.plan import Plan
from ssl_ray.pretrain.stream import Feed
from ssl_ray.tracking import Run, Tracker, study_params

_NO_EFFECT = {"workers", "gpu", "cpus_per_worker", "block_megabytes", "max_failures", "log_every", "checkpoint_every"}
"""Settings that change how a run is carried out but not what it computes; they may differ when it is taken up again."""


@dataclass(frozen=True)
class Pretrained:
    """Encoder weights (those best on validation), a key that names their content, and the MLflow run that made them.

    `run_id` is None for weights that were made elsewhere; `fresh` is True when they were trained just now.
    """

    weights: Path
    key: str
    run_id: str | None = None
    fresh: bool = False


def pretraining_key(study: Study, training: Sequence[Volume], validation: Sequence[Volume]) -> str:
    """Digest of everything that the pretrained weights depend on."""
    config = study.pretrain
    settings = config.model_dump(mode="json", exclude=_NO_EFFECT | {"sources"})
    return digest(
        settings,
        # Negatives of the contrastive loss are the rank's own patches.
        config.workers if config.contrastive.enabled else None,
        # What `auto` precision means depends on the kind of device.
        config.gpu if config.precision == "auto" else None,
        study.network.model_dump(mode="json", exclude={"feature_size"}),
        study.seed,
        [volume.key for volume in training],
        [volume.key for volume in validation],
    )


def pretrain(
    study: Study, training: Sequence[Volume], validation: Sequence[Volume], tracker: Tracker, config_yaml: str
) -> Pretrained:
    """Pretrain, or find that it is done already; a run that was cut off goes on from its last checkpoint.

    Raises:
        RuntimeError: when it failed more often than `max_failures` allows.
    """
    key = pretraining_key(study, training, validation)
    folder = study.folder / f"pretrain-{key}"
    weights = folder / "best.safetensors"
    if (done := tracker.finished("pretraining", key)) and weights.is_file():
        return Pretrained(weights, key, done.info.run_id)
    config = study.pretrain
    check_pretraining(study)
    reports = Queue(actor_options={"num_cpus": 0})
    job = Job(study, _feed(study, training), _feed(study, validation), folder, key, reports)
    plan = job.training.plan
    counts = {"training_volumes": len(training), "validation_volumes": len(validation), "steps": plan.steps}
    run = tracker.open("pretraining", key, "pretrain", study_params(study, "pretrain") | counts)
    run.text(config_yaml, "experiment.yaml")
    trainer = TorchTrainer(
        train_loop,
        train_loop_config=job,
        scaling_config=train.ScalingConfig(
            num_workers=config.workers,
            use_gpu=config.gpu,
            resources_per_worker={"CPU": config.cpus_per_worker} | ({"GPU": 1} if config.gpu else {}),
        ),
        run_config=train.RunConfig(
            name=folder.name,
            storage_path=str(study.folder / "ray"),
            failure_config=train.FailureConfig(max_failures=config.max_failures),
            checkpoint_config=train.CheckpointConfig(num_to_keep=2),
            logging_config=train.LoggingConfig("WARNING"),
        ),
    )
    try:
        with Bar("pretraining", plan.steps) as bar, _Collector(reports, run, bar):
            _fit(trainer)
        facts = load_metadata(job.weights)
        run.artifact(job.weights)
        best = {"best_validation_loss": float(facts["validation_loss"]), "best_step": float(facts["step"])}
        run.metrics(best, plan.steps)
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
        # The text of a remote error is a chain of tracebacks; the first error that is not Ray's wrapping began it.
        named = re.search(r"^(?!ray\.)[\w.]*(?:Error|Exception)\b(?!.*ray::).*: .*$", str(cause), re.MULTILINE)
        what = named.group().strip() if named else f"{type(cause).__name__}: {' '.join(str(cause).split())[:300]}"
        raise RuntimeError(f"pretraining failed on rank {rank} of the workers: {what}") from error
    finally:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGINT, interrupt)


def _feed(study: Study, volumes: Sequence[Volume]) -> Feed:
    config = study.pretrain
    plan = Plan(
        seed=study.seed,
        shapes=np.array([volume.shape for volume in volumes], dtype=np.int64),
        patch_size=config.patch_size,
        patches_per_volume=config.patches_per_volume,
        batch_size=config.batch_size,
        epochs=config.epochs,
    )
    first = volumes[0]
    return Feed(plan, study.cache_folder, tuple(volume.key for volume in volumes), first.dtype, first.levels)


class _Collector:
    """In a thread of the driver: records of all ranks from the queue, added up, to MLflow and to the progress bar."""

    def __init__(self, reports: Queue, run: Run, bar: Bar) -> None:
        self._reports, self._run, self._bar = reports, run, bar
        self._logged = run.last_step("loss")
        self._partial: dict[int, dict[int, dict[str, Any]]] = defaultdict(dict)
        self._thread = threading.Thread(target=self._collect, daemon=True)

    def __enter__(self) -> None:
        self._thread.start()

    def __exit__(self, *_: object) -> None:
        self._reports.put(None)
        self._thread.join()
        self._reports.shutdown()

    def _collect(self) -> None:
        while (item := self._reports.get()) is not None:
            rank, record = item
            if "started_at" in record:  # once a start: 0, and after every fault the step that training went on from
                self._run.metrics(record, int(record["started_at"]))
                continue
            step = int(record["step"])
            ranks = self._partial[step]
            ranks[rank] = record
            if len(ranks) < record["world"]:
                continue
            del self._partial[step]
            picture, metrics = record.get("picture") or ranks[0].get("picture"), sum_ranks(list(ranks.values()))
            if step > self._logged:
                self._logged = step
                self._run.metrics(metrics, step)
                if picture:
                    self._run.artifact(Path(picture), "pictures")
            self._bar.update(step, _facts(metrics))


def sum_ranks(records: Sequence[dict[str, Any]]) -> dict[str, float]:
    """One step's records of all ranks -> its metrics; sums over sums, never means of means."""
    patches = sum(record["patches"] for record in records)
    seconds = max(record["seconds"] for record in records)
    own = {"step", "world", "loss_sum", "patches", "waited", "seconds", "picture"}
    metrics = {name: float(value) for name, value in records[0].items() if name not in own}
    metrics["loss"] = sum(record["loss_sum"] for record in records) / patches
    metrics["patches_per_second"] = patches / seconds
    metrics["data_wait_share"] = max(record["waited"] for record in records) / seconds
    return metrics


def _facts(metrics: dict[str, float]) -> str:
    facts = f"loss {metrics['loss']:.4f}, {metrics['patches_per_second']:.0f} patches/s"
    if "validation_loss" in metrics:
        facts += f", validation {metrics['validation_loss']:.4f}"
    return facts
