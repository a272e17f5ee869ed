"""What a causal trace gives back: effects with intervals and controls, and the metric of every run."""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import xarray as xr

from mechinterp.results import Result, plain


@dataclass(frozen=True, repr=False)
class TraceResult(Result):
    """Indirect effects by layer and token, in the metric's units.

    `data` holds, over `layer` (the middle of a window) and `role` (or `pos`): `indirect`, `ci_low` and `ci_high` (95%),
    `control` (the indirect effect of the same states of another subject, of the largest cells) and `passes` (beyond the
    sign-flip threshold, and the interval of the difference to the control excludes 0); over `role` the number of
    prompts `n`; `restored` with further axes `prompt` and `draw`, NaN where a prompt has no such token; `noised` over
    `prompt` and `draw`; `clean` over `prompt`.
    """

    @property
    def axis(self) -> str:
        """`role` or `pos`."""
        return str(self.data["indirect"].dims[1])

    @property
    def total_effect(self) -> dict[str, float | None]:
        """Mean of clean − noised: estimate, ci_low, ci_high."""
        return dict(self.about["total_effect"])

    @property
    def per_prompt(self) -> xr.DataArray:
        """`[layer role prompt]` indirect effect of each prompt, averaged over draws; NaN where it has no such token."""
        return (self.data["restored"] - self.data["noised"]).mean("draw", skipna=False)

    def top(self, n: int = 10) -> pd.DataFrame:
        """The cells of largest |indirect effect|, with interval and control; `passes` marks those that pass both."""
        frame = self.to_frame()
        order = np.argsort(-np.abs(frame["indirect"].to_numpy()), kind="stable")
        return frame.iloc[order[:n]].reset_index(drop=True)

    def to_json(self) -> dict[str, Any]:
        """Plain values: what the run was, axes and labels, nested arrays; undefined is None."""
        grids = ("indirect", "ci_low", "ci_high", "control", "passes", "n", "clean", "noised")
        return {
            **plain(dict(self.about)),
            "dims": ["layer", self.axis],
            "coords": {dim: self.data[dim].values.tolist() for dim in ("layer", self.axis)},
            **{name: plain(self.data[name]) for name in grids},
            "per_prompt": plain(self.per_prompt),
            "control_prompts": self.about["control"],
        }

    def summary(self) -> str:
        """One line: the total effect, and the largest cell with its interval and share."""
        about, best, total = self.about, self.top(1).iloc[0], self.total_effect
        windows = f" in windows of {about['window']} layers" if about["window"] > 1 else ""
        passed, tested = int(self.data["passes"].sum()), int(np.isfinite(self.data["control"]).sum())
        share = best["indirect"] / (total["estimate"] or math.nan)
        return (
            f"{about['site']}{windows}: {about['metric']} falls by {_shown(**total)} under noise; layer "
            f"{best['layer']} at {best[self.axis]} brings back "
            f"{_shown(best['indirect'], best['ci_low'], best['ci_high'])}, {share:.0%}; {passed} of the {tested} "
            f"largest cells pass both controls (n={about['n_prompts']}, {about['draws']} draws, 95% {about['scope']})"
        )


def _shown(estimate: float | None, ci_low: float | None, ci_high: float | None) -> str:
    known = ci_low is not None and ci_high is not None and math.isfinite(ci_low)
    return f"{estimate:.2f}" + (f" [{ci_low:.2f}, {ci_high:.2f}]" if known else "")
