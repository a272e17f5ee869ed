"""A measured case of sae.py, and its line of the table."""

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median

HEADER = (
    "case             threads    beside      ours         ratio   limit   floor of it  max diff  peak MB: beside  ours"
)


@dataclass(frozen=True)
class Outcome:
    """A case as measured.

    Attributes:
        name: of it.
        beside: what ours is compared with.
        threads: of torch. Seconds are CPU time on one thread, else wall time.
        other, ours: of the compared side and of ours, in `unit`.
        ratio: other / ours where `at_least` is set or the limit is none; ours / other where `at_most` is set.
        at_least, at_most: limits of the ratio.
        floor: the unit's time of the least work; None where none is worked out.
        max_rel_diff, tolerance: of what was checked.
        other_peak_bytes, ours_peak_bytes: how much each process grew at its peak, from weights and batch on.
        what: sizes.
    """

    name: str
    beside: str
    threads: int
    other: float
    ours: float
    ratio: float
    at_least: float | None = None
    at_most: float | None = None
    floor: float | None = None
    unit: str = "ms/step"
    max_rel_diff: float = 0.0
    tolerance: float = 1e-5
    other_peak_bytes: int = 0
    ours_peak_bytes: int = 0
    what: str = ""

    @property
    def ok(self) -> bool:
        """Fast enough, and equal."""
        fast = self.at_least is None or self.ratio >= self.at_least
        near = self.at_most is None or self.ratio <= self.at_most
        return fast and near and self.max_rel_diff <= self.tolerance


def row(one: Outcome) -> str:
    """A line of the table."""
    limit = f"≥ {one.at_least:g}" if one.at_least else "–" if one.at_most is None else f"≤ {one.at_most:g}"
    least = f"{one.floor:>8.1f}{one.floor / one.ours:>6.0%}" if one.floor else f"{'–':>8}{'–':>6}"
    return (
        f"{one.name:<19}{one.threads:>4}{one.other:>11.1f}{one.ours:>10.1f} {one.unit:<8}{one.ratio:>6.2f}x{limit:>8}"
        f"{least}{one.max_rel_diff:>10.0e}{one.other_peak_bytes / 1e6:>16.0f}{one.ours_peak_bytes / 1e6:>6.0f}"
        f"  {'ok' if one.ok else 'MISSED'}  {one.beside}; {one.what}"
    )


def paired(left: Sequence[float], right: Sequence[float]) -> float:
    """The median of the rounds' ratios left / right: both sides of a round meet the same machine."""
    return median(a / b for a, b in zip(left, right, strict=True))
