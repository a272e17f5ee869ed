"""`mechinterp report RUN`."""

from mechinterp.cli.models import Report
from mechinterp.reporting import rebuild


def run(args: Report, command: str) -> int:
    """`mechinterp report RUN`."""
    print(rebuild(args.run_folder))
    return 0
