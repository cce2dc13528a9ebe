"""Random faults in one pretraining and one fine-tuning grid; the end must equal the undisturbed one, bit for bit.

    python experiments/benchmarks/chaos.py [--faults 24] [--seeds 0 1 2] [--keep FOLDER]

A study on a small synthetic cohort is carried out with the same command on a cluster of three Ray nodes on this
machine, with a real MLflow server: first in peace, then once for each seed with `--faults` random faults, three fifths
of them in the pretraining. Each fault waits until the study has got on since the last one. Afterwards the losses of
every step, the pretrained weights, and every metric and the weights of every trial are compared. On two cores peace
takes 4 minutes, and each seed 8 to 12.

Prints a table, and as its last line one JSON object with the counts and `ok`.
"""

import argparse
import contextlib
import json
import os
import random
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from glob import glob
from pathlib import Path
from typing import Any

os.environ |= {"OMP_NUM_THREADS": "1", "RAY_USAGE_STATS_ENABLED": "0"}

import psutil
import torch
import yaml
from ray.cluster_utils import Cluster
from safetensors.torch import load_file

from ssl_ray.config.schema import PhantomCohort
from ssl_ray.phantom.cohort import write_cohort
from ssl_ray.study.experiment import load
from ssl_ray.study.parts import folders_of, tracker_of

KINDS = {
    "worker": "SIGKILL to a training worker or a trial",
    "data task": "SIGKILL to a process that reads patches",
    "node": "a whole Ray node killed, a new one 3 s later",
    "driver": "SIGKILL to the driver, the same command again",
    "stop": "SIGTERM to the driver (`ray job stop`), the same command again",
    "server": "SIGKILL to the MLflow server, started again 8 s later or more",
    "torn checkpoint": "SIGKILL to the driver, its newest checkpoint cut off, the same command again",
}
PRETRAINING_STEPS, TRIAL_STEPS = 3600, 600


@dataclass
class Row:
    """One fault: what, in which stage, and the seconds until a checkpoint was written after it."""

    kind: str
    stage: str
    at: float
    recovered: float


class Site:
    """A cluster, an MLflow server and a study on them, each of which can be killed and started again."""

    def __init__(self, folder: Path, cohort: Path) -> None:
        folder.mkdir(parents=True)
        self.folder, self.port = folder, free_port()
        self.output = folder / "output"
        self.experiment = folder / "chaos.yaml"
        self.experiment.write_text(yaml.safe_dump(study(self.output, cohort, f"http://127.0.0.1:{self.port}")))
        self.log = (folder / "driver.log").open("ab")
        self.driver: subprocess.Popen[bytes] | None = None
        self.server: subprocess.Popen[bytes] | None = None
        self.cluster: Any = None

    def __enter__(self) -> "Site":
        small = {"object_store_memory": 150 * 10**6}
        self.cluster = Cluster(
            initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False, **small}
        )
        for _ in range(2):
            self.add_node()
        self.start_server()
        self.start_driver()
        return self

    def __exit__(self, *_: object) -> None:
        for process in (self.driver, self.server):
            end(process)
        self.cluster.shutdown()

    def add_node(self) -> None:
        """One more node of one CPU."""
        self.cluster.add_node(num_cpus=1, object_store_memory=150 * 10**6)

    def start_server(self) -> None:
        """`mlflow server` on SQLite, and wait until it answers."""
        command = [sys.executable, "-m", "mlflow", "server", "--port", str(self.port), "--workers", "1"]
        command += ["--backend-store-uri", f"sqlite:///{self.folder / 'mlflow.db'}"]
        command += ["--artifacts-destination", str(self.folder / "artifacts")]
        self.server = subprocess.Popen(command, stdout=self.log, stderr=self.log, start_new_session=True)
        for _ in range(1500):  # five minutes: on a busy machine MLflow takes its time to make its tables
            with contextlib.suppress(OSError):
                urllib.request.urlopen(f"http://127.0.0.1:{self.port}/health", timeout=1)
                return
            time.sleep(0.2)
        raise RuntimeError(f"the MLflow server does not answer; see {self.log.name}")

    def start_driver(self) -> None:
        """The one command of the study."""
        command = [sys.executable, "-m", "ssl_ray", "finetune", str(self.experiment)]
        environment = {**os.environ, "RAY_ADDRESS": self.cluster.address}
        self.driver = subprocess.Popen(
            command, env=environment, stdout=self.log, stderr=self.log, start_new_session=True
        )

    def finished(self) -> bool:
        """Whether the command has ended; a failure ends the benchmark."""
        assert self.driver
        code = self.driver.poll()
        if code not in (None, 0):
            raise RuntimeError(f"the study ended with exit code {code}; see {self.log.name}")
        return code == 0

    def checkpoints(self) -> dict[Path, float]:
        """Manifests of all checkpoints, and when they were written."""
        found = {}
        for path in self._written("chaos/**/manifest.json"):
            with contextlib.suppress(OSError):
                found[path] = path.stat().st_mtime
        return found

    def _written(self, pattern: str) -> list[Path]:
        # Unlike `Path.glob`, this goes on where a folder is gone before it is looked into.
        return list(map(Path, glob(f"{self.output}/{pattern}", recursive=True)))

    def stage(self) -> str:
        """Which half of the study is going on."""
        return "grid" if self._pretrained() else "pretraining"

    def _pretrained(self) -> bool:
        return (self.output / "chaos" / "finetune.yaml").is_file()

    def processes(self, *names: str) -> list[psutil.Process]:
        """Ray workers on this cluster whose title has one of the names."""
        found = []
        for node in [self.cluster.head_node, *self.cluster.worker_nodes]:
            for process in raylet(node).children(recursive=True):
                with contextlib.suppress(psutil.Error):
                    if any(name in " ".join(process.cmdline()) for name in names):
                        found.append(process)
        return found


