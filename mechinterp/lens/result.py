"""What a lens gives back: every layer's reading at every prompt, with intervals and a control over prompts."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from mechinterp.results import Result, plain

QUANTITIES = ("prob", "log_rank", "logit_diff", "kl", "entropy")


@dataclass(frozen=True, repr=False)
class LensResult(Result):
    """Readings of every layer, 0 (the embeddings) to n_layers (the model's own output).

    `data` holds over `layer`, then `pos` or `role` where several positions are read, then `prompt`: `kl` to the final
    distribution and `entropy` (nats); `top_token` and `top_prob` with a further axis `rank`; and where there is an
    answer `prob`, `answer_rank` (0 is first), `log_rank` (natural log of 1 + rank), and `logit_diff` to the wrong
    answer where there is one. `settled`, without `layer`: the first layer from which the answer (the output's first
    token where there is none) stays first, alone, up to the output; NaN if it is not first there.

    Over prompts, for each quantity: `{quantity}_mean`, `_low`, `_high` (95%), and where there is a control (described
    in `about["control"]`) `_control`, its mean, and `_gap_low`, `_gap_high`, the interval of the difference to it.
    `passes`: the difference of the quantity `about["passes"]` is above `about["threshold"]`, the sign-flip threshold of
    all layers together, and its interval excludes 0.
    """

    @property
    def n_layers(self) -> int:
        """Of the model; the label of the last row."""
        return int(self.data["layer"].values[-1])

    @property
    def axis(self) -> str | None:
        """The axis of positions: `pos`, `role`, or None where one position (or the task's targets) is read."""
        return next((name for name in ("pos", "role") if name in self.data["kl"].dims), None)

    @property
    def n_prompts(self) -> int:
        """Prompts that were read."""
        return self.data.sizes["prompt"]

    @property
    def has_answer(self) -> bool:
        """Whether an answer was asked for."""
        return "prob" in self.data

    def top(self, n: int = 10) -> pd.DataFrame:
        """At most `n` layers, evenly spaced with both ends. One prompt: what each layer would say; several positions:
        a column each. Several prompts: means, with interval and control; by role or position, of one quantity."""
        chosen = np.unique(np.linspace(0, self.n_layers, max(1, min(n, self.n_layers + 1))).round().astype(int))
        data = self.data.sel(layer=chosen)
        if self.axis is not None:
            made = [data.sel({self.axis: spot}) for spot in data[self.axis].values]
            cells = [
                self._first_tokens(one, 1) if self.n_prompts == 1 else one[f"{self._leading}_mean"].values
                for one in made
            ]
            return pd.DataFrame({"layer": chosen, **dict(zip(self.spot_labels, cells, strict=True))})
        if self.n_prompts == 1:
            one = data.isel(prompt=0)
            columns = {"first tokens": self._first_tokens(data, 3), "first prob": one["top_prob"].isel(rank=0).values}
            names = ["answer_rank", "prob", "logit_diff", "entropy", "kl"]
            columns |= {name: one[name].values for name in names if name in one}
            if "answer_rank" in columns:
                columns["answer_rank"] = columns["answer_rank"].astype(int)
            return pd.DataFrame({"layer": chosen, **columns})
        shown = [name for name in ("prob", "log_rank", "logit_diff", "kl") if name in data]
        columns = {}
        for name in shown:
            columns[name] = data[f"{name}_mean"].values
            if name == self._leading:
                columns |= {"low": data[f"{name}_low"].values, "high": data[f"{name}_high"].values}
            if name == self._leading and f"{name}_control" in data:
                columns["control"] = data[f"{name}_control"].values
        columns |= {"passes": data["passes"].values} if "passes" in data else {}
        return pd.DataFrame({"layer": chosen, **columns})

    @property
    def spot_labels(self) -> list[str]:
        """Columns of positions: `Mary_3`, role names, indices; empty where one position is read."""
        if self.axis is None:
            return []
        return self.about.get("pos_labels") or [str(label) for label in self.data[self.axis].values]

    @property
    def _leading(self) -> str:
        return self.about["passes"] or ("prob" if self.has_answer else "kl")

    def _first_tokens(self, data: Any, n: int) -> list[str]:
        """The first `n` tokens of each layer, of the first prompt."""
        rows = data["top_token"].isel(prompt=0).values[:, :n].tolist()
        return [" ".join(repr(self._text(token)) for token in row) for row in rows]

    def _text(self, token: int) -> str:
        return self.about["strings"].get(str(token), "")

    def reading(self, prompt: int, spot: int = -1) -> dict[str, Any]:
        """Plain values by layer of one prompt at one position: rank, prob, top, top_prob, entropy, kl, settled."""
        data = self.data.isel(prompt=prompt)
        data = data if self.axis is None else data.isel({self.axis: spot})
        names = {"rank": "answer_rank", "prob": "prob", "logit_diff": "logit_diff", "entropy": "entropy", "kl": "kl"}
        made = {key: plain(data[name]) if name in data else None for key, name in names.items()}
        if made["rank"] is not None:
            made["rank"] = [int(r) if r is not None and r == int(r) else r for r in made["rank"]]
        made["top"] = [[self._text(token) for token in row if token >= 0] for row in data["top_token"].values.tolist()]
        return {**made, "top_prob": plain(data["top_prob"]), "settled": plain(data["settled"])}

    def to_json(self) -> dict[str, Any]:
        """Plain values. `layers`; of one prompt `rank`, `prob`, `top`, … by layer at the last position that was read,
        and `positions`, a list of the same, where several were read; of more prompts `prompts`, a list of these; `mean`
        over prompts with intervals and control; and where it all comes from. Undefined is None."""
        readings = []
        for prompt in range(self.n_prompts):
            one = self.reading(prompt)
            if self.axis is not None:
                labels = zip(self.data[self.axis].values.tolist(), self.spot_labels, strict=True)
                spots = enumerate(labels)
                one["positions"] = [{self.axis: at, "label": text} | self.reading(prompt, i) for i, (at, text) in spots]
            readings.append(one)
        mean = {name: self._over_prompts(name) for name in QUANTITIES if name in self.data}
        return {
            "layers": self.data["layer"].values.tolist(),
            **(readings[0] if self.n_prompts == 1 else {"prompts": readings}),
            "mean": mean,
            "passes": plain(self.data["passes"]) if "passes" in self.data else None,
            "about": plain({name: value for name, value in self.about.items() if name != "strings"}),
        }

    def _over_prompts(self, name: str) -> dict[str, Any]:
        ends = {key: f"{name}_{key}" for key in ("mean", "low", "high", "control", "gap_low", "gap_high")}
        return {key: plain(self.data[full]) for key, full in ends.items() if full in self.data}

    def summary(self) -> str:
        """From which layer on the answer (or the output's first token) is first, with n and interval."""
        last = self.data if self.axis is None else self.data.isel({self.axis: -1})
        settled = last["settled"].values
        lens = f"{self.about['lens']} lens" + (f" at {self.spot_labels[-1]}" if self.axis else "")
        if self.n_prompts == 1:
            return f"{lens}: {self._settled_once(last, settled[0])}; one prompt: no interval over prompts"
        what = "the answer" if self.has_answer else "the output's first token"
        kept = settled[np.isfinite(settled)]
        share = f"{what} is first at the output in {len(kept)} of {len(settled)} prompts"
        share += f", half of them from layer {np.median(kept):.0f} of {self.n_layers} on" if len(kept) else ""
        return f"{lens}: {share}; {self._at_output(last)} (n={self.n_prompts}, 95% {self.about['scope']})"

    def _settled_once(self, last: Any, settled: float) -> str:
        one = last.isel(prompt=0, layer=-1)
        if not self.has_answer:
            first, prob = self._text(int(one["top_token"][0])), float(one["top_prob"][0])
            if not np.isfinite(settled):
                return f"several tokens are first at the output (P = {prob:.2f} each)"
            return f"the output's {first!r} (P = {prob:.2f}) is first from layer {settled:.0f} of {self.n_layers} on"
        answer, prob = self.about["answers"][0], float(one["prob"])
        if not np.isfinite(settled):
            return f"{answer!r} is not first at the output: rank {float(one['answer_rank']):.0f}, P = {prob:.2f}"
        return f"{answer!r} is first from layer {settled:.0f} of {self.n_layers} on, P = {prob:.2f} at the output"

    def _at_output(self, last: Any) -> str:
        """Mean of the leading quantity at the output, or of KL halfway, and the layers that pass the control."""
        name = self._leading
        layer = self.n_layers if self.has_answer else self.n_layers // 2
        mean, low, high = (float(last[f"{name}_{key}"].sel(layer=layer)) for key in ("mean", "low", "high"))
        text = f"mean {name.replace('_', ' ')} {mean:.2f} [{low:.2f}, {high:.2f}] at layer {layer}"
        if "passes" not in last:
            return f"{text}; no control: {self.about['control']}"
        passing = last["layer"].values[last["passes"].values]
        control = float(last[f"{name}_control"].sel(layer=layer))
        found = f"passes at layers {spans(passing.tolist())}" if len(passing) else "passes at no layer"
        return f"{text}, control {control:.2f} ({self.about['control']}), {found}"


def spans(numbers: list[int]) -> str:
    """`3, 20–30` of ascending integers."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return ", ".join(str(first) if first == last else f"{first}–{last}" for first, last in runs)
