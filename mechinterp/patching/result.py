"""What a sweep gives back: effects by cell with intervals and controls, and the metric of every prompt."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import xarray as xr

from mechinterp.results import Result, plain

if TYPE_CHECKING:
    import plotly.graph_objects as go


@dataclass(frozen=True, repr=False)
class SweepResult(Result):
    """Effects of patching every cell of a site.

    `data` holds, over the cell's axes (`layer`, then `head` or `kv_head`, then `pos` or `role`):
    `effect` (0 the base run, 1 the source run), `ci_low` and `ci_high` (95%), `control` (the effect of a patch from a
    donor prompt, which `about["control"]` describes, of the largest cells), `passes` (beyond the sign-flip threshold,
    and the interval of the difference to the donor excludes 0), and `patched` with a further axis `prompt`; over
    `prompt` alone: `base` and `source`, the metric of the two runs.
    """

    @property
    def dims(self) -> list[str]:
        """Axes of a cell."""
        return [str(dim) for dim in self.data["effect"].dims]

    @property
    def per_prompt(self) -> xr.DataArray:
        """`[… prompt]` each prompt's share of the effect: its mean over prompts is the effect; NaN where undefined."""
        change = self.data["patched"] - self.data["base"]
        defined = bool(np.isfinite(self.data["effect"]).all())
        return change / (float((self.data["source"] - self.data["base"]).mean()) if defined else np.nan)

    def top(self, n: int = 10) -> pd.DataFrame:
        """The cells of largest |effect|, with interval and controls; `passes` marks those that pass both."""
        frame = self.to_frame()
        frame = frame.iloc[np.argsort(-np.abs(frame["effect"].to_numpy()), kind="stable")[:n]]
        frame.insert(0, "cell", [self.label(row) for row in frame.to_dict("records")])
        return frame.reset_index(drop=True)

    def label(self, cell: dict[Any, Any]) -> str:
        """`L9H6 END`, `resid_pre L3 S2`, `L4KV1`: a cell's name from its labels."""
        where = f"L{cell['layer']}"
        where += f"H{cell['head']}" if "head" in cell else f"KV{cell['kv_head']}" if "kv_head" in cell else ""
        place = cell.get("role", self._pos_label(cell["pos"]) if "pos" in cell else "")
        named = self.about["site"] not in ("z",)
        return " ".join(part for part in (self.about["site"] if named else "", where, str(place)) if part)

    def _pos_label(self, pos: int) -> str:
        labels = self.about.get("pos_labels")
        return labels[list(self.data["pos"].values).index(pos)] if labels else str(pos)

    def to_json(self) -> dict[str, Any]:
        """Plain values: what the run was, axes and labels, nested arrays; undefined is None."""
        names = ("model", "site", "direction", "metric", "positions", "n_prompts")
        grids = {name: plain(self.data[name]) for name in ("effect", "ci_low", "ci_high")}
        return {
            **{name: self.about[name] for name in names},
            "dims": self.dims,
            "coords": {dim: self.data[dim].values.tolist() for dim in self.dims},
            **grids,
            "baseline": plain(self.about["baseline"]),
            "per_prompt": plain(self.per_prompt),
            "threshold": plain(self.about["threshold"]),
            "control": plain(self.data["control"]),
            "passes": plain(self.data["passes"]),
            **{name: self.about[name] for name in ("bos", "seed", "task", "corruption", "scope", "pairs", "header")},
            "control_prompts": self.about["control"],
            "in_force": self.about["in_force"],
        }

    def summary(self) -> str:
        """One line: what was patched, and the largest cell with its interval."""
        about, best = self.about, self.top(1).iloc[0]
        passed, tested = int(self.data["passes"].sum()), int(np.isfinite(self.data["control"]).sum())
        n = f"n={about['n_prompts']}"
        if not np.isfinite(best["effect"]):
            return f"{about['site']} {about['direction']}: undefined, the two runs do not differ ({n})"
        interval = "" if not np.isfinite(best["ci_low"]) else f" [{best['ci_low']:.2f}, {best['ci_high']:.2f}]"
        return (
            f"{about['site']} {about['direction']}, {about['metric']}: largest {best['cell']} "
            f"{best['effect']:.2f}{interval}; {passed} of the {tested} largest cells pass both controls "
            f"({n}, 95% {about['scope']})"
        )

    def figure(self) -> "go.Figure":
        """A plotly heatmap of the effects; one panel a role or position where cells have heads too."""
        from mechinterp.reporting.sweeps import sweep_figure  # drawing lies above: only this convenience reaches up

        return sweep_figure(self)
