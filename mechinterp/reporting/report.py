"""A report: one HTML file that opens offline and asks the network for nothing.

Beside it lies `report.json`, which holds all that the page shows; `rebuild` makes the page again from it.
plotly.js and CircuitsVis are inlined once a page, the second only where a section shows attention.
"""

from __future__ import annotations

import base64
import dataclasses
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import plotly.graph_objects as go
from numpy.typing import ArrayLike

from mechinterp.errors import UserError
from mechinterp.files import write_text
from mechinterp.reporting.page import Cell, render

FORMAT = 1


@dataclass(frozen=True)
class Table:
    """A small table: at most `max_rows` rows are shown, and the page says how many there are."""

    columns: tuple[str, ...]
    rows: tuple[tuple[Cell, ...], ...]
    caption: str = ""
    max_rows: int = 12

    def __post_init__(self) -> None:
        wrong = [len(row) for row in self.rows if len(row) != len(self.columns)]
        if wrong:
            raise UserError(f"table {self.caption!r}: a row of {wrong[0]} cells under {len(self.columns)} columns")


@dataclass(frozen=True)
class Prompt:
    """One prompt by token. `roles` names the role of each token, None where it has none."""

    tokens: tuple[str, ...]
    roles: tuple[str | None, ...] = ()
    label: str = ""  # "clean", "corrupted"
    answer: str = ""

    def __post_init__(self) -> None:
        if self.roles and len(self.roles) != len(self.tokens):
            raise UserError(f"prompt: {len(self.roles)} roles for {len(self.tokens)} tokens")


@dataclass(frozen=True, eq=False)
class AttentionView:
    """Attention patterns of the heads that were found, for one prompt.

    `patterns` is `[head query key]`, from 0 to 1; it is kept as uint8 (steps of 1/255).

    Raises:
        UserError: the shapes do not agree.
    """

    tokens: tuple[str, ...]
    heads: tuple[str, ...]
    patterns: ArrayLike
    notes: tuple[str, ...] = ()  # one a head: what it does
    caption: str = ""

    def __post_init__(self) -> None:
        array = np.asarray(self.patterns)
        shape = (len(self.heads), len(self.tokens), len(self.tokens))
        if array.shape != shape:
            raise UserError(f"attention: patterns of shape {list(array.shape)}, [head query key] is {list(shape)}")
        if self.notes and len(self.notes) != len(self.heads):
            raise UserError(f"attention: {len(self.notes)} notes for {len(self.heads)} heads")
        if array.dtype != np.uint8:
            array = np.round(np.clip(np.nan_to_num(array.astype(np.float64)), 0, 1) * 255).astype(np.uint8)
        object.__setattr__(self, "patterns", array)


@dataclass(frozen=True, eq=False)
class Section:
    """A heading, with any of: paragraphs (separated by blank lines), figures, a table, attention."""

    heading: str
    text: str = ""
    figures: tuple[go.Figure, ...] = ()
    table: Table | None = None
    attention: AttentionView | None = None


