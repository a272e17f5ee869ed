"""What a command line names: the model and the prompt pairs."""

import torch

from mechinterp import tasks
from mechinterp.cli.flags import ModelFlags, OnModel, PairsFlags
from mechinterp.hooked.model import HookedModel
from mechinterp.models import load
from mechinterp.tasks.pairs import PromptPairs

N_DEFAULT = 32


def load_model(args: OnModel) -> HookedModel:
    """The model, its header printed: what was run, on what, with or without BOS."""
    return load_named(args.model, args, args.prepend_bos)


def load_named(name: str, args: ModelFlags, bos: bool | None) -> HookedModel:
    """A model whose name does not come from the command line; its header is printed."""
    model = load(name, device=args.device, dtype=args.dtype, bos=bos, process=args.process, revision=args.revision)
    print(model.header(), flush=True)
    return model


def load_pairs(model: HookedModel, args: PairsFlags) -> PromptPairs:
    """The pairs of --pairs or --task; what they are is printed, with the first one by token."""
    pairs = _pairs(model, args)
    roles = f", roles {' '.join(pairs.roles)}" if pairs.roles else ""
    print(f"task: {pairs.name}, {pairs.corruption}, n={len(pairs)}, seed {pairs.seed}{roles}")
    print(pairs.preview(model, 1))
    return pairs


def _pairs(model: HookedModel, args: PairsFlags) -> PromptPairs:
    if args.pairs is not None:
        pairs = tasks.from_file(model, args.pairs, seed=args.seed)
        return pairs if args.n is None else pairs.take(torch.arange(args.n))
    n = args.n or N_DEFAULT
    if args.corruption is not None:
        return tasks.ioi(model, n=n, seed=args.seed, corruption=args.corruption)
    assert args.task is not None, "check_flags asked for pairs or a task"
    return tasks.TASKS[args.task](model, n=n, seed=args.seed)
