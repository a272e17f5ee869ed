"""The HTML of a report: `report.html.jinja`, with its style, its scripts and its data inlined."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup
from plotly.offline import get_plotlyjs

from mechinterp.errors import UserError
from mechinterp.reporting.cells import BLANKS

Cell = str | int | float | bool | None
HERE = Path(__file__).parent
SCRIPTS = (
    "tables.js",
    "themes.js",
    "plots.js",
    "attention.js",
    "graph.js",
    "report.js",
)  # one script: each uses those before it


def render(payload: Mapping[str, Any]) -> str:
    """The HTML page of a payload."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(HERE), autoescape=True, trim_blocks=True, lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )  # fmt: skip
    environment.filters.update(number=_number, token=_token, cell_class=_cell_class)
    views = [section["attention"] for section in payload["sections"] if section["attention"]]
    data = {"figures": [figure for section in payload["sections"] for figure in section["figures"]], "attention": views}
    roles = dict.fromkeys(role for prompt in payload["prompts"] for role in prompt["roles"] if role)
    return environment.get_template("report.html.jinja").render(
        report=payload,
        manifest=_manifest_rows(payload["manifest"]),
        role_index={role: index % 8 for index, role in enumerate(roles)},
        css=Markup((HERE / "report.css").read_text(encoding="utf-8")),
        script=Markup(_script()),
        plotly=Markup(_inline(get_plotlyjs())) if data["figures"] else "",
        circuitsvis=Markup(_inline(_circuitsvis_bundle())) if views else "",
        data=Markup(_script_json(data)),
    )


def _script() -> str:
    """The page's behaviour, in a scope of its own."""
    parts = [(HERE / name).read_text(encoding="utf-8") for name in SCRIPTS]
    return '"use strict";\n(() => {\n' + "\n".join(parts) + "})();"


def _script_json(value: Any) -> str:
    """JSON that no string in it can end or open a tag."""
    text = json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    for character in "<>&\u2028\u2029":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return text


def _inline(script: str) -> str:
    """A script that can stand inside the page: no closing tag, no pointer to a source map (a request)."""
    lines = [line for line in script.splitlines() if not line.startswith("//# sourceMappingURL=")]
    return "\n".join(lines).replace("</script", "<\\/script")


def _circuitsvis_bundle() -> str:
    # find_spec: importing circuitsvis would import torch, and only a file is needed.
    spec = importlib.util.find_spec("circuitsvis")
    if spec is None or spec.origin is None:
        raise UserError("the report shows attention, and the package circuitsvis is missing: pip install circuitsvis")
    path = Path(spec.origin).parent / "dist" / "cdn" / "iife.js"
    if not path.is_file():
        raise UserError(f"circuitsvis is installed without its script {path}; reinstall circuitsvis")
    return path.read_text(encoding="utf-8")


def _manifest_rows(manifest: Mapping[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    """Nested mappings as dotted names."""
    rows: list[tuple[str, str]] = []
    for key, value in manifest.items():
        name = f"{prefix}{key}"
        if isinstance(value, Mapping):
            rows.extend(_manifest_rows(value, f"{name}."))
        elif isinstance(value, list):
            rows.append((name, " ".join(map(str, value)) or "none"))
        else:
            rows.append((name, "none" if value is None else str(value)))
    return rows


def _number(cell: Cell) -> str:
    if cell is None:
        return "undefined"
    if isinstance(cell, bool):
        return "yes" if cell else "no"
    if isinstance(cell, float):
        return f"{cell:.3f}".replace("-", "\u2212")
    return str(cell)


def _cell_class(cell: Cell) -> str:
    if cell is None:
        return "number undefined"
    return "number" if isinstance(cell, (int, float)) and not isinstance(cell, bool) else "text"


def _token(text: str) -> Markup:
    """A token with its spaces and newlines made visible."""
    return Markup("").join(
        Markup('<span class="blank">{}</span>').format(BLANKS[c]) if c in BLANKS else c for c in text
    ) or Markup('<span class="blank">∅</span>')
