"""EAP-IG's own code (Hanna et al. 2024, github.com/hannamw/EAP-IG, as of 795f560) on given weights and prompts.

    python eap_ig.py FOLDER SOURCE THREADS        SOURCE holds its package `eap`; see served.py for the rest

Nothing of it is changed but: it makes its tensors on "cuda", here on the CPU; prompts come as tokens of one length, in
one batch, instead of text; the model's weights take no gradient (its notebooks leave that on, which costs it more).
"""

import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from served import Prompts, hooked_transformer, seconds, serve
from torch import Tensor


class _OnCpu:
    """torch, with "cuda" read as "cpu"."""

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)

    def zeros(self, *args: Any, **options: Any) -> Tensor:
        """As torch's, on the CPU."""
        return torch.zeros(*args, **{**options, "device": "cpu"})


def main() -> None:
    """Serve `scores` (EAP-IG over inputs) and `evaluate` (circuits, given as masks)."""
    folder, source, threads = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
    torch.set_num_threads(threads)
    sys.path.insert(0, source)
    from eap import attribute, evaluate
    from eap.graph import Graph

    prompts, model = Prompts(folder), hooked_transformer(folder)
    whole = torch.ones_like(prompts.clean)
    sides = {"clean": prompts.clean, "corrupted": prompts.corrupted}

    def tokens_of(model: object, side: str) -> tuple:
        tokens = sides[side]
        return tokens, whole, whole.sum(1), tokens.shape[1]

    for module in (attribute, evaluate):
        module.torch, module.tokenize_plus = _OnCpu(), tokens_of

    class Batch(str):
        """The name of a side; as long as its prompts."""

        def __len__(self) -> int:
            return len(prompts.clean)

    batches = [(Batch("clean"), Batch("corrupted"), None)]

    def logit_diff(logits: Tensor, *_: object) -> Tensor:
        return prompts.logit_diff(logits[:, -1])

    def scores(asked: dict) -> tuple[float, dict[str, Tensor]]:
        graph = Graph.from_model(model)
        start = seconds()
        made = attribute.get_scores_eap_ig(
            model, graph, batches, lambda *given: -logit_diff(*given).sum(), steps=asked["steps"], quiet=True
        )
        return seconds() - start, {"scores": made, "real": graph.real_edge_mask}

    def circuits(asked: dict) -> tuple[float, dict[str, Tensor]]:
        masks = load_file(asked["masks"])["kept"].bool()  # [circuit source destination]
        graph, values, sizes = Graph.from_model(model), [], []
        start = seconds()
        for mask in masks:
            graph.in_graph[:] = mask
            values.append(evaluate.evaluate_graph(model, graph, batches, logit_diff, quiet=True, skip_clean=True))
            sizes.append(graph.in_graph.sum())  # it prunes
        return seconds() - start, {"values": torch.stack(values), "edges": torch.stack(sizes)}

    serve(folder, {"scores": scores, "evaluate": circuits})


if __name__ == "__main__":
    main()
