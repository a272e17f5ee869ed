#!/usr/bin/env bash
# Sets up, then runs every check: lint, format, types, tests. Flags go to pytest: bash scripts/test.sh -m 'not real_model'
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
bash scripts/setup.sh dev
.venv/bin/python -m ruff check
.venv/bin/python -m ruff format --check
.venv/bin/python -m pyright --pythonpath .venv/bin/python
# One thread and one worker a core: two threads in two workers wait for each other. Each worker holds the real model.
export OMP_NUM_THREADS=1
exec .venv/bin/python -m pytest -n logical --maxprocesses 4 --dist worksteal "$@"
