#!/usr/bin/env bash
# Makes an environment for each peer that trains sparse autoencoders: SAELens, sparsify and dictionary_learning.
# Usage: bash scripts/bench/peers/setup_sae.sh [PEER…]     of: sae-lens sparsify dictionary-learning; by default all
# They lie in $MECHINTERP_PEERS, by default ~/.cache/mechinterp-peers, at PEER/bin/python.
set -euo pipefail
folder="${MECHINTERP_PEERS:-$HOME/.cache/mechinterp-peers}"
python="$(dirname "${BASH_SOURCE[0]}")/../../../.venv/bin/python"
[ $# -gt 0 ] || set -- sae-lens sparsify dictionary-learning
mkdir -p "$folder"
for peer in "$@"; do
    pip() { "$folder/$peer/bin/python" -m pip install --quiet "$@"; }
    case "$peer" in sae-lens | sparsify | dictionary-learning) ;; *)
        echo "no peer $peer; there are sae-lens, sparsify and dictionary-learning" >&2
        exit 2
        ;;
    esac
    "$python" -m venv "$folder/$peer"
    pip torch==2.13.0 # the same as ours
    case "$peer" in
    sae-lens)
        pip sae-lens==6.54.12 transformer-lens==3.9.0 transformers==5.24.0 torch==2.13.0
        module=sae_lens
        ;;
    sparsify)
        pip eai-sparsify==1.3.3 transformers==5.24.0 schedulefree==1.4.1 torch==2.13.0
        module=sparsify
        ;;
    dictionary-learning)
        pip nnsight==0.3.7 transformers==5.24.0 datasets==5.2.0 einops==0.8.2 pandas==3.1.1 tqdm==4.70.1 \
            wandb==0.31.0 zstandard==0.25.0 torch==2.13.0
        pip --no-deps dictionary-learning==0.1.0 # what else it asks for (umap-learn, plotly, …) is for figures
        # nnsight asks for torchvision, whose build need not fit torch's, and does not use it here.
        "$folder/$peer/bin/python" -m pip uninstall --quiet --yes torchvision
        module=dictionary_learning
        ;;
    esac
    "$folder/$peer/bin/python" -c "import $module; print('$peer: imports')"
done
