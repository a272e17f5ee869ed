"""Expected values: what a run found beside what was measured before (or published), each with its tolerance.

`reference/<experiment>_<model>.json` holds `source`, one line on where the values are from; `settings`, under which
they hold; and `values`: name -> [value, tolerance].
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mechinterp as mi

REFERENCE = Path(__file__).parent / "reference"


@dataclass(frozen=True)
class Comparison:
    """Rows of (quantity, found, expected, tolerance, agrees); found is None where this run has no such quantity."""

    verdict: str
    rows: tuple[tuple[str, float | None, float, float, bool], ...] = ()

    @property
    def agrees(self) -> bool:
        """Whether every value lies within its tolerance (also where there was nothing to compare with)."""
        return all(row[4] for row in self.rows)

    def table(self) -> mi.reporting.Table:
        """For the report."""
        columns = ("quantity", "found", "expected", "tolerance", "agrees")
        return mi.reporting.Table(columns, self.rows, self.verdict, max_rows=40)


def compare(experiment: str, model: str, found: Mapping[str, float], settings: Mapping[str, Any]) -> Comparison:
    """Compare `found` with the reference of this experiment on this model, if its settings are those of the run."""
    path = REFERENCE / f"{experiment}_{model}.json"
    if not path.is_file():
        return Comparison("No reference values for this model.")
    reference = json.loads(path.read_text())
    other = [name for name, value in reference["settings"].items() if settings.get(name) != value]
    if other:
        wanted = ", ".join(f"{name} {reference['settings'][name]}" for name in other)
        return Comparison(f"No comparison: the reference values were measured with {wanted}.")
    rows = tuple(
        (name, found.get(name), value, tolerance, name in found and abs(found[name] - value) <= tolerance)
        for name, (value, tolerance) in reference["values"].items()
    )
    missed = [row[0] for row in rows if not row[4]]
    verdict = f"All {len(rows)} values agree" if not missed else f"{len(missed)} of {len(rows)} values DO NOT agree"
    detail = f" ({', '.join(missed)})" if missed else ""
    return Comparison(f"{verdict} with the reference{detail}. {reference['source']}", rows)
