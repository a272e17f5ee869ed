#!/usr/bin/env bash
# Folders of sparse autoencoders go both ways between us and the peers, each in its own environment, and mean the same.
# Usage: bash scripts/interop.sh     after bash scripts/bench/peers/setup_sae.sh; not part of test.sh
# Prints a table of the largest differences, relative to the largest value. Exit code 1 if one exceeds 1e-5, 2 if an
# environment is missing.
#
# 1. We write folders of every kind that the peer has, and what we make of an input; the peer loads them and compares.
# 2. The peer writes its own (scripts/reference/make_sae_folders.py) and what it makes of them; we load and compare.
set -euo pipefail
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
peers="${MECHINTERP_PEERS:-$HOME/.cache/mechinterp-peers}"
here="$root/scripts/interop"
for peer in sae-lens sparsify dictionary-learning; do
    [ -x "$peers/$peer/bin/python" ] || {
        echo "no environment $peers/$peer: bash scripts/bench/peers/setup_sae.sh $peer" >&2
        exit 2
    }
done
work="$(mktemp -d)"
trap 'rm -rf "$work"' EXIT
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}" HF_HUB_OFFLINE=1
failed=0
printf '%-20s %-22s %-26s %12s %15s\n' direction peer kind features reconstruction
for peer in sae-lens sparsify; do # dictionary_learning is read, not written
    "$root/.venv/bin/python" "$here/ours.py" write "$peer" "$work/ours/$peer"
    "$peers/$peer/bin/python" "$here/theirs.py" "$peer" "$work/ours/$peer" || failed=1
done
for peer in sae-lens sparsify dictionary-learning; do
    "$peers/$peer/bin/python" "$root/scripts/reference/make_sae_folders.py" "$peer" --out "$work/theirs" >"$work/log"
    "$root/.venv/bin/python" "$here/ours.py" check "$peer" "$work/theirs/$peer" || failed=1
done
exit "$failed"
