"""Whether the cluster has what a step of the study asks for: Ray itself would wait for it without end."""

import ray

from ssl_ray.errors import UserError


def check_resources(key: str, what: str, cpus: float, gpus: float) -> None:
    """Refuse a cluster that is too small for `what` (e.g. "2 workers"), for which the setting `key` asks."""
    there = ray.cluster_resources()
    for name, needed in (("CPU", cpus), ("GPU", gpus)):
        if there.get(name, 0.0) < needed:
            raise UserError(f"{key}: {what} need {needed:g} {name}s, the cluster has {there.get(name, 0.0):g}")
