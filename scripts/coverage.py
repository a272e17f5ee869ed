"""How often do the package's intervals hold the true value? A simulation of a skewed ratio of means.

    python scripts/coverage.py [--json FILE] [--repetitions N]

1. A prompt has a baseline difference d = 1 + gamma noise and an effect x = 0.6 d + exponential noise less its mean:
   both are skewed, the noise of the effect has a long tail to one side. The true ratio of means is 0.6.
2. With templates, each of 8 templates adds a normal effect of its own to the noise of all of its prompts; the true
   ratio is over templates, too. 8 is the least number at which templates are resampled (`statistics.MIN_CLUSTERS`).
3. `bootstrap_ratio` (95%, 2,000 draws) is called on each sample; the share of intervals that hold 0.6 is its coverage.
   Its own error (one standard deviation of a share) is printed beside it.
"""

import argparse
import math
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from mechinterp.results import write_json
from mechinterp.statistics import bootstrap_ratio

RATIO, TEMPLATES, SPREAD = 0.6, 8, 0.5
SIZES = (16, 32, 64)


def sample(rng: np.random.Generator, n: int, templates: np.ndarray | None) -> tuple[np.ndarray, np.ndarray]:
    """Effects and baseline differences `[prompt]`, whose ratio of true means is `RATIO`."""
    baseline = 1 + rng.gamma(2.0, 0.5, n)
    noise = rng.exponential(1.0, n) - 1
    if templates is not None:
        noise = noise + rng.normal(0, SPREAD, TEMPLATES)[templates]
    return RATIO * baseline + noise, baseline


def coverage(n: int, clustered: bool, repetitions: int, draws: int = 2000, seed: int = 0) -> float:
    """Share of intervals that hold the true ratio."""
    rng = np.random.default_rng(seed)
    templates = np.arange(n) % TEMPLATES if clustered else None
    held = 0
    for repetition in range(repetitions):
        effect, baseline = sample(rng, n, templates)
        interval = bootstrap_ratio(effect, baseline, templates, draws=draws, seed=repetition)
        held += bool(interval.low <= RATIO <= interval.high)
    return held / repetitions


def main(argv: Sequence[str] | None = None) -> int:
    """Print the table, write the JSON. Returns the exit code: 1 if n = 64 without templates is outside .93–.97."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--repetitions", type=int, default=4000)
    args = parser.parse_args(argv)
    rows = []
    print(f"{'n':>4}  {'templates':>9}  {'coverage':>8}  {'± 1 sd':>6}   nominal 0.95, {args.repetitions} repetitions")
    for clustered in (False, True):
        for n in SIZES:
            share = coverage(n, clustered, args.repetitions)
            error = math.sqrt(share * (1 - share) / args.repetitions)
            rows.append({"n": n, "templates": TEMPLATES if clustered else None, "coverage": share, "sd": error})
            print(f"{n:>4}  {TEMPLATES if clustered else '–':>9}  {share:>8.3f}  {error:>6.3f}", flush=True)
    plain = next(row["coverage"] for row in rows if row["n"] == 64 and row["templates"] is None)
    if args.json:
        write_json(args.json, {"repetitions": args.repetitions, "level": 0.95, "ratio": RATIO, "rows": rows})
    return 0 if 0.93 <= plain <= 0.97 else 1


if __name__ == "__main__":
    sys.exit(main())