def study(output: Path, cohort: Path, uri: str) -> dict[str, Any]:
    """The experiment: minutes in peace, and checkpoints often enough for faults to follow each other."""
    preparation = {"spacing": 9, "hu_window": [-175, 250]}
    return {
        "name": "chaos",
        "output": str(output),
        "network": {"hidden_size": 48, "mlp_dim": 64, "num_heads": 3, "feature_size": 4},
        "tracking": {"uri": uri},
        "pretrain": {
            "sources": [{"root": str(cohort), "datalist": "unlabelled.json"}],
            "preparation": preparation,
            "patch_size": 16,
            "batch_size": 4,
            "epochs": PRETRAINING_STEPS // 2,
            "validate_every": 50,
            "log_every": 2,
            "checkpoint_every": 20,
            "block_megabytes": 0.3,
            "task": {"corruption": {"inpaint_size": [2, 6], "outpaint_size": [4, 10], "shuffle_size": 3}},
            "precision": "float32",
            "max_failures": -1,
        },
        "finetune": {
            "cohort": {"root": str(cohort), "classes": 14, "splits": {2: "labelled_2.json", 4: "labelled_4.json"}},
            "preparation": preparation,
            "patch_size": 16,
            "patches_per_volume": 2,
            "steps": TRIAL_STEPS,
            "validate_every": 20,
            "checkpoint_minutes": 0,
            "precision": "float32",
            "max_failures": -1,
            "max_concurrent_trials": 2,
        },
    }


def disturb(site: Site, kind: str, dice: random.Random) -> None:
    """Carry out one fault."""
    assert site.driver
    if kind in ("worker", "data task"):
        names = ("RayTrainWorker", "ImplicitFunc", "trainable") if kind == "worker" else ("_read_block",)
        while not (found := site.processes(*names)):
            if site.finished():
                return
            time.sleep(0.02)
        with contextlib.suppress(psutil.Error):
            dice.choice(found).send_signal(signal.SIGKILL)
    elif kind == "node":
        site.cluster.remove_node(dice.choice(sorted(site.cluster.worker_nodes, key=str)), allow_graceful=False)
        time.sleep(3)
        site.add_node()
    elif kind == "server":
        end(site.server)
    else:
        if kind == "stop":
            site.driver.terminate()
            site.driver.wait(120)
        end(site.driver)
        while site.processes("RayTrainWorker", "ImplicitFunc"):  # which Ray ends when it misses their driver
            time.sleep(0.1)
        newest = max(site.checkpoints().items(), key=lambda item: item[1])[0].parent / "state.pt"
        if kind == "torn checkpoint" and newest.is_file():
            with newest.open("r+b") as file:
                file.truncate(newest.stat().st_size // 2)
        site.start_driver()


def chaos(site: Site, faults: int, dice: random.Random) -> list[Row]:
    """Faults, one after the other, each after the study has got on since the last."""
    rows: list[Row] = []
    while not site.checkpoints():
        time.sleep(0.05)
    began = time.monotonic()
    kinds: list[str] = []
    grid_share = faults * 2 // 5
    while len(rows) < faults and not site.finished():
        stage = site.stage()
        if stage == "pretraining" and len(rows) >= faults - grid_share:
            time.sleep(0.2)  # the rest is for the grid
            continue
        kinds = kinds or dice.sample(list(KINDS), len(KINDS))
        kind = kinds.pop()
        if kind == "data task" and stage == "grid":  # trials read their patches themselves
            kind = "worker"
        time.sleep(dice.uniform(0.2, 3.0))
        at = time.monotonic()
        disturb(site, kind, dice)
        known = site.checkpoints()
        while not site.finished() and not any(stamp > known.get(path, 0) for path, stamp in site.checkpoints().items()):
            time.sleep(0.05)
        rows.append(Row(kind, stage, at - began, time.monotonic() - at))
        if kind == "server":
            time.sleep(max(0.0, 8 - rows[-1].recovered))
            site.start_server()
        print(f"{rows[-1].at:6.0f} s  {stage:<11}  {kind:<15}  recovered after {rows[-1].recovered:5.1f} s", flush=True)
    while not site.finished():
        time.sleep(0.2)
    return rows


def carried_out(
    folder: Path, cohort: Path, faults: int, dice: random.Random
) -> tuple[dict[str, Any], float, list[Row]]:
    """The study under a number of faults: what it ended with, the seconds it took, and the faults."""
    began = time.monotonic()
    with Site(folder, cohort) as site:
        rows = chaos(site, faults, dice)
        return results(site), time.monotonic() - began, rows


def results(site: Site) -> dict[str, Any]:
    """Everything that two runs of the study must agree on, by name, and how each start went."""
    config = load(site.experiment, [])
    tracker = tracker_of(config)
    out: dict[Any, Any] = {"runs": Counter(), "replayed": []}
    for run in tracker.runs():
        kind = run.data.tags["ssl_ray.kind"]
        out["runs"][kind, run.info.status] += 1
        name = run.info.run_name
        for metric in run.data.metrics:
            if metric == "system/replayed_steps":
                out["replayed"] += tracker.history(run.info.run_id, metric).values()
            elif not metric.startswith("system/"):
                points = tracker.client.get_metric_history(run.info.run_id, metric)
                out[name, metric] = sorted((point.step, point.value) for point in points)
    for pattern in ("pretrain-*/best.safetensors", "**/model.safetensors"):
        for path in sorted(folders_of(config).study.glob(pattern)):
            cell = "pretrain" if path.name.startswith("best") else path.parent.name
            out[cell, "weights"] = load_file(path)
    return out


def differences(found: dict[str, Any], expected: dict[str, Any]) -> list[str]:
    """Names of what is not the same."""
    wrong = []
    for name in sorted(found.keys() | expected.keys(), key=str):
        if name == "replayed":
            continue
        one, other = found.get(name), expected.get(name)
        if isinstance(one, dict) and isinstance(other, dict) and not isinstance(one, Counter):
            same = one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)
        else:
            same = one == other
        if not same:
            wrong.append(str(name))
    return wrong


