"""Sparse autoencoders of equal L0 beside each other on held-out text: ours and another trainer's, several seeds each.

    python scripts/bench/sae_quality.py --ours DIR … --theirs DIR … --text FILE [--blocks N] [--json FILE]

All are run on the same tokens. The difference of FVU is that of the mean errors over seeds, relative to the variance
that they share; its interval is over documents (paired: every document is read by all). CE recovered is compared in
the same way. Exit code 0 if the upper limit of the FVU's difference is at most .005 and all have the same L0.

Theirs come from `scripts/reference/train_sparsify.py` or `train_sae_lens.py`, on a store of `mechinterp sae harvest`;
ours from the same store (`mechinterp sae train --store STORE`), with the same batch, learning rate and tokens.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

import mechinterp as mi
from mechinterp.results import write_json
from mechinterp.statistics import bootstrap_ratio

MARGIN = 0.005  # of FVU
SAME_L0 = 0.01  # relative


def main(argv: Sequence[str] | None = None) -> int:
    """Evaluate all, compare, print, write. Returns the exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--ours", nargs="+", required=True, metavar="DIR")
    parser.add_argument("--theirs", nargs="+", required=True, metavar="DIR")
    parser.add_argument("--text", nargs="+", type=Path, required=True, metavar="FILE")
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--blocks", type=int, default=60)
    parser.add_argument("--per-document", type=int, default=1)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--fvu-only", action="store_true", help="leave out the runs of the model with each in place")
    parser.add_argument("--json", type=Path, metavar="FILE")
    args = parser.parse_args(argv)
    model = mi.load(args.model)
    print(model.header())
    text = mi.text.blocks(model, args.text, args.length, args.blocks, args.per_document)
    print(f"{len(text)} blocks of {args.length} tokens from {len(text.document.unique())} documents of {text.source}")
    if args.fvu_only:
        return fvu_only(model, args, text)
    found = {
        side: [measured(model, path, args.ours[0], text) for path in getattr(args, side)] for side in ("ours", "theirs")
    }
    made = compared(found["ours"], found["theirs"], text.document.numpy())
    ok = made["fvu"]["high"] <= MARGIN and made["same_l0"]
    print(f"\nours − theirs, 95% over documents:\nFVU {shown(made['fvu'])}, allowed {MARGIN}")
    print(f"CE recovered of mean ablation {shown(made['ce_recovered_mean'])}\n{'ok' if ok else 'NOT ok'}")
    if args.json:
        runs = {side: [one.to_json() | {"about": None} for one in results] for side, results in found.items()}
        write_json(args.json, {"ok": ok, "compared": made, "runs": runs, "text": text.source, "blocks": len(text)})
    return 0 if ok else 1


def fvu_only(model: mi.HookedModel, args: argparse.Namespace, text: mi.text.Blocks) -> int:
    """The comparison of FVU alone: one pass of the model up to the site serves all."""
    like = mi.sae.load(args.ours[0]).metadata
    (name,) = like.reads
    kept = like.exclusion.mask(text.prompts.tokens, text.prompts.real)
    x = model.run_with_cache(text.prompts, [name])[1][name][kept]
    documents = text.document[:, None].expand_as(kept)[kept].numpy()
    variance = (x - x.mean(0)).square().sum(1).double().numpy()
    errors, l0 = {}, {}
    for side in ("ours", "theirs"):
        found = [mi.sae.load(path) for path in getattr(args, side)]
        with torch.no_grad():
            made = [sae(x) for sae in found]
        errors[side] = np.stack([(x - one.reconstruction).square().sum(1).double().numpy() for one in made])
        l0[side] = [float(one.codes.l0()) / len(x) for one in made]
        print(
            f"{side}: FVU {', '.join(f'{error.sum() / variance.sum():.4f}' for error in errors[side])}, L0 {l0[side]}"
        )
    gap = difference((errors["ours"] - errors["theirs"]).mean(0), variance, documents)
    same = bool(abs(np.mean(l0["ours"]) / np.mean(l0["theirs"]) - 1) <= SAME_L0)
    ok = gap["high"] <= MARGIN and same
    print(f"FVU, ours − theirs {shown(gap)} (95% over {len(np.unique(documents))} documents), allowed {MARGIN}")
    if args.json:
        by_seed = {side: (errors[side].sum(1) / variance.sum()).tolist() for side in errors}
        made_of = {
            "text": text.source,
            "tokens": len(x),
            "documents": len(np.unique(documents)),
            "theirs": [Path(one).name for one in args.theirs],
        }
        write_json(args.json, {"ok": ok, "fvu": gap, "fvu_by_seed": by_seed, "l0": l0, **made_of})
    return 0 if ok else 1


def measured(model: mi.HookedModel, path: str, like: str, text: mi.text.Blocks) -> "mi.sae.SAEEvaluation":
    """One autoencoder on the text."""
    # Theirs say nothing of sites and excluded positions: all are read where ours are.
    sae = mi.sae.load(path)
    sae.metadata = mi.sae.load(like).metadata
    result = mi.sae.evaluate(model, sae, text)
    print(f"{path}\n  {result.summary()}", flush=True)
    return result


def compared(ours: Sequence[Any], theirs: Sequence[Any], documents: np.ndarray) -> dict[str, Any]:
    """Differences of FVU and of CE recovered with intervals, and whether L0 is the same."""

    def mean_over_seeds(results: Sequence[Any], name: str) -> np.ndarray:
        return np.mean([one.data[name].values for one in results], axis=0)

    variance = ours[0].data["sum_variance"].values
    error = mean_over_seeds(ours, "sum_error") - mean_over_seeds(theirs, "sum_error")
    lost = mean_over_seeds(theirs, "sum_ce_spliced") - mean_over_seeds(ours, "sum_ce_spliced")
    span = ours[0].data["sum_ce_mean"].values - ours[0].data["sum_ce_clean"].values
    l0 = [[one["l0"] for one in side] for side in (ours, theirs)]
    return {
        "fvu": difference(error, variance, documents),
        "ce_recovered_mean": difference(lost, span, documents),
        "l0": l0,
        "same_l0": bool(abs(np.mean(l0[0]) / np.mean(l0[1]) - 1) <= SAME_L0),
        "fvu_by_seed": [[one["fvu"] for one in side] for side in (ours, theirs)],
    }


def shown(one: dict[str, float]) -> str:
    """A difference with its interval."""
    return f"{one['difference']:+.4f} [{one['low']:+.4f}, {one['high']:+.4f}]"


def difference(numerator: np.ndarray, denominator: np.ndarray, documents: np.ndarray) -> dict[str, float]:
    """Σ numerator / Σ denominator with its interval over documents."""
    made = bootstrap_ratio(numerator, denominator, documents)
    return {"difference": float(made.estimate), "low": float(made.low), "high": float(made.high)}


if __name__ == "__main__":
    raise SystemExit(main())
