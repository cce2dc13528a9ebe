"""Pretraining end to end: `ssl-ray pretrain` against a plain MONAI + torchrun script, and against its own ceiling.

    PYTHONPATH=. python experiments/benchmarks/pretrain.py [--quick] [--float32] (about 10 minutes on two cores)

Both read the same NIfTI files, train the same network on the same recipe (one view, MONAI's growing boxes) with one
training process of one thread, and have the second core for their data. Rates are those from the first logged step to
the last, validations between them included; neither preparation nor start-up counts: prepare.py, start.py.
The ceiling is our own step on patches that lie in memory.
"""

import json
import os
import statistics
import sys
import time
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from cohort import ct, write_cohort
from timing import Bench, Cost, Watched, main

from ssl_ray.pretrain.job import Job
from ssl_ray.pretrain.learner import PretrainingLearner
from ssl_ray.pretrain.samples import SampleTable
from ssl_ray.pretrain.stream import Feed
from ssl_ray.storage.mirror import Mirror
from ssl_ray.study.experiment import load
from ssl_ray.study.parts import recipe_of, tracker_of
from ssl_ray.tracking.tracker import Tracker

TINY = {"hidden_size": 192, "mlp_dim": 768, "num_heads": 3}
VIT_B = {"hidden_size": 768, "mlp_dim": 3072, "num_heads": 12}
FLOORS = {"tiny": {"bfloat16": 1.5, "float32": 1.5}, "ViT-B": {"bfloat16": 1.8, "float32": 1.2}}
"""Times as fast as the script, by the clock, on each kind of CPU."""


@dataclass(frozen=True)
class Case:
    """A recipe: `volumes` give two patches each to a step."""

    network: dict[str, int]
    volumes: int
    epochs: int
    validate_every: int
    lr: float
    side: int = 96
    training: int = 16

    @property
    def batch(self) -> int:
        """Patches a step."""
        return 2 * self.volumes

    @property
    def boxes(self) -> dict[str, Any]:
        """Corruption for the side."""
        if self.side == 96:
            return {"inpaint_size": [5, 32], "outpaint_size": [20, 64], "shuffle_size": 8}
        return {"inpaint_size": [3, 10], "outpaint_size": [8, 20], "shuffle_size": 4}


@dataclass(frozen=True)
class Outcome:
    """Of one run: its rate, when which validation loss was reached since the first step, and the start-up."""

    cost: Cost
    losses: list[tuple[float, float]]
    startup: float
    waits: float = 0.0
    steady: float = 0.0


def plain(bench: Bench, case: Case, root: Path, name: str) -> Outcome:
    """The script of plain_pretrain.py under torchrun."""
    boxes = case.boxes
    recipe = {
        "seed": 0,
        "side": case.side,
        "inside": boxes["inpaint_size"],
        "outside": boxes["outpaint_size"],
        "shuffle": boxes["shuffle_size"],
        "network": case.network,
        "volumes": case.volumes,
        "loader_workers": 1,
        "epochs": case.epochs,
        "validate_every": case.validate_every,
        "lr": case.lr,
    }
    out = bench.folder / f"{name}.json"
    script = Path(__file__).parent / "plain_pretrain.py"
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "1", str(script)]
    watched = Watched(
        [*torchrun, "--root", str(root), "--out", str(out), "--recipe", json.dumps(recipe)], out.with_suffix(".log")
    )
    try:
        watched.wait()
    finally:
        watched.stop()
    found = json.loads(out.read_text())
    return outcome(watched, found["steps"], [(at, loss) for at, _, loss in found["validations"]])


def carried_out(bench: Bench, verb: str, name: str, study: dict[str, Any]) -> tuple[Watched, Tracker]:
    """A study, as far as a verb goes, on a Ray of its own -> its ended process, and what it has logged."""
    path = bench.folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(study))
    command, log = [sys.executable, "-m", "ssl_ray", verb, str(path)], path.with_suffix(".log")
    watched = Watched(command, log, RAY_ADDRESS="", SSL_RAY_TRACEBACK="1")
    try:
        watched.wait()
    finally:
        watched.stop()
    return watched, tracker_of(load(path, []))