def raylet(node: Any) -> psutil.Process:
    """The process of a node's raylet."""
    return psutil.Process(node.all_processes["raylet"][0].process.pid)


def end(process: subprocess.Popen[bytes] | None) -> None:
    """SIGKILL to a process group that was started here."""
    if process and process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def free_port() -> int:
    """A port on loopback that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def table(rows: list[Row]) -> Iterator[str]:
    """Markdown: faults by kind and stage."""
    yield "| fault | in the pretraining | in the grid | until the next checkpoint, median s | longest s |"
    yield "|---|---:|---:|---:|---:|"
    for kind, text in KINDS.items():
        mine = [row for row in rows if row.kind == kind]
        if mine:
            times = sorted(row.recovered for row in mine)
            stages = Counter(row.stage for row in mine)
            middle = times[len(times) // 2]
            yield f"| {text} | {stages['pretraining']} | {stages['grid']} | {middle:.1f} | {times[-1]:.1f} |"


def main() -> int:
    """Run the study in peace and under each seed's faults, and compare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--faults", type=int, default=24)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--keep", type=Path, help="an empty folder for everything that is written")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        root = options.keep or Path(scratch)
        cohort = root / "cohort"
        numbers = {"unlabelled": 6, "labelled": 4, "validation": 2, "test": 1, "seed": 1}
        write_cohort(PhantomCohort(root=str(cohort), splits=(2, 4), **numbers))
        expected, peace, _ = carried_out(root / "peace", cohort, 0, random.Random())
        print(f"in peace: {peace:.0f} s", flush=True)
        rows: list[Row] = []
        each: list[dict[str, Any]] = []
        for seed in options.seeds:
            found, seconds, faults = carried_out(root / f"seed_{seed}", cohort, options.faults, random.Random(seed))
            rows += faults
            wrong = differences(found, expected)
            for name in wrong:
                print(f"seed {seed}: differs: {name}")
            each.append(
                {
                    "seed": seed,
                    "faults": len(faults),
                    "seconds": round(seconds),
                    "pretraining_starts": len(found["replayed"]),
                    "pretraining_steps_done_again": int(sum(found["replayed"])),
                    "compared": len(found) - 1,
                    "differences": len(wrong),
                }
            )
            print(json.dumps(each[-1]), flush=True)
    print("\n".join(["", *table(rows), ""]))
    enough = min(20, options.faults)
    summary = {
        "kinds": dict(Counter(row.kind for row in rows)),
        "seconds_in_peace": round(peace),
        "seeds": each,
        "ok": all(not one["differences"] and one["faults"] >= enough for one in each),
    }
    print(json.dumps(summary))
    return 0 if summary["ok"] else 1


if __name__ == "__main__":
    sys.exit(main())
