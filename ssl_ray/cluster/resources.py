"""Whether the cluster has what a step of the study asks for: checked before Ray would wait for it without end."""

import ray

from ssl_ray.config.schema import Finetune, Pretrain
from ssl_ray.errors import UserError


def check_pretraining(config: Pretrain) -> None:
    """Refuse a cluster that cannot hold the training workers.

    Raises:
        UserError: with what is needed and what there is.
    """
    cpus, gpus = _resources()
    workers = config.worker_range[0]
    needed = workers * config.cpus_per_worker
    if cpus < needed:
        raise UserError(
            f"pretrain.workers: {workers} workers with {config.cpus_per_worker:g} CPUs each need {needed:g} CPUs, the "
            f"cluster has {cpus:g}"
        )
    if config.gpu and gpus < workers:
        raise UserError(f"pretrain.gpu: {workers} workers need a GPU each, the cluster has {gpus:g}")


def check_finetuning(config: Finetune) -> None:
    """Refuse a cluster that cannot hold a single trial.

    Raises:
        UserError: with what is needed and what there is.
    """
    cpus, gpus = _resources()
    if cpus < config.cpus_per_trial:
        raise UserError(f"finetune.cpus_per_trial: {config.cpus_per_trial:g} asked for, the cluster has {cpus:g}")
    if gpus < config.gpus_per_trial:
        raise UserError(f"finetune.gpus_per_trial: {config.gpus_per_trial:g} asked for, the cluster has {gpus:g}")


def _resources() -> tuple[float, float]:
    """CPUs and GPUs of all nodes together."""
    resources = ray.cluster_resources()
    return resources.get("CPU", 0.0), resources.get("GPU", 0.0)
