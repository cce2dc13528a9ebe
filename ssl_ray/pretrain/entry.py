"""What Ray's workers are told to call. Ray's controller imports it too, and needs neither torch nor MONAI for it."""

from ssl_ray.pretrain.job import Job


def work(job: Job) -> None:
    """Train as one of the workers."""
    from ssl_ray.pretrain.worker import train_loop

    train_loop(job)
