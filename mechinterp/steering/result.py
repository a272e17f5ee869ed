"""What a sweep of strengths gives back."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from mechinterp.results import Result, plain


@dataclass(frozen=True, repr=False)
class SteeringResult(Result):
    """What a vector does at each strength.

    `data` holds, over `strength`: `mean` of the metric with `ci_low` and `ci_high` (95%); `change`, the same less the
    unsteered run, with `change_low` and `change_high`; `control`, `control_low`, `control_high`: mean, smallest and
    largest change that random directions of the same norm make; `passes`; `kl` with `kl_low` and `kl_high` (nats a
    token of unrelated text) and `kl_control`, of random directions. `steered` `[strength prompt]` and `random`
    `[draw strength prompt]` are the metric of every prompt.
    """

    @property
    def best(self) -> float:
        """The strength of the largest change that passes; of the largest change if none does."""
        data = self.data
        size = np.abs(data["change"].values) + 1e9 * data["passes"].values
        return float(data["strength"].values[int(np.argmax(size))])

    def summary(self) -> str:
        """One line: what the best strength does, against random directions, at what cost."""
        at, about = self.data.sel(strength=self.best), self.about
        base = float(self.data["mean"].sel(strength=0.0))
        verdict = "passes" if bool(at["passes"]) else "does not pass"
        return (
            f"{about['site']}: strength {self.best:g} moves {about['metric']} from {base:.2f} to "
            f"{float(at['mean']):.2f} [{float(at['ci_low']):.2f}, {float(at['ci_high']):.2f}]; random directions by "
            f"{float(at['control_low']):.2f} … {float(at['control_high']):.2f} ({verdict}); KL on unrelated text "
            f"{float(at['kl']):.3f} nats, random {float(at['kl_control']):.3f} (n={about['n_prompts']}, 95% "
            f"{about['scope']}, {about['draws']} random directions)"
        )

    def top(self, n: int = 10) -> pd.DataFrame:
        """The strengths in order."""
        return self.to_frame().head(max(n, len(self.data["strength"])))

    def to_json(self) -> dict[str, Any]:
        """Plain values; undefined is None."""
        grids = [name for name, array in self.data.data_vars.items() if array.dims == ("strength",)]
        return {
            **plain(dict(self.about)),
            "strengths": self.data["strength"].values.tolist(),
            **{str(name): plain(self.data[name]) for name in (*grids, "steered")},
            "control_directions": self.about["control"],
        }
