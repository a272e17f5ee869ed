"""Write the small folders of sparse autoencoders that the tests read: each made and saved by a peer's own code.

    ~/.cache/mechinterp-peers/sae-lens/bin/python scripts/reference/make_sae_folders.py sae-lens
    ~/.cache/mechinterp-peers/sparsify/bin/python scripts/reference/make_sae_folders.py sparsify
    ~/.cache/mechinterp-peers/dictionary-learning/bin/python scripts/reference/make_sae_folders.py dictionary-learning

scripts/bench/peers/setup_sae.sh makes these environments. Every folder lies at tests/sae/folders/PEER/NAME and holds
what the peer writes, and `expected.safetensors`: an input `x` `[batch d_in]`, and the `features` `[batch feature]` and
`reconstruction` `[batch d_out]` that the peer computes from it after it has loaded the folder again.

Weights, biases, thresholds and inputs are random from a seed of the folder's name; none is zero, so that a reader that
forgets one is found out. Nor may rounding decide which features are active: the draw is refused if a change of the
input by 1e-4 of its size changes that.
"""

import argparse
import json
import sys
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

D_IN, D_OUT, D_SAE, K, BATCH = 6, 5, 16, 4, 16
FOLDERS = Path(__file__).resolve().parents[2] / "tests/sae/folders"
SAE_LENS_METADATA = {
    "model_name": "gpt2",
    "hook_name": "blocks.1.hook_resid_pre",
    "hook_head_index": None,
    "context_size": 128,
    "prepend_bos": True,
    "dataset_path": "NeelNanda/pile-10k",
}
Run = Callable[[Tensor], tuple[Tensor, Tensor]]  # x to features and reconstruction
Made = tuple[str, Tensor, Run]  # name, x, the peer as loaded again


def generator(name: str) -> torch.Generator:
    """Random numbers of a folder; the same on every machine."""
    return torch.Generator().manual_seed(zlib.crc32(name.encode()))


@torch.no_grad()
def randomise(module: nn.Module, random: torch.Generator) -> None:
    """Every parameter anew: weights of about unit norm, biases of both signs, thresholds above 0."""
    for name, parameter in module.named_parameters():
        values = torch.randn(parameter.shape, generator=random)
        if "threshold" in name:
            values = 0.2 + 0.3 * torch.rand(parameter.shape, generator=random)
        parameter.copy_(0.5 * values if parameter.ndim == 2 else 0.3 * values if "threshold" not in name else values)


def inputs(random: torch.Generator) -> Tensor:
    """`[batch d_in]`"""
    return torch.randn((BATCH, D_IN), generator=random)


# SAELens ------------------------------------------------------------------------------------------------------------


