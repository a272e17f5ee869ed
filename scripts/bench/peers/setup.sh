#!/usr/bin/env bash
# Makes the environment that the peers of scripts/bench/circuits.py run in: TransformerLens 2 and auto-circuit.
# Usage: bash scripts/bench/peers/setup.sh [FOLDER]     by default ~/.cache/mechinterp-peers
# EAP-IG is no package: put the `src` folder of a copy of github.com/hannamw/EAP-IG at FOLDER/eap-ig/src, or name it in
# the environment variable EAP_IG.
set -euo pipefail
folder="${1:-$HOME/.cache/mechinterp-peers}"
python="$(dirname "${BASH_SOURCE[0]}")/../../../.venv/bin/python"
mkdir -p "$folder"
"$python" -m venv "$folder/env"
pip() { "$folder/env/bin/python" -m pip install --quiet "$@"; }
pip torch==2.13.0 # the same as ours
pip transformer-lens==2.18.0 torch==2.13.0 matplotlib
pip 'pyarrow<21'                             # newer ones want the NumPy 2 that this TransformerLens forbids; pip warns
pip --no-deps auto-circuit==1.0.1 tracr-pypi # what else they ask for is for their notebooks
pip blobfile ordered-set plotly vscode-tqdm word2word
"$folder/env/bin/python" -c 'import auto_circuit.prune_algos.ACDC'
