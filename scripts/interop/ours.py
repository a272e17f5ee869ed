"""Write folders for a peer to read, or read those that a peer wrote.

python ours.py write|check sae-lens|sparsify|dictionary-learning DIR        see interop.sh
"""

import sys
from dataclasses import replace
from pathlib import Path

import torch
from rows import row
from safetensors.torch import load_file, save_file

from mechinterp.errors import UserError
from mechinterp.sae.architectures import make
from mechinterp.sae.autoencoder import SAEConfig, SparseAutoencoder
from mechinterp.sae.formats import load, save_saelens, save_sparsify
from mechinterp.sae.metadata import Metadata

D_IN, D_OUT, D_SAE, K, BATCH = 32, 24, 128, 8, 64
ACROSS = {"d_out": D_OUT, "centred": False}
KINDS = {
    "sae-lens": {
        "standard": SAEConfig("standard", D_IN, D_SAE),
        "standard_bare": SAEConfig("standard", D_IN, D_SAE, centred=False),
        "gated": SAEConfig("gated", D_IN, D_SAE),
        "topk": SAEConfig("topk", D_IN, D_SAE, k=K),
        "batchtopk": SAEConfig("batchtopk", D_IN, D_SAE, k=K),
        "matryoshka": SAEConfig("matryoshka", D_IN, D_SAE, k=K, prefixes=(16, 64, D_SAE)),
        "jumprelu": SAEConfig("jumprelu", D_IN, D_SAE),
        "transcoder": SAEConfig("standard", D_IN, D_SAE, **ACROSS),
        "skip_transcoder": SAEConfig("standard", D_IN, D_SAE, skip=True, **ACROSS),
        "jumprelu_transcoder": SAEConfig("jumprelu", D_IN, D_SAE, **ACROSS),
        "batchtopk_transcoder": SAEConfig("batchtopk", D_IN, D_SAE, k=K, **ACROSS),
        "batchtopk_skip_transcoder": SAEConfig("batchtopk", D_IN, D_SAE, k=K, skip=True, **ACROSS),
    },
    "sparsify": {
        "topk": SAEConfig("topk", D_IN, D_SAE, k=K),
        "topk_skip": SAEConfig("topk", D_IN, D_SAE, k=K, skip=True),
        "transcoder": SAEConfig("topk", D_IN, D_SAE, k=K, centred=False),
        "skip_transcoder": SAEConfig("topk", D_IN, D_SAE, k=K, centred=False, skip=True),
    },
}
# What these say has no equal here: reading them must fail, and say why.
REFUSED = {
    "standard_expected_average", "standard_constant_norm", "standard_layer_norm", "standard_hook_z", "matching_pursuit",
    "groupmax",
}  # fmt: skip
NARROW = {"standard_bfloat16"}  # computed in bfloat16 there and in float32 here


def random(name: str, config: SAEConfig) -> SparseAutoencoder:
    """Weights, biases and thresholds from a seed; none is 0."""
    site = ("blocks.2.hook_resid_post",)
    writes = ("blocks.2.hook_mlp_out",) if "transcoder" in name else site
    metadata = Metadata(model="gpt2", reads=site, writes=writes, context=128, bos=True, text="books")
    sae, draw = make(config, replace(metadata, training={"seed": 0})).eval(), torch.Generator().manual_seed(0)
    for key, parameter in sae.named_parameters():
        values = torch.randn(parameter.shape, generator=draw)
        parameter.copy_(values / D_IN**0.5 if parameter.ndim == 2 else 0.3 * values)
        if key == "threshold":  # which training keeps above 0
            parameter.abs_()
    if config.architecture in ("batchtopk", "matryoshka"):
        sae.get_buffer("threshold").fill_(1.2)
    return sae


def write(peer: str, root: Path) -> None:
    """A folder of every kind that the peer has, with what we make of an input."""
    x = torch.randn((BATCH, D_IN), generator=torch.Generator().manual_seed(1))
    for name, config in KINDS[peer].items():
        sae = random(name, config)
        folder = save_sparsify(sae, root / name) if peer == "sparsify" else save_saelens(sae, root / name)
        output = sae(x)
        made = {"x": x, "features": output.features, "reconstruction": output.reconstruction}
        save_file({key: value.contiguous() for key, value in made.items()}, folder / "expected.safetensors")


def check(peer: str, root: Path) -> bool:
    """Whether every folder of the peer means the same to us, or is refused."""
    fine = []
    for folder in sorted(one.parent for one in root.glob("*/expected.safetensors")):
        if folder.name in NARROW:
            print(f"{'theirs, read here':20} {peer:22} {folder.name:26} not compared: bfloat16 there", flush=True)
            continue
        try:
            output = load(folder)(load_file(folder / "expected.safetensors")["x"])
        except UserError as error:
            refused = folder.name in REFUSED
            fine.append(refused)
            print(f"{'theirs, read here':20} {peer:22} {folder.name:26} {'refused' if refused else error}", flush=True)
            continue
        read = row("theirs, read here", peer, folder, output.features, output.reconstruction)
        fine.append(read and folder.name not in REFUSED)
    return bool(fine) and all(fine)


@torch.no_grad()
def main() -> int:
    """1 if a folder means something else to us."""
    task, peer, root = sys.argv[1], sys.argv[2], Path(sys.argv[3])
    if task == "write":
        write(peer, root)
        return 0
    return 0 if check(peer, root) else 1


if __name__ == "__main__":
    sys.exit(main())
