"""How fast sparse autoencoders are trained, beside the peers that do the same, and how near the least work.

    python scripts/bench/sae.py [--json FILE] [--cases step auxk harvest training overlap] [--threads N] [--quick]

1. *step*: a whole TopK training step (forward, loss, backward, projection, clipping, Adam, norms) at d_in 576,
   F 9,216, k 32, batch 2,048, in float32, beside SAELens's (`SAETrainer.step`; also with its option of sparse
   activations), dictionary_learning's (`TopKTrainer.update`) and sparsify's (`Trainer.fit`, on a model that costs
   nothing). At least 5, 5 and 1.8 times as fast. For information: our own dense step, and ours of BatchTopK and
   JumpReLU beside TopK; all of it on one thread, too.
2. *auxk*: a step that revives 500 dead features beside one without. At most 1.15 times its time.
3. *harvest*: activations of SmolLM2's layer 9, 16 blocks of 128 tokens, beside a plain forward with
   `stop_at_layer=10`. At least .9 times as fast.
4. *training*: the loop of `train`, 40 steps with buffer, log and export (no evaluations, no checkpoints), beside its
   harvest and steps measured apart. At most 1.1 times their sum.
5. *overlap*: the same with the harvest in a thread ahead of the steps, at most 1.15 times the longer of both. Two
   devices were not at hand: two cores stand for them, one thread of torch on either, which share their memory. Also at
   layer 2, where both take about as long; shown only.

Peers run in environments of their own (`peers/setup_sae.sh`), on the same weights and batch. Sides take turns in
rounds: a ratio is the median of the rounds'. By default torch has two threads, and seconds are wall time; on one they
are CPU time. A peer that is not there is named, and its rows are left out.

*Checked*: losses of the sparse step against our dense one, to 1e-5; reconstructions of the same weights against the
peers', to 1e-4; harvested activations against the plain forward's, to 1e-5.
*Floor*: the multiply-adds of the encoder's product at the rate of a large matmul, and the bytes of Adam's seven passes
at the rate of a large copy, both measured in the same run; *of it* is that over ours.
*Memory*: how much a process grew at its peak from weights and batch on (ours and peers': Adam's moments, too).
On a GPU: sae_gpu.py.
"""

import os

os.environ["TQDM_DISABLE"] = "1"

import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path

import sae_runs
import sae_steps
import torch
from measure import arguments, load_smollm2, write
from sae_steps import Setting, using
from sae_table import HEADER, Outcome, row

CASES = ("step", "auxk", "harvest", "training", "overlap")
NO_GPU = "not measured: no GPU here; scripts/bench/sae_gpu.py"
EVEN = 2  # layer up to which SmolLM2 takes about as long as a step


def outcomes(names: Sequence[str], quick: bool, skipped: dict[str, str]) -> Iterator[Outcome]:
    """Each case as it is done; peers that are missing go to `skipped`, with the reason."""
    threads = torch.get_num_threads()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        setting = Setting(sae_steps.QUICK if quick else sae_steps.Shape())
        if "step" in names:
            yield from sae_steps.step(setting, folder, list(dict.fromkeys([threads, 1])), skipped)
        if "auxk" in names:
            yield sae_steps.auxk(setting, threads)
        if not {"harvest", "training", "overlap"} & set(names):
            return
        model, size = load_smollm2(), sae_runs.QUICK if quick else sae_runs.Run()
        if "harvest" in names:
            yield sae_runs.harvest(model, size)
        if "training" in names:
            yield sae_runs.training(model, size, folder)
        if "overlap" in names:
            with using(1):
                yield sae_runs.training(model, size, folder, ahead=True)
                if not quick:
                    even = sae_runs.training(model, replace(size, layer=EVEN), folder, ahead=True)
                    yield replace(even, at_most=None)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the cases, print the table, write the JSON. Returns the exit code."""
    given = list(sys.argv[1:] if argv is None else argv)
    quick = "--quick" in given  # small sizes, to try the program out: its ratios are nobody's claim
    args = arguments(str(__doc__), CASES, ["--threads", "2", *(one for one in given if one != "--quick")])
    print(HEADER)
    skipped: dict[str, str] = {}
    made = []
    for one in outcomes(args.cases, quick, skipped):
        made.append(one)
        print(row(one), flush=True)
    for name, reason in skipped.items():
        print(f"{name:<12}skipped: {reason}")
    if not torch.cuda.is_available():
        print(NO_GPU)
    ok = all(one.ok for one in made)
    return write(
        args.json, [{**asdict(one), "ok": one.ok} for one in made], ok, skipped=skipped, quick=quick, gpu=NO_GPU
    )


if __name__ == "__main__":
    sys.exit(main())
