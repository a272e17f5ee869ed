#!/usr/bin/env bash
# Which attention heads carry the indirect object? Sets up, then runs experiments/ioi_patching.py with the given flags.
# The last line is the absolute path of the report. Safe to run again: what is finished is not done twice.
set -euo pipefail
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
bash "$root/scripts/setup.sh"
cd "$root"
# glibc gives large blocks back to the kernel and fetches them again in every layer; kept, one-token runs take a quarter
# less time. Other systems ignore these.
export MALLOC_MMAP_THRESHOLD_=33554432 MALLOC_TRIM_THRESHOLD_=4294967296
exec .venv/bin/python experiments/ioi_patching.py "$@"