@dataclass(frozen=True, eq=False)
class Report:
    """All that the page shows, from the question to the command that makes it again.

    `answer` is one sentence; `header` says model, prompts and n; `baseline` is pairs of name and value.
    `Run.finish` fills in the manifest.
    """

    title: str
    question: str
    answer: str
    header: str
    command: str
    baseline: tuple[tuple[str, str], ...] = ()
    prompts: tuple[Prompt, ...] = ()
    sections: tuple[Section, ...] = ()
    caveats: tuple[str, ...] = ()
    manifest: Mapping[str, Any] = field(default_factory=dict)

    def write(self, path: Path | str) -> Path:
        """Write the page, and `report.json` beside it. Returns the absolute path of the page."""
        path = Path(path).absolute()
        payload = self.payload()
        text = json.dumps(payload, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
        write_text(path.with_name("report.json"), text + "\n")
        write_text(path, render(payload))
        return path

    def payload(self) -> dict[str, Any]:
        """The report as JSON can hold it: figures as plotly's JSON, attention as base64 of uint8, no NaN."""
        return {
            "format": FORMAT,
            "title": self.title,
            "question": self.question,
            "answer": self.answer,
            "header": self.header,
            "command": self.command,
            "baseline": [list(pair) for pair in self.baseline],
            "prompts": [_finite(dataclasses.asdict(prompt)) for prompt in self.prompts],
            "sections": [_section_payload(section) for section in self.sections],
            "caveats": list(self.caveats),
            "manifest": _finite(dict(self.manifest)),
        }


def read(path: Path | str) -> Report:
    """The report of a run folder, or of a `report.json`.

    Raises:
        UserError: there is none, or it is damaged.
    """
    path = Path(path)
    path = path / "report.json" if path.is_dir() else path
    payload = _read_payload(path)
    sections = tuple(_section(section) for section in payload["sections"])
    prompts = tuple(
        Prompt(tuple(p["tokens"]), tuple(p["roles"]), label=p["label"], answer=p["answer"]) for p in payload["prompts"]
    )
    return Report(
        title=payload["title"], question=payload["question"], answer=payload["answer"], header=payload["header"],
        command=payload["command"], baseline=tuple((name, value) for name, value in payload["baseline"]),
        prompts=prompts, sections=sections, caveats=tuple(payload["caveats"]), manifest=payload["manifest"],
    )  # fmt: skip


def rebuild(run_folder: Path | str) -> Path:
    """Write `report.html` of a run folder again from its `report.json`. Returns its absolute path.

    Raises:
        UserError: the folder holds no report, or a damaged one.
    """
    folder = Path(run_folder).absolute()
    if not folder.is_dir():
        raise UserError(f"no run folder at {folder}; give the folder that holds report.json")
    page = folder / "report.html"
    write_text(page, render(_read_payload(folder / "report.json")))
    return page


def _section_payload(section: Section) -> dict[str, Any]:
    view = section.attention
    return {
        "heading": section.heading,
        "text": section.text,
        "figures": [json.loads(figure.to_json() or "{}") for figure in section.figures],
        "table": _finite(dataclasses.asdict(section.table)) if section.table else None,
        "attention": _attention_payload(view) if view else None,
    }


def _attention_payload(view: AttentionView) -> dict[str, Any]:
    return {
        "tokens": list(view.tokens),
        "heads": list(view.heads),
        "notes": list(view.notes),
        "caption": view.caption,
        "patterns": base64.b64encode(np.asarray(view.patterns).tobytes()).decode(),
    }


def _section(payload: Mapping[str, Any]) -> Section:
    table, view = payload["table"], payload["attention"]
    attention = None
    if view:
        n, heads = len(view["tokens"]), len(view["heads"])
        patterns = np.frombuffer(base64.b64decode(view["patterns"]), dtype=np.uint8).reshape(heads, n, n)
        attention = AttentionView(
            tuple(view["tokens"]), tuple(view["heads"]), patterns, notes=tuple(view["notes"]), caption=view["caption"]
        )
    return Section(
        heading=payload["heading"],
        text=payload["text"],
        figures=tuple(go.Figure(figure) for figure in payload["figures"]),
        table=table
        and Table(tuple(table["columns"]), tuple(map(tuple, table["rows"])), table["caption"], table["max_rows"]),
        attention=attention,
    )


def _read_payload(path: Path) -> dict[str, Any]:
    try:
        payload = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"no report at {path}; run the experiment to its end, which writes one") from None
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read {path}: {error}; run the experiment again, finished parts are kept") from None
    expected = {f.name for f in dataclasses.fields(Report)} | {"format"}
    if not isinstance(payload, dict) or payload.get("format") != FORMAT or not expected <= payload.keys():
        raise UserError(f"{path} is not a report that this version reads (format {FORMAT}); run the experiment again")
    return payload


def _finite(value: Any) -> Any:
    """The value with NaN and infinities as None, and numpy's numbers as Python's."""
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, Mapping):
        return {str(key): _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return value
