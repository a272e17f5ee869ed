"""auto-circuit's ACDC (Miller et al. 2024, PyPI auto-circuit 1.0.1) as a measure of single edges.

    python acdc.py FOLDER THREADS        see served.py

`acdc_prune_scores` itself is run, on the edges that are asked for, with a threshold of −∞, at which it restarts the
model for every edge and puts each of them back: the exact effect of the edge alone. It throws the logits away, so they
are picked up where it takes their log-softmax. Timed is what lies between the first and the last of them.
"""

import os

os.environ["TQDM_DISABLE"] = "1"

import sys
from pathlib import Path
from types import SimpleNamespace

import torch
from safetensors.torch import load_file
from served import Prompts, hooked_transformer, seconds, serve
from torch import Tensor


def main() -> None:
    """Serve `edges`: the metric with each of the given edges ablated, and seconds of one edge."""
    folder, threads = Path(sys.argv[1]), int(sys.argv[2])
    torch.set_num_threads(threads)
    from auto_circuit.prune_algos import ACDC
    from auto_circuit.utils.graph_utils import patchable_model

    prompts = Prompts(folder)
    model = patchable_model(hooked_transformer(folder), factorized=True, slice_output="last_seq", separate_qkv=True)
    every = {(edge.dest.name, edge.src.src_idx): edge for edge in model.edges}
    n_heads, per_layer = model.cfg.n_heads, 3 * model.cfg.n_heads + 1

    def name(destination: int) -> str:
        layer, at = divmod(destination, per_layer)
        if layer == model.cfg.n_layers:
            return "Resid End"
        return f"MLP {layer}" if at == per_layer - 1 else f"A{layer}.{at % n_heads}.{'QKV'[at // n_heads]}"

    def edges(asked: dict) -> tuple[float, dict[str, Tensor]]:
        wanted = load_file(asked["edges"])["edges"].tolist()  # [edge 2]: destination, source
        chosen = [every[name(v), u] for v, u in wanted]
        model.edges = set(chosen)
        seen: list[tuple[float, Tensor]] = []
        plain = torch.nn.functional.log_softmax

        def watched(logits: Tensor, dim: int) -> Tensor:
            seen.append((seconds(), prompts.logit_diff(logits)))
            return plain(logits, dim=dim)

        ACDC.log_softmax = watched
        batch = SimpleNamespace(clean=prompts.clean, corrupt=prompts.corrupted)
        ACDC.acdc_prune_scores(model, [batch], None, tao_exps=[0], tao_bases=[float("-inf")])
        order = sorted(model.edges, key=lambda edge: edge.dest.layer, reverse=True)
        at = {edge: number for number, edge in enumerate(order)}
        made = torch.stack([seen[at[edge]][1] for edge in chosen])
        return (seen[-1][0] - seen[0][0]) / (len(seen) - 1), {"values": made}

    serve(folder, {"edges": edges})


if __name__ == "__main__":
    main()
