"""What attribution to features gives back (attribution.py)."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from mechinterp.results import Result, plain

ERROR = -1  # in the place of a feature's number: what an autoencoder's features do not write


@dataclass(frozen=True, repr=False)
class FeatureEffects(Result):
    """Approximate effects of patching features, one at a time.

    `data` holds over `row` (an autoencoder's feature that is on somewhere, or its error): `sae`, the number of the
    autoencoder; `feature`, its own number, -1 for the error; `effect` (0 the base run, 1 the source run) with `ci_low`
    and `ci_high` (95%); `passes`, beyond the sign-flip threshold over all rows; `exact`, the effect of a run in which
    the feature is patched, of the largest ones, NaN elsewhere; `mean_change` and `exact_change`, the same two in the
    metric's own unit, which are defined also where the two runs hardly differ. With a further axis `prompt`: `change`;
    over `prompt` alone `base` and `source`, the metric of the two runs.
    """

    @property
    def features(self) -> pd.DataFrame:
        """One row a feature, errors left out, the largest |effect| first."""
        return self._sorted(self.to_frame().query(f"feature != {ERROR}"))

    @property
    def errors(self) -> pd.DataFrame:
        """One row an autoencoder: the effect of what its features do not write."""
        return self.to_frame().query(f"feature == {ERROR}").reset_index(drop=True)

    def top(self, n: int = 10) -> pd.DataFrame:
        """The rows of largest |effect|, errors among them."""
        return self._sorted(self.to_frame()).head(n)

    def to_frame(self) -> pd.DataFrame:
        """One row a feature or error, by autoencoder and number, with its name."""
        frame = super().to_frame().drop(columns="row")
        numbers = ["error" if feature == ERROR else f"feature {feature}" for feature in frame["feature"]]
        where = [self.about["saes"][sae] for sae in frame["sae"]]
        frame.insert(0, "name", [f"{site} {number}" for site, number in zip(where, numbers, strict=True)])
        return frame

    def _sorted(self, frame: pd.DataFrame) -> pd.DataFrame:
        order = np.argsort(-np.abs(frame["mean_change"].to_numpy()), kind="stable")
        return frame.iloc[order].reset_index(drop=True)

    def to_json(self) -> dict[str, Any]:
        """Plain values by row, and where they come from; undefined is None."""
        frame = self.to_frame()
        return {
            "rows": {str(name): plain(frame[name].to_numpy()) for name in frame.columns},
            "baseline": {name: plain(self.data[name].mean()) for name in ("base", "source")},
            **{name: plain(self.about[name]) for name in ("threshold", "agreement", "saes", "scope")},
            "about": plain(self.about),
        }

    def summary(self) -> str:
        """One line: the largest feature with its interval and exact effect, and the share that features carry."""
        about, features = self.about, self.features
        start = f"features of {', '.join(about['saes'])}, {about['direction']}, {about['metric']}"
        n = f"n={about['n_prompts']}"
        if not len(features):
            return f"{start}: none is on ({n})"
        best = features.iloc[0]
        if not np.isfinite(best["effect"]):
            return f"{start}: undefined, the two runs do not differ ({n})"
        interval = "" if not np.isfinite(best["ci_low"]) else f" [{best['ci_low']:.2f}, {best['ci_high']:.2f}]"
        exact = f" (exactly {best['exact']:.2f})" if np.isfinite(best["exact"]) else ""
        errors = ", ".join(f"{effect:.2f}" for effect in self.errors["effect"])
        passed = f"{np.count_nonzero(features['passes'])} of {len(features)} features pass the threshold"
        passed = "too few prompts for a threshold" if about["threshold"] is None else passed
        return (
            f"{start}: largest {best['name']} {best['effect']:.2f}{interval}{exact}; {passed}; "
            f"errors {errors} ({n}, 95% {about['scope']})"
        )


def rank_correlation(a: np.ndarray, b: np.ndarray) -> float:
    """Spearman's, of two `[n]`; nan under three values, or where one of them has no order."""
    if len(a) < 3:
        return float("nan")
    ranks = np.stack([pd.Series(values).rank().to_numpy() for values in (a, b)])
    return float("nan") if (ranks.std(1) == 0).any() else float(np.corrcoef(ranks)[0, 1])
