#!/usr/bin/env bash
# Installs into .venv and runs the linter and all tests:  bash runs/test.sh [pytest arguments]
set -euo pipefail
cd "$(dirname "$0")/.."
source runs/_setup.sh
setup dev
ruff check .
exec python -m pytest "$@"