def sae_lens(out: Path) -> Iterator[Made]:
    """SAELens's folders, through `save_model` or, of modules in training, `save_inference_model`."""
    import sae_lens as lens
    from safetensors.torch import load_file

    sizes = {"d_in": D_IN, "d_sae": D_SAE}
    one_way = {**sizes, "d_out": D_OUT, "apply_b_dec_to_input": False}
    bare, top = {**sizes, "apply_b_dec_to_input": False}, {**sizes, "k": K}
    standard = (lens.StandardSAE, lens.StandardSAEConfig)
    topk, jumprelu = (lens.TopKSAE, lens.TopKSAEConfig), (lens.JumpReLUSAE, lens.JumpReLUSAEConfig)
    gated, pursuit = (lens.GatedSAE, lens.GatedSAEConfig), (lens.MatchingPursuitSAE, lens.MatchingPursuitSAEConfig)
    batch_topk = (lens.BatchTopKTrainingSAE, lens.BatchTopKTrainingSAEConfig)
    matryoshka = (lens.MatryoshkaBatchTopKTrainingSAE, lens.MatryoshkaBatchTopKTrainingSAEConfig)
    cases: dict[str, tuple[tuple[type, type], dict[str, Any]]] = {
        "standard": (standard, sizes),
        "standard_bare": (standard, bare),
        "standard_bfloat16": (standard, {**sizes, "dtype": "bfloat16"}),
        "standard_expected_average": (standard, {**sizes, "normalize_activations": "expected_average_only_in"}),
        "standard_constant_norm": (standard, {**sizes, "normalize_activations": "constant_norm_rescale"}),
        "standard_layer_norm": (standard, {**sizes, "normalize_activations": "layer_norm"}),
        "standard_hook_z": (standard, {**sizes, "reshape_activations": "hook_z"}),
        "gated": (gated, sizes),
        "gated_bare": (gated, bare),
        "topk": (topk, top),
        "topk_bare": (topk, {**top, "apply_b_dec_to_input": False}),
        "topk_rescaled": (topk, {**top, "rescale_acts_by_decoder_norm": True}),
        "topk_trained": ((lens.TopKTrainingSAE, lens.TopKTrainingSAEConfig), top),
        "batchtopk": (batch_topk, {**top, "k": float(K)}),
        "matryoshka_batchtopk": (matryoshka, {**top, "k": float(K), "matryoshka_widths": [4, 8, D_SAE]}),
        "jumprelu": (jumprelu, sizes),
        "jumprelu_bare": (jumprelu, bare),
        "transcoder": ((lens.Transcoder, lens.TranscoderConfig), one_way),
        "skip_transcoder": ((lens.SkipTranscoder, lens.SkipTranscoderConfig), one_way),
        "jumprelu_transcoder": ((lens.JumpReLUTranscoder, lens.JumpReLUTranscoderConfig), one_way),
        "jumprelu_skip_transcoder": ((lens.JumpReLUSkipTranscoder, lens.JumpReLUSkipTranscoderConfig), one_way),
        "matching_pursuit": (pursuit, {**sizes, "residual_threshold": 0.1}),
    }  # fmt: skip
    for name, ((module, config), options) in cases.items():
        random, folder = generator(name), out / name
        notes = dict(SAE_LENS_METADATA)
        if options.get("reshape_activations") == "hook_z":
            notes["hook_name"] = "blocks.1.attn.hook_z"
        if "d_out" in options:
            notes |= {"hook_name": "blocks.1.hook_mlp_in", "hook_name_out": "blocks.1.hook_mlp_out"}
        sae = module(config(**options, metadata=lens.saes.sae.SAEMetadata(**notes)))
        randomise(sae, random)
        x = inputs(random)
        if hasattr(sae, "save_inference_model"):
            if hasattr(sae, "topk_threshold"):
                for _ in range(500):  # the average of the threshold starts at 0
                    sae.update_topk_threshold(sae.encode(x))
            sae.save_inference_model(folder)
        else:
            sae.save_model(folder)
        if name == "standard":
            density = torch.rand(D_SAE, generator=random)
            save_file({"sparsity": torch.log10(density)}, folder / "sparsity.safetensors")
            assert load_file(folder / "sparsity.safetensors")["sparsity"].shape == (D_SAE,)
        loaded = lens.SAE.load_from_disk(folder)

        def run(x: Tensor, sae: Any = loaded) -> tuple[Tensor, Tensor]:
            shaped = x.unflatten(-1, (2, -1)) if sae.cfg.reshape_activations == "hook_z" else x
            return sae.encode(shaped), sae(shaped).reshape(BATCH, -1)

        yield name, x, run


# sparsify -----------------------------------------------------------------------------------------------------------


def sparsify(out: Path) -> Iterator[Made]:
    """sparsify's folders, through `save_to_disk`."""
    from sparsify import SparseCoder, SparseCoderConfig

    cases: dict[str, dict[str, Any]] = {
        "topk": {},
        "topk_skip": {"skip_connection": True},
        "topk_expansion": {"num_latents": 0, "expansion_factor": 3},
        "transcoder": {"transcode": True},
        "skip_transcoder": {"transcode": True, "skip_connection": True},
        "groupmax": {"activation": "groupmax"},
    }
    for name, options in cases.items():
        random, folder = generator(name), out / name
        coder = SparseCoder(D_IN, SparseCoderConfig(**{"num_latents": D_SAE, "k": K, **options}))
        randomise(coder, random)
        coder.save_to_disk(folder)
        loaded = SparseCoder.load_from_disk(folder)

        def run(x: Tensor, coder: Any = loaded) -> tuple[Tensor, Tensor]:
            made = coder(x, torch.zeros_like(x))
            zero = torch.zeros(BATCH, coder.num_latents)
            return zero.scatter(1, made.latent_indices, made.latent_acts), made.sae_out

        yield name, inputs(random), run


# dictionary_learning ------------------------------------------------------------------------------------------------


