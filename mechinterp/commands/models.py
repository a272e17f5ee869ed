"""`mechinterp models`."""

from mechinterp.cli.models import Models
from mechinterp.commands.output import save, table
from mechinterp.errors import UserError
from mechinterp.models import local_names
from mechinterp.models.catalog import CATALOG, fetch
from mechinterp.results import write_json


def run(args: Models, command: str) -> int:
    """`mechinterp models`."""
    if args.refetch is not None:
        if args.refetch not in CATALOG:
            raise UserError(f"{args.refetch!r} is not an embedded model; valid: {', '.join(CATALOG)}")
        print(f"{args.refetch} is in {fetch(CATALOG[args.refetch], refetch=True)}")
    listed = local_names()
    rows = [(one.name, one.kind, "here" if one.cached else "fetched once", one.description) for one in listed]
    print(table(("name", "kind", "weights", "description"), rows))
    print("A model folder, a GGUF file and a name of the Hugging Face hub work as well.")
    if args.json:
        save(args.json, {"models": [one._asdict() for one in listed]}, write_json)
    return 0
