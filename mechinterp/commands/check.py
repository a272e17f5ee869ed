"""`mechinterp check MODEL`: 0 if no identity fails, else 1."""

from mechinterp import identities
from mechinterp.cli.models import Check
from mechinterp.commands.inputs import load_model
from mechinterp.commands.output import save, scientific, table
from mechinterp.results import write_json


def run(args: Check, command: str) -> int:
    """`mechinterp check MODEL`: 0 if no identity fails, else 1."""
    model = load_model(args)
    measured = identities.check(model, args.n, args.seed)
    words = {True: "pass", False: "FAIL", None: "skip"}
    rows = [(one.name, words[one.ok], scientific(one.value), scientific(one.tolerance), one.note) for one in measured]
    print(table(("identity", "", "measured", "tolerance", "note"), rows))
    failed, skipped = (sum(one.ok is word for one in measured) for word in (False, None))
    print(f"{len(measured) - failed - skipped} hold, {failed} fail, {skipped} skipped")
    if args.json:
        found = {"model": args.model, "header": model.header(), "ok": not failed}
        save(args.json, found | {"identities": [vars(one) for one in measured]}, write_json)
    return 1 if failed else 0
