"""The feature dashboard: one HTML file of what the features of an autoencoder are on for, and what they write.

The page is made from a `sae.features.Features` alone, so it can be made again from a saved one. It opens offline and
asks the network for nothing. The list of features stands in the page; a feature's panel is drawn when it is opened, by
`#feature-123` in the address too. No plotly: its bars are drawn by features.js, and the page stays small.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
from markupsafe import Markup

from mechinterp.files import write_text
from mechinterp.hooked.sites import Site
from mechinterp.reporting.page import HERE, _inline, _manifest_rows, _script_json, _token
from mechinterp.results import plain
from mechinterp.sae.features.arrays import BANDS
from mechinterp.sae.features.describe import Features

SCRIPTS = ("tables.js", "report.js", "features.js")  # one script: each uses those before it
DIGITS = 3  # significant ones of activations and logits in the page
SUMMED_UP = ("vocabulary", "header", "no_logits")  # what the page does not repeat in its manifest


def write_features(features: Features, path: Path | str, command: str = "") -> Path:
    """Write the dashboard. Returns its absolute path.

    Args:
        features: what `sae.features.describe` returned.
        path: of the HTML file.
        command: the command that makes it again; shown as it is.
    """
    path = Path(path).absolute()
    write_text(path, features_page(features, command))
    return path


def features_page(features: Features, command: str = "") -> str:
    """The HTML of the dashboard."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(HERE), autoescape=True, trim_blocks=True, lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )  # fmt: skip
    environment.filters.update(token=_token, share=share, short=short)
    data = payload(features)
    style = "".join((HERE / name).read_text(encoding="utf-8") for name in ("report.css", "features.css"))
    script = "\n".join((HERE / name).read_text(encoding="utf-8") for name in SCRIPTS)
    about = features.about
    return environment.get_template("features.html.jinja").render(
        title=f"Features of {about['model']} at {' + '.join(str(Site.from_hook(name)) for name in about['reads'])}",
        about=about,
        tiles=_tiles(features),
        rows=[_row(data, one) for one in data["features"]],
        any_logits=not about["no_logits"],
        caveats=_caveats(features),
        command=command,
        manifest=_manifest_rows({name: value for name, value in about.items() if name not in SUMMED_UP}),
        css=Markup(style),
        script=Markup(_inline('"use strict";\n(() => {\n' + script + "})();")),
        data=Markup(_script_json(data)),
    )


def payload(features: Features) -> dict[str, Any]:
    """What the page's script draws from: tokens by their place in one list, numbers rounded."""
    described = [features.one(int(number)) for number in features.data["feature"].values]
    words: dict[str, int] = {}
    listed = [_compact(one, words) for one in described]
    about = features.about
    return {
        "features": listed,
        "words": list(words),
        "ratio": 2 ** (1 / 4) if len(features.data["bin"]) < 2 else float(np.divide(*features.data["bin"][1::-1])),
        "n_documents": about["n_documents"],
        "n_tokens": about["n_tokens"],
        "no_logits": about["no_logits"],
        "same_site": about["reads"] == about["writes"],
        "bands": BANDS,
    }


def _compact(one: Mapping[str, Any], words: dict[str, int]) -> dict[str, Any]:
    """A feature with its tokens as numbers: {context: [peak, document, position, index of the peak, tokens, …]}."""

    def number(token: str) -> int:
        return words.setdefault(token, len(words))

    def context(row: Mapping[str, Any]) -> list[Any]:
        values = [_rounded(value) for value in row["activations"]]
        head = [_rounded(row["peak"]), row["document"], row["position"], row["at"]]
        return [*head, [number(token) for token in row["tokens"]], values, row.get("band")]

    made = {name: _rounded(value) for name, value in one.items() if not isinstance(value, list)}
    made["tokens"] = [[number(row["token"]), _rounded(row["share"]), _rounded(row["rate"])] for row in one["tokens"]]
    for side in ("promoted", "suppressed"):
        made[side] = [[number(row["token"]), _rounded(row["logit"])] for row in one.get(side, [])]
    made["neighbours"] = [[row["feature"], _rounded(row["cosine"])] for row in one["neighbours"]]
    made["histogram"] = [[_rounded(edge, 6), count] for edge, count in one["histogram"]]
    return made | {kind: [context(row) for row in one[kind]] for kind in ("contexts", "examples")}


def _row(data: Mapping[str, Any], one: Mapping[str, Any]) -> dict[str, Any]:
    """A line of the list, with its text for the search in small letters."""
    words = data["words"]
    tokens = [words[token] for token, *_ in one["tokens"][:3]]
    promoted = [words[token] for token, _ in one["promoted"][:4]]
    found = " ".join([str(one["feature"]), *tokens, *promoted]).lower()
    weak = bool(promoted) and one["promoted"][0][1] <= one["random_logit"]
    return {**one, "words": tokens, "promotes": promoted, "search": found, "weak": weak}


def _tiles(features: Features) -> list[tuple[str, str]]:
    about, data = features.about, features.data
    drawn = data["drawn"].values
    made = [
        ("features here", f"{data.sizes['feature']} of {about['d_sae']:,}"),
        ("L0", short(about["l0"])),
        ("tokens", f"{about['n_tokens']:,}"),
        ("documents", f"{about['n_documents']:,}"),
        ("median density, random features" if drawn.any() else "median density",
         share(float(np.median(data["density"].values[drawn if drawn.any() else slice(None)])))),
    ]  # fmt: skip
    if about["n_drawn_at_random"]:
        made.append(("never on, of a random draw", f"{about['never_on']} of {about['n_drawn_at_random']}"))
    return made


def _caveats(features: Features) -> list[str]:
    about = features.about
    made = [
        "Largest activations make most features look clean. Read the random examples of all quarters of a feature's "
        "activations before you name it.",
        "A share of the activation on one token far above a random feature's says that the feature may be that token.",
        "Excluded positions (shown struck out) were not encoded and do not count in any number.",
    ]
    if about["trained_for"] and _name(about["trained_for"]) != _name(about["model"]):
        made.insert(0, f"The autoencoder was trained on {about['trained_for']}, and is looked at on {about['model']}.")
    if about["n_documents"] < 8:
        made.append(f"{about['n_documents']} documents are few: intervals over documents are rough.")
    if about["no_logits"]:
        made.append(f"No direct logit effects: {about['no_logits']}.")
    else:
        made.append(
            "Logit effects are direct only: the decoder row at the feature's mean activation, through the final norm "
            "(at its median scale on this text) and the unembedding, less the mean over the vocabulary. What later "
            "layers make of the feature is not in them, and in early layers that is most of it."
            + (" They stand before the model's final soft-cap." if about["soft_cap"] else "")
        )
    return made


def _name(model: str) -> str:
    """A model's name without its owner or folder, as `Splice` compares names."""
    return model.rstrip("/").rsplit("/", 1)[-1].lower()


def _rounded(value: Any, digits: int = DIGITS) -> Any:
    value = plain(value)
    return float(f"{value:.{digits}g}") if isinstance(value, float) else value


def share(value: float | None) -> str:
    """A share in percent, with its small ones readable."""
    if value is None or not math.isfinite(value):
        return "undefined"
    return f"{100 * value:.2g}%" if value < 0.1 else f"{100 * value:.0f}%"


def short(value: float | None) -> str:
    """Three digits or so."""
    if value is None or not math.isfinite(value):
        return "undefined"
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}".replace("-", "\u2212")
