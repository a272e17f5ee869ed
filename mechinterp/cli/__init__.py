"""The `mechinterp` command: its grammar, and the checks that need no torch.

Each subcommand is a frozen dataclass (flags.py). `check_flags` looks at files and flags; only then `run` imports the
module of mechinterp/commands/ that does the work, and with it torch, so that `--help` and a wrong flag answer at once.
"""

import os
import shlex
import sys
from collections.abc import Sequence

import tyro

from mechinterp import __version__
from mechinterp.cli.analyses import Ablate, Attention, Dla, Heads, Lens, Patch, Steer, Tune
from mechinterp.cli.circuits import Circuit
from mechinterp.cli.flags import Switch
from mechinterp.cli.models import Check, Models, Report, Sites
from mechinterp.cli.sae import Sae
from mechinterp.errors import UserError

__all__ = ["Switch", "main"]

INTERRUPTED = 130  # 128 + SIGINT, as shells have it
DESCRIPTION = (
    "Mechanistic interpretability of transformers: patch, measure, and be told how far to believe it. "
    "`mechinterp --version` prints the version."
)

SUBCOMMANDS = {
    "check": Check,
    "sites": Sites,
    "models": Models,
    "patch": Patch,
    "lens": Lens,
    "tune": Tune,
    "dla": Dla,
    "heads": Heads,
    "ablate": Ablate,
    "attention": Attention,
    "steer": Steer,
    "circuit": Circuit,
    "sae": Sae,
    "report": Report,
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command line (without the program's name; by default the process's own). Returns the exit code.

    0: done. 1: `check` found an identity that fails. 2: bad input, said in one message on stderr. 130: interrupted.
    Wrong flags and `--help` leave through SystemExit, as argparse does.
    """
    given = list(sys.argv[1:] if argv is None else argv)
    if given == ["--version"]:
        print(f"mechinterp {__version__}")
        return 0
    try:
        asked = tyro.extras.subcommand_cli_from_dict(
            SUBCOMMANDS,
            prog="mechinterp",
            description=DESCRIPTION,
            args=given or ["--help"],
            config=(tyro.conf.OmitSubcommandPrefixes, tyro.conf.OmitArgPrefixes),
        )
        asked.check_flags()
        return asked.run(shlex.join(["mechinterp", *given]))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:  # the reader of our output (`| head`) has left
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