def outcome(watched: Watched, steps: list[Any], losses: list[tuple[float, float]], **more: float) -> Outcome:
    """Rates from the first to the last of `steps`: (time, patches since the one before, ...)."""
    first, last = steps[0][0], steps[-1][0]
    patches = sum(step[1] for step in steps[1:])
    cost = Cost((last - first) / patches, (watched.cpu(last) - watched.cpu(first)) / patches)
    return Outcome(cost, [(at - first, loss) for at, loss in losses], first - watched.started, **more)


def ours(bench: Bench, case: Case, root: Path, name: str) -> Outcome:
    """`ssl-ray pretrain` on a Ray of its own."""
    watched, tracker = carried_out(bench, "pretrain", name, experiment(bench, case, root, name))
    (run,) = tracker.runs(kind="pretraining")

    def history(metric: str) -> list[Any]:
        found = tracker.client.get_metric_history(run.info.run_id, metric)
        return sorted(found, key=lambda point: point.step)

    # The script's last step is over before its validation. Ours is logged with what ends a run: validation, probe,
    # weights, checkpoint, which after the ten steps of ViT-B are a third of the time.
    points = history("system/patches_per_second")[:-1]
    steps = [(point.timestamp / 1000, 0) for point in points]
    for index in range(1, len(points)):
        steps[index] = steps[index][0], case.batch * (points[index].step - points[index - 1].step)
    validated = {point.step for point in history("validation_loss")}
    after = {point.step for before, point in pairwise(points) if before.step in validated}
    steady = [point.value for point in points[1:] if point.step not in after]
    waits = [point.value / 100 for point in history("system/data_wait_percentage")[1:]]
    losses = [(point.timestamp / 1000, point.value) for point in history("validation_loss")]
    return outcome(watched, steps, losses, waits=statistics.mean(waits), steady=statistics.median(steady))


