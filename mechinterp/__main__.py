"""`python -m mechinterp` is the `mechinterp` command."""

import sys

from mechinterp.cli import main

sys.exit(main())
