#!/usr/bin/env bash
# Installs into .venv and runs the linter and all tests:  bash runs/test.sh [pytest arguments]
set -euo pipefail
cd "$(dirname "$0")/.."
source runs/_setup.sh
setup dev
ruff check .
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} # a process for each core, and a thread for each process
exec python -m pytest -n auto --dist loadfile "$@"