def experiment(bench: Bench, case: Case, root: Path, name: str) -> dict[str, Any]:
    """The recipe as an experiment file."""
    preparation = {"spacing": 2, "hu_window": [-57, 164]}
    steps = case.epochs * case.training // case.volumes
    return {
        "name": name,
        "output": str(bench.folder / f"output-{name}"),
        "cache": str(bench.folder / "cache"),
        "cluster": {"cpus": 2, "object_store_gigabytes": 0.4},
        "network": case.network,
        "pretrain": {
            "sources": [{"root": str(root), "datalist": "unlabelled.json"}],
            "preparation": preparation,
            "patch_size": case.side,
            "batch_size": case.batch,
            "epochs": case.epochs,
            "validate_every": case.validate_every,
            "picture_every": 1000,
            "log_every": max(1, steps // 16),
            "precision": bench.precision,
            "task": {"corruption": {"growing": True} | case.boxes},
            "optimizer": {"name": "adam", "lr": case.lr},
        },
        "finetune": {
            "cohort": {"root": str(root), "classes": 14, "splits": {1: "labelled_1.json"}},
            "preparation": preparation,
            "patch_size": case.side,
        },
    }


def ceiling(bench: Bench, case: Case, root: Path, name: str) -> Any:
    """A call that makes one step of ours on patches in memory, and says how many patches that was."""
    path = bench.folder / f"{name}-ceiling.yaml"
    path.write_text(yaml.safe_dump(experiment(bench, case, root, name)))
    study = load(path, [])
    size = study.pretrain.patch_size
    table = SampleTable(0, np.array([[side * 2 for side in size]] * case.training), size, 2, case.batch, case.epochs)
    feed = Feed(table, "", ("",) * case.training, ("",) * case.training, "uint8", 255)  # type: ignore[arg-type]
    learner = PretrainingLearner(
        Job(recipe_of(study), feed, feed, bench.folder, Mirror(bench.folder), "key", None), torch.device("cpu")
    )  # type: ignore[arg-type]
    soft = np.clip((ct(size, 0).astype(np.float32) + 57) / 221 * 255, 0, 255).astype(np.uint8)
    images = np.stack([soft] * case.batch)
    state = iter(range(10**6))

    def call() -> int:
        index = next(state) * case.batch
        learner.step(images, np.arange(index, index + case.batch), case.lr)
        return case.batch

    return call


def reached(losses: list[tuple[float, float]], target: float) -> float:
    """Seconds until the validation loss was down to a target, linear between validations; inf if it never was."""
    before: tuple[float, float] | None = None
    for at, loss in losses:
        if loss <= target:
            if before is None:
                return at
            return before[0] + (at - before[0]) * (before[1] - target) / max(before[1] - loss, 1e-9)
        before = at, loss
    return float("inf")


def run(bench: Bench) -> None:
    """Each network: plain, ours, ours, plain, and the ceiling between them."""
    if bench.quick:
        cases = {"tiny": Case({"hidden_size": 48, "mlp_dim": 96, "num_heads": 3}, 2, 4, 2, 1e-3, 32, 4)}
        shape = (60, 50, 40)
    else:
        cases = {
            "tiny": Case(TINY, 4, 16, 4, 1e-3),
            "ViT-B": Case(VIT_B, 1, 1, 1, 1e-4, training=10),
        }
        shape = (180, 150, 130)
    for name, case in cases.items():
        root = bench.folder / f"cohort-{name}"
        write_cohort(root, case.training, 2 if bench.quick else 4, shape)
        found: dict[str, list[Outcome]] = {"MONAI + torchrun": [], "ours": []}
        memory: list[Cost] = []
        step = ceiling(bench, case, root, name)
        step()
        for turn, kind in enumerate([*found, *reversed(found)][: 2 if bench.quick else 4]):
            run_one = {"MONAI + torchrun": plain, "ours": ours}[kind]
            start = time.monotonic()
            found[kind].append(run_one(bench, case, root, f"{name}-{turn}"))
            print(f"{name}: {kind} took {time.monotonic() - start:.0f} s", flush=True)
            for _ in range(3 if name == "ViT-B" else 5):
                wall, cpu = time.perf_counter(), time.process_time()
                count = step()
                memory.append(Cost((time.perf_counter() - wall) / count, (time.process_time() - cpu) / count))
        costs = {kind: [one.cost for one in outcomes] for kind, outcomes in found.items()}
        medians = bench.table(f"pretraining, {name}", costs | {"our step, data in memory": memory}, "patches")
        plainly, mine = medians["MONAI + torchrun"], medians["ours"]
        top = medians["our step, data in memory"]
        label = f"pretraining, {name}"
        bench.ratio(label, plainly, mine)
        bench.floor(f"{label} (wall)", plainly.wall / mine.wall, at_least=FLOORS[name][bench.precision])
        steady = statistics.median(one.steady for one in found["ours"])
        bench.ratios[f"{label}, share of the ceiling"] = share = steady * top.wall
        bench.floor(f"{label}, share of the ceiling", share, at_least=0.95)
        bench.facts[f"{label}, share waiting for data"] = statistics.mean(one.waits for one in found["ours"])
        bench.facts[f"{label}, start-up"] = {kind: [one.startup for one in runs] for kind, runs in found.items()}
        bench.facts[f"{label}, losses"] = {kind: [one.losses for one in runs] for kind, runs in found.items()}
        target = max(one.losses[-1][1] for runs in found.values() for one in runs)  # which all of them reach
        times = {kind: statistics.median(reached(one.losses, target) for one in runs) for kind, runs in found.items()}
        bench.ratios[f"{label}, time to validation loss {target:.4f}"] = times["MONAI + torchrun"] / times["ours"]
        print(f"share waiting for data {bench.facts[f'{label}, share waiting for data']:.3f}; seconds to {target:.4f}:")
        print(f"  {times}; from launch to the first logged step {bench.facts[f'{label}, start-up']}")


if __name__ == "__main__":
    os.environ["RAY_ADDRESS"] = ""
    main(__doc__ or "", run)
