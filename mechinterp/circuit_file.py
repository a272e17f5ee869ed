"""Circuit files as plain JSON: read and checked without a model (and without importing torch).

A file holds either scores, as columns over all edges of the graph, or a circuit, one object an edge. In both, `model`,
`tokenizer_sha256`, `task`, `ablation`, `direction`, `metric`, `method` and `seed` say what was measured and how, and
`reading` says in words what the numbers are. circuits/files.py makes the objects from it and the other way round.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from mechinterp.errors import UserError

FORMAT, VERSION = "mechinterp-circuit", 1
LISTS = ("sources", "destinations", "nodes", "edges", "rankings")  # what a header leaves out
DIMENSIONS = ("n_layers", "n_heads", "n_kv_heads", "d_model")


def read(path: str | Path) -> dict[str, Any]:
    """All that a file holds, its outline checked.

    Raises:
        UserError: no such file, no JSON, a file of another kind or of a newer version, or one with parts missing.
    """
    try:
        found = json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"no such circuit file: {path}") from None
    except json.JSONDecodeError as error:
        raise UserError(f"{path} is not JSON: {error.msg} at line {error.lineno}, column {error.colno}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read a circuit from {path}: {error}") from error
    if not isinstance(found, dict) or found.get("format") != FORMAT:
        hint = "; it looks like MIB's or EAP-IG's: read it with circuits.mib" if _is_mib(found) else ""
        raise UserError(f'{path} is no circuit file: it has no "format": "{FORMAT}"{hint}')
    version = found.get("version")
    if type(version) is not int or version > VERSION:
        raise UserError(
            f"{path} is of version {version}; this mechinterp reads up to {VERSION}: install a newer mechinterp"
        )
    _require_outline(path, found)
    return found


def read_header(path: str | Path) -> dict[str, Any]:
    """What a file says of itself: all but its lists of nodes and edges, of which it has the numbers.

    Raises:
        UserError: see `read`.
    """
    found = read(path)
    header = {name: value for name, value in found.items() if name not in LISTS}
    return header | {"n_listed": sum(1 for _ in rows(found)), "rankings": list(found.get("rankings", {}))}


def rows(found: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """One row an edge (or scored node): source, destination, place, score, inclusion, …, as far as present."""
    if found["kind"] == "circuit":
        yield from found["edges"]
        return
    columns = found["edges" if found["level"] == "edge" else "nodes"]
    names = {"source": found["sources"], "destination": found["destinations"], "place": found["graph"]["places"]}
    for values in zip(*columns.values(), strict=True):
        row = dict(zip(columns, values, strict=True))
        yield {name: names[name][value] if name in names else value for name, value in row.items()}


def dump(value: Any, indent: str = "") -> str:
    """JSON text with a column, or an object of a list, on each line: readable, and a third of the size of one number
    on each. Raises ValueError for a number that is not finite."""
    inner = indent + " "
    if isinstance(value, Mapping) and value:
        lines = [f"{inner}{json.dumps(name)}: {dump(item, inner)}" for name, item in value.items()]
        return "{\n" + ",\n".join(lines) + f"\n{indent}}}"
    if isinstance(value, Sequence) and value and isinstance(value[0], Mapping):
        return "[\n" + ",\n".join(inner + json.dumps(item, allow_nan=False) for item in value) + f"\n{indent}]"
    compact = isinstance(value, Sequence) and len(value) > 20
    return json.dumps(value, allow_nan=False, ensure_ascii=False, separators=(",", ":") if compact else None)


def _is_mib(found: Any) -> bool:
    return isinstance(found, dict) and {"cfg", "nodes", "edges"} <= found.keys()


def _require_outline(path: str | Path, found: Mapping[str, Any]) -> None:
    """Raise UserError where a part is missing or is no list, object or text as it should be."""
    kind, level = found.get("kind"), found.get("level")
    if kind not in ("scores", "circuit") or (kind == "scores" and level not in ("edge", "node")):
        raise UserError(
            f"{path} holds kind {kind!r}, level {level!r}; valid: 'circuit', or 'scores' of 'edge' or 'node'"
        )
    expected: dict[str, type] = {"model": dict, "graph": dict, "about": dict}
    if kind == "circuit":
        expected |= {"edges": list}
    else:
        expected |= {"sources": list, "destinations": list, "rankings": dict, f"{level}s": dict}
    for name, of_type in expected.items():
        if not isinstance(found.get(name), of_type):
            raise UserError(f"{path} is damaged: {name!r} must be a JSON {'object' if of_type is dict else 'list'}")
    for name, parts in (
        ("model", ("name", "weights_sha256", *DIMENSIONS)),
        ("graph", ("qkv", "mlp", "positions", "places")),
    ):
        missing = [part for part in parts if part not in found[name]]
        if missing:
            raise UserError(f"{path} is damaged: {name!r} does not say {missing[0]!r}")
    if kind == "circuit":
        _require_edges(path, found["edges"])
    else:
        _require_columns(path, found)


def _require_edges(path: str | Path, edges: list[Any]) -> None:
    optional = {"place", "score", "inclusion"}
    for number, edge in enumerate(edges, 1):
        texts = isinstance(edge, dict) and all(isinstance(edge.get(end), str) for end in ("source", "destination"))
        if not texts or edge.keys() - optional - {"source", "destination"} or edge.keys() != edges[0].keys():
            raise UserError(
                f"{path} is damaged: edge {number} must have source and destination, and the others of "
                f"{', '.join(sorted(optional))} that edge 1 has; found {_shown(edge)}"
            )


def _require_columns(path: str | Path, found: Mapping[str, Any]) -> None:
    level = found["level"]
    columns = found[f"{level}s"]
    ends = {"source": len(found["sources"]), "place": len(found["graph"]["places"])}
    ends |= {"destination": len(found["destinations"])} if level == "edge" else {}
    for name in (*(end for end in ends if end != "place" or "place" in columns), "score"):
        if not isinstance(columns.get(name), list):
            raise UserError(f"{path} is damaged: {level}s have no column {name!r}")
    lengths = {name: len(column) for name, column in columns.items() if isinstance(column, list)}
    if len(set(lengths.values())) > 1 or len(lengths) < len(columns):
        raise UserError(f"{path} is damaged: the columns of its {level}s are of several lengths: {lengths}")
    for name, size in ends.items():
        wrong = [one for one in columns.get(name, ()) if type(one) is not int or not 0 <= one < size]
        if wrong:
            raise UserError(
                f"{path} is damaged: {name} is a number 0 … {size - 1} of its list; found {_shown(wrong[0])}"
            )


def _shown(value: object) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
