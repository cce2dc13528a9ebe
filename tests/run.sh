#!/usr/bin/env bash
# Installs into .venv-test and runs lint, types and all tests, slow ones included. Arguments go to pytest.
set -euo pipefail
cd "$(dirname "$0")/.."
export OMP_NUM_THREADS=1 RAY_DISABLE_IMPORT_WARNING=1
python3 -m venv .venv-test
. .venv-test/bin/activate
# A CPU build of torch first, where the package index has one: the default build brings gigabytes of CUDA.
pip install --quiet 'torch==2.13.0'
pip install --quiet -e '.[test]'
ruff check .
ruff format --check .
mypy ssl_ray
mypy experiments/benchmarks/*.py
lint-imports --no-cache
# Two processes: most slow tests wait for a Ray cluster of their own. The tests of a file share fixtures, and stay together;
# files in their own order, as by number of tests the slowest would come last, one process waiting for the other.
pytest -n 2 --dist loadfile --no-loadscope-reorder --durations=15 "$@"
