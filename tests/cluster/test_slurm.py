"""The script for Slurm on two machines; there is no Slurm here, so that the test stands in for `srun`."""

import subprocess
import sys
from pathlib import Path

import pytest
from machines import ROOT, clean_environment, machines
from runs import wait_for, write

from ssl_ray.networks.weight_files import load_weights
from ssl_ray.study.experiment import load
from ssl_ray.study.parts import folders_of

pytestmark = pytest.mark.slow

_SRUN = """#!/bin/bash
printf '%s\\0' "$@" > "$SRUN/words"; env -0 > "$SRUN/environment"; touch "$SRUN/asked"
until [ -e "$SRUN/code" ]; do sleep 0.2; done
exit "$(cat "$SRUN/code")"
"""
"""Tells the test what it was asked to start, once a machine, and ends as the test then says."""


def test_a_pretraining_on_two_machines(cohort: Path, tmp_path: Path) -> None:
    """The head comes up last: one worker on each machine, exit code 0, no Ray left; the token is the job's own."""
    srun, clone = tmp_path / "srun", tmp_path / "clone"
    (clone / ".venv" / "bin").mkdir(parents=True)
    (clone / ".venv" / "bin" / "activate").write_text(f"PATH={srun}:{Path(sys.executable).parent}:$PATH")
    srun.mkdir()
    (srun / "srun").write_text(_SRUN)
    (srun / "srun").chmod(0o755)
    path = write(tmp_path, cohort, workers=2, epochs=2)
    slurm = {"SLURM_JOB_ID": "77", "SLURM_CPUS_PER_TASK": "1", "SLURM_JOB_NUM_NODES": "2", "SRUN": str(srun)}
    environment = clean_environment() | slurm | {"PYTHONPATH": str(ROOT)}
    log = (tmp_path / "slurm.log").open("wb")
    with machines(tmp_path / "machines", "first", "second") as (_, (first, second)):
        script = ["bash", str(ROOT / "experiments/cluster/slurm.sh"), "pretrain", str(path)]
        there = first.command("env", "-C", str(clone), *script)
        batch = subprocess.Popen(there, env=environment, stdout=log, stderr=log)
        wait_for(lambda: (srun / "asked").exists(), "srun", 30)
        option, *words = (srun / "words").read_text().rstrip("\0").split("\0")
        assert option == "--cpus-per-task=1"
        handed = dict(one.split("=", 1) for one in (srun / "environment").read_text().rstrip("\0").split("\0"))
        soon = {"RAY_gcs_rpc_server_reconnect_timeout_s": "5"}  # the head's Ray is gone: a minute is the default
        begun = [subprocess.Popen(second.command(*words), env=handed | soon, stdout=log, stderr=log)]
        with pytest.raises(subprocess.TimeoutExpired):
            begun[0].wait(10)
        begun.append(subprocess.Popen(first.command(*words), env=handed, stdout=log, stderr=log))
        text = (tmp_path / "slurm.log").read_text
        codes = [process.wait(240) for process in begun]
        (srun / "code").write_text(str(max(codes)))
        assert batch.wait(30) == 0, text()

        def left() -> str:
            return "".join(one.run("pgrep", "-fl", "raylet|gcs_server", env=handed).stdout for one in (first, second))

        wait_for(lambda: not left(), "the end of all Ray", 30)
    assert load_weights(next(folders_of(load(path)).study.glob("pretrain-*/best.safetensors")))
    assert handed["RAY_AUTH_TOKEN"] not in text()
