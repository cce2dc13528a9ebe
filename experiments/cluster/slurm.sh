#!/bin/bash
# A study under Slurm: a Ray cluster of the job's own machines, for as long as the job. From the root of a clone that all
# machines share, with the package in .venv:
#
#     sbatch experiments/cluster/slurm.sh run my_study.yaml --set output=/shared/output
#
# After the time limit, or a machine that failed, the same line goes on where it was; --requeue does that by itself.
# "site:" marks what you have to decide.
#
# site: machines, their CPUs and GPUs, hours; a partition or an account, where yours asks for them.
#SBATCH --nodes=2
#SBATCH --cpus-per-task=16
#SBATCH --gpus-per-node=4
#SBATCH --time=24:00:00
# One Ray a machine, and no other job there: at its end, `ray symmetric-run` stops all Ray that it finds. --exclusive
# gives all CPUs, but only the memory that is asked for: 0 means all of it.
#SBATCH --ntasks-per-node=1
#SBATCH --exclusive
#SBATCH --mem=0
#SBATCH --requeue
#SBATCH --job-name=ssl-ray
#SBATCH --output=ssl-ray-%j.log
#SBATCH --open-mode=append
set -euo pipefail
. .venv/bin/activate  # site: or modules, or a Conda environment

export RAY_AUTH_MODE=token RAY_AUTH_TOKEN RAY_USAGE_STATS_ENABLED=0
RAY_AUTH_TOKEN=$(python -c 'import secrets; print(secrets.token_hex(32))')  # for this job alone; srun hands it on
export RAY_SYMMETRIC_RUN_CLUSTER_WAIT_TIMEOUT=300  # s; Python may start slowly from a shared folder
# This script runs on the job's first machine, the head. Not by its name, which on itself may mean 127.0.1.1.
# site: another of its addresses, where the first is not the fast network.
read -r head _ < <(hostname --all-ip-addresses)
address="$head:$((20000 + SLURM_JOB_ID % 10000))"

# Without --cpus-per-task, srun does not know what sbatch was asked for; Ray does not, either.
srun --cpus-per-task="$SLURM_CPUS_PER_TASK" ray symmetric-run --address "$address" --min-nodes "$SLURM_JOB_NUM_NODES" \
    --num-cpus "$SLURM_CPUS_PER_TASK" -- env RAY_ADDRESS="$address" ssl-ray "$@"