def dictionary_learning(out: Path) -> Iterator[Made]:
    """dictionary_learning's folders, written as its `trainSAE` does, and read by its `load_dictionary`.

    "standard_unnormed" has decoder columns of other norms than 1, which its reader folds into the features.
    """
    from dictionary_learning.dictionary import AutoEncoder, AutoEncoderNew, GatedAutoEncoder, JumpReluAutoEncoder
    from dictionary_learning.trainers.batch_top_k import BatchTopKSAE
    from dictionary_learning.trainers.matryoshka_batch_top_k import MatryoshkaBatchTopKSAE
    from dictionary_learning.trainers.top_k import AutoEncoderTopK
    from dictionary_learning.utils import load_dictionary

    cases: dict[str, tuple[nn.Module, str]] = {
        "standard": (AutoEncoder(D_IN, D_SAE), "StandardTrainer"),
        "standard_unnormed": (AutoEncoder(D_IN, D_SAE), "StandardTrainer"),
        "standard_april": (AutoEncoderNew(D_IN, D_SAE), "StandardTrainerAprilUpdate"),
        "gated": (GatedAutoEncoder(D_IN, D_SAE), "GatedSAETrainer"),
        "topk": (AutoEncoderTopK(D_IN, D_SAE, K), "TopKTrainer"),
        "batchtopk": (BatchTopKSAE(D_IN, D_SAE, K), "BatchTopKTrainer"),
        "batchtopk_no_threshold": (BatchTopKSAE(D_IN, D_SAE, K), "BatchTopKTrainer"),
        "matryoshka_batchtopk": (MatryoshkaBatchTopKSAE(D_IN, D_SAE, K, [4, 4, 8]), "MatryoshkaBatchTopKTrainer"),
        "jumprelu": (JumpReluAutoEncoder(D_IN, D_SAE), "JumpReluTrainer"),
    }
    for name, (module, trainer) in cases.items():
        random, folder = generator(name), out / name
        randomise(module, random)
        with torch.no_grad():
            if isinstance(module, AutoEncoder) and name == "standard":
                module.decoder.weight /= module.decoder.weight.norm(dim=0)
            if name in ("batchtopk", "matryoshka_batchtopk", "topk"):
                module.threshold.fill_(0.7)
        folder.mkdir(parents=True, exist_ok=True)
        torch.save(module.state_dict(), folder / "ae.pt")
        about = {"trainer_class": trainer, "dict_class": type(module).__name__, "activation_dim": D_IN}
        about |= {"dict_size": D_SAE, "layer": 1, "lm_name": "EleutherAI/pythia-70m", "submodule_name": "resid_post_1"}
        about |= {"k": K} if hasattr(module, "k") else {}
        buffer = {"ctx_len": 128, "d_submodule": D_IN, "io": "out"}
        (folder / "config.json").write_text(json.dumps({"trainer": about, "buffer": buffer}, indent=4))
        torch.manual_seed(0)  # its reader draws inputs for a check
        loaded = load_dictionary(str(folder), "cpu")[0]
        yield name, inputs(random), lambda x, loaded=loaded: (loaded.encode(x), loaded(x))


PEERS: dict[str, Callable[[Path], Iterator[Made]]] = {
    "sae-lens": sae_lens,
    "sparsify": sparsify,
    "dictionary-learning": dictionary_learning,
}


@torch.no_grad()
def main() -> int:
    """Write the folders of one peer."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("peer", choices=PEERS)
    parser.add_argument("--out", type=Path, default=FOLDERS, metavar="DIR")
    args = parser.parse_args()
    for name, x, run in PEERS[args.peer](args.out / args.peer):
        features, reconstruction = run(x)
        for factor in (1 - 1e-4, 1 + 1e-4):
            if not torch.equal(run(x * factor)[0] != 0, features != 0):
                raise RuntimeError(
                    f"{name}: rounding could decide which features are active; name the folder otherwise"
                )
        tensors = {"x": x, "features": features, "reconstruction": reconstruction}
        save_file(
            {key: value.detach().float().contiguous() for key, value in tensors.items()},
            args.out / args.peer / name / "expected.safetensors",
        )
        active = (features != 0).float().sum(-1).mean()
        print(f"{args.peer}/{name}: {float(active):.1f} of {features.shape[1]} features on average")
    return 0


if __name__ == "__main__":
    sys.exit(main())
