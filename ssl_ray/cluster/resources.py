"""Whether the cluster has what a step of the study asks for: Ray itself would wait for it without end."""

import ray

from ssl_ray.errors import UserError


def check_resources(key: str, what: str, cpus: float, gpus: float) -> None:
    """Refuse a cluster that is too small.

    Args:
        key: of the configuration that asks for it.
        what: is to run at the same time, e.g. "2 workers".
        cpus: that all of it needs.
        gpus: that all of it needs.

    Raises:
        UserError: with what is needed and what there is.
    """
    there = ray.cluster_resources()
    for name, needed in (("CPU", cpus), ("GPU", gpus)):
        if there.get(name, 0.0) < needed:
            raise UserError(f"{key}: {what} need {needed:g} {name}s, the cluster has {there.get(name, 0.0):g}")
