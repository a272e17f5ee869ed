#!/usr/bin/env bash
# Which attention heads carry the indirect object? Sets up, then runs experiments/ioi_patching.py with the given flags.
# The last line is the absolute path of the report. Safe to run again: what is finished is not done twice.
set -euo pipefail
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
bash "$root/scripts/setup.sh"
cd "$root"
exec .venv/bin/python experiments/ioi_patching.py "$@"
