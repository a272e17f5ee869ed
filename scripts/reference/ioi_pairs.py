"""Write the pairs that `ioi_plain.py` runs: those of `mechinterp.tasks.ioi`, as token ids without padding.

python scripts/reference/ioi_pairs.py --json experiments/reference/ioi_smollm2_pairs.json
"""

import argparse
import json
import os
import sys
from pathlib import Path

import mechinterp as mi

CORRUPTIONS = ("swapped-subject", "new-names")


def pairs_of(model: mi.HookedModel, n: int, seed: int, corruption: str) -> list[dict[str, object]]:
    """Token ids of every pair, its answers, and where its roles are, counted in these tokens."""
    task = mi.tasks.ioi(model, n, seed=seed, corruption=corruption)
    made = []
    for i, padding in enumerate(task.clean.padding.tolist()):
        made.append(
            {
                "clean": task.clean.tokens[i, padding:].tolist(),
                "corrupted": task.corrupted.tokens[i, padding:].tolist(),
                "answer": int(task.answers.answer[i, 0, 0]),
                "wrong": int(task.answers.wrong[i, 0, 0]),
                "roles": {name: int(at[i]) - padding for name, at in task.clean.roles.items()},
                "template": None if task.clean.template is None else int(task.clean.template[i]),
            }
        )
    return made


def main() -> int:
    """Write the pairs of both corruptions."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--n", type=int, default=16)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, required=True, metavar="FILE")
    args = parser.parse_args()
    model = mi.load(args.model, bos=False)
    pairs = {corruption: pairs_of(model, args.n, args.seed, corruption) for corruption in CORRUPTIONS}
    task = {"name": "ioi", "model": args.model, "n": args.n, "seed": args.seed, "bos": False}
    scratch = args.json.with_name(args.json.name + ".partial")
    scratch.write_text(json.dumps({"task": task, "pairs": pairs}) + "\n")
    os.replace(scratch, args.json)
    return 0


if __name__ == "__main__":
    sys.exit(main())
