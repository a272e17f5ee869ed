"""Load the folders that we wrote, in a peer's environment, and compare what it makes of them.

python theirs.py sae-lens|sparsify DIR        see interop.sh
"""

import json
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from rows import row
from safetensors.torch import load_file
from torch import Tensor


def sae_lens(folder: Path, x: Tensor) -> tuple[Tensor, Tensor]:
    """Features and reconstruction, by SAELens; it must know the model and the site, too."""
    from sae_lens import SAE

    sae = SAE.load_from_disk(folder)
    notes = json.loads((folder / "cfg.json").read_text())["metadata"]
    for name in ("model_name", "hook_name", "hook_name_out", "context_size", "prepend_bos", "dataset_path"):
        if sae.cfg.metadata[name] != notes.get(name):
            raise RuntimeError(f"{folder.name}: SAELens reads {name} as {sae.cfg.metadata[name]!r}")
    return sae.encode(x), sae(x)


def sparsify(folder: Path, x: Tensor) -> tuple[Tensor, Tensor]:
    """Features and reconstruction, by sparsify."""
    from sparsify import SparseCoder

    coder = SparseCoder.load_from_disk(folder)
    made = coder(x, torch.zeros_like(x))
    zero = torch.zeros(len(x), coder.num_latents)
    return zero.scatter(1, made.latent_indices, made.latent_acts), made.sae_out


PEERS: dict[str, Callable[[Path, Tensor], tuple[Tensor, Tensor]]] = {"sae-lens": sae_lens, "sparsify": sparsify}


@torch.no_grad()
def main() -> int:
    """1 if a folder means something else to the peer."""
    peer, root = sys.argv[1], Path(sys.argv[2])
    folders = sorted(one.parent for one in root.glob("*/expected.safetensors"))
    fine = [
        row("ours, read there", peer, one, *PEERS[peer](one, load_file(one / "expected.safetensors")["x"]))
        for one in folders
    ]
    return 0 if fine and all(fine) else 1


if __name__ == "__main__":
    sys.exit(main())
