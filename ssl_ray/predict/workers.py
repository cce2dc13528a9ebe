"""Cases over all GPUs or CPUs of the cluster, by workers that each load the models once."""

import pickle
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar

import ray
import torch

from ssl_ray.cluster.connect import check_resources, check_shared, connect
from ssl_ray.cluster.worker import begun, count_tries
from ssl_ray.config.schema import LocalCluster
from ssl_ray.console import track
from ssl_ray.data.datalist import Case
from ssl_ray.errors import UserError
from ssl_ray.text import reason

Device = Literal["auto", "cpu", "cuda"]
Result = TypeVar("Result")
Work = Callable[[Case], Result]
_CPUS = 4
"""Most of a worker: with more, the convolutions of a patch gain little, while every worker holds a volume."""
_ON_A_GPU = 2
"""Workers that share one: while one reads or writes, the other computes."""
_TRIES = 2
"""Of a case whose worker is killed meanwhile, by its memory or as its machine is taken away."""


def over_cases(
    title: str,
    cases: Sequence[Case],
    make: Callable[[torch.device], Work[Result]],
    device: Device,
    workers: int | None,
    output: Path | None = None,
) -> Iterator[tuple[Case, Result | UserError]]:
    """Each case with what `make(device)` makes of it in some worker, or with the reason why it makes nothing of it.

    They come in the order in which they end. The workers are on the Ray cluster, which is joined or started when the
    first case is asked for; a worker calls `make` once, and has one case at a time. If `workers` is None, there are two
    for each GPU, or, without GPUs or on `cpu`, one for every four CPUs of a node. They write to `output`.

    Raises:
        UserError: where `cuda` is asked for in a cluster without, and where the output cannot be written (OSError) or
            is another folder on some node.
    """
    connect(LocalCluster())
    if output:
        check_shared(output=output)
    if device == "cuda":
        check_resources("--device", "workers on cuda", 1, 1, 1)
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    on_gpus = device != "cpu" and any(int(node.get("GPU", 0)) for node in nodes)
    cpus, room = _spread(nodes, on_gpus, workers)
    count = min(workers or room, room, len(cases))
    rows = [{"case": pickle.dumps(case)} for case in cases]
    tries = count_tries()
    outcomes = ray.data.from_items(rows, override_num_blocks=len(rows)).map(
        _Worker,
        fn_constructor_args=(ray.put((make, "cuda" if on_gpus else "cpu", cpus, tries)),),
        compute=ray.data.ActorPoolStrategy(size=count, max_tasks_in_flight_per_actor=1),
        num_cpus=cpus,
        num_gpus=1 / _ON_A_GPU if on_gpus else 0,
    )
    try:
        for row in track(title, outcomes.iter_rows(), len(cases)):
            case, outcome = pickle.loads(row["outcome"])
            if isinstance(outcome, OSError):
                raise UserError(f"cannot write the output: {outcome}") from outcome
            yield case, outcome
    finally:
        ray.kill(tries)


def _spread(nodes: Sequence[Mapping[str, float]], on_gpus: bool, workers: int | None) -> tuple[int, int]:
    """CPUs of a worker, and how many workers find room: each has its CPUs and its share of a GPU on one node."""
    there = [(int(node.get("CPU", 0)), _ON_A_GPU * int(node.get("GPU", 0))) for node in nodes]
    if on_gpus:
        there = [one for one in there if one[1]]
    total, most = sum(cpus for cpus, _ in there), max(cpus for cpus, _ in there)
    cpus = max(1, min(_CPUS, most, total // (workers or (sum(gpus for _, gpus in there) if on_gpus else 1))))
    return cpus, sum(min(own // cpus, gpus if on_gpus else own) for own, gpus in there) or 1


class _Worker:
    def __init__(self, given: Any) -> None:
        make, device, threads, self.tries = ray.get(given)
        torch.set_num_threads(threads)
        self.work: Work[Any] = make(torch.device(device))

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        case, outcome = pickle.loads(row["case"]), None
        try:
            if begun(self.tries, case.id) > _TRIES:
                raise UserError(
                    f"{case.image}: its worker was killed twice: is it too large for this machine's memory?"
                )
            outcome = self.work(case)
        except (UserError, OSError) as error:
            outcome = error
        except Exception as error:  # whatever one volume brings about, the others go on
            outcome = UserError(f"{case.image}: {reason(error)}")
        return {"outcome": pickle.dumps((case, outcome))}
