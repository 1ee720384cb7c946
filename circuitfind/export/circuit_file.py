"""circuit.json: a circuit's edges by name, with their effects and the circuit's measurements.

Version 1 (UTF-8, one JSON object; unknown keys are ignored, so that later versions may add some):

    format   "circuitfind.circuit"
    version  1
    graph    {n_layers, n_heads, n_kv_heads, d_model, parallel}: the graph that the names belong to; for hybrid models
             also "mixers", the layers without attention
    record   where the numbers come from: model, task, method, metric, ablation, sign, seed, pairs, settings, versions
    nodes    names of the edges' nodes (for other tools; not used when the file is read)
    edges    [{edge: "a0.h1->m2", estimate: 0.12 | null, exact: 0.11 | null}, ...]: effects in units of the metric,
             positive = supports
    facts    measurements of the whole circuit, such as its faithfulness
    groups   {"name movers": ["a9.h9", ...]}: named groups of nodes, if the user has made any

Numbers are finite: NaN and infinite values become null in the file. Nothing here needs a model.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from os import PathLike
from pathlib import Path
from typing import Any, NamedTuple, NotRequired, get_origin, get_type_hints

from pydantic import BaseModel, ConfigDict, Field, FiniteFloat, ValidationError, create_model
from typing_extensions import TypedDict

from circuitfind.errors import FileError
from circuitfind.export.files import VERSION, plain, read as read_object, write_text
from circuitfind.export.graphs import EdgeRow
from circuitfind.graph import Graph
from circuitfind.record import Record

FORMAT = "circuitfind.circuit"


class _Part(BaseModel):
    model_config = ConfigDict(strict=True)


class GraphPart(_Part):
    """The fields of a `Graph`, repeated here so that a change of the class cannot change the format."""

    n_layers: int = Field(ge=1)
    n_heads: int = Field(ge=1)
    n_kv_heads: int = Field(ge=1)
    d_model: int
    parallel: bool = False
    mixers: list[int] = []


# The fields of a `Record`. A missing field becomes empty, not the class's default, such as the versions installed here.
_FIELDS: dict[str, Any] = {name: (kind, (get_origin(kind) or kind)()) for name, kind in get_type_hints(Record).items()}
RecordPart = create_model("RecordPart", __base__=_Part, **_FIELDS)


class EdgePart(TypedDict):
    """One edge by name; a dictionary and not a model, because a file may hold a million edges."""

    __pydantic_config__ = ConfigDict(strict=True)  # type: ignore[misc]  # how pydantic configures a TypedDict

    edge: str
    estimate: NotRequired[FiniteFloat | None]
    exact: NotRequired[FiniteFloat | None]


class CircuitFile(_Part):
    """The whole file, with an unchecked record; `_WHOLE` also checks the record."""

    format: str
    version: int
    graph: GraphPart
    record: Any
    nodes: list[str] = []
    edges: list[EdgePart]
    facts: dict[str, Any] = {}
    groups: dict[str, list[str]] = {}


_WHOLE = create_model("CircuitFile", __base__=CircuitFile, record=(RecordPart, RecordPart()))


class StoredCircuit(NamedTuple):
    """The content of a circuit.json as the package's own types."""

    graph: Graph
    rows: list[EdgeRow]
    record: Record
    facts: dict[str, Any]
    groups: dict[str, tuple[str, ...]]


def write(
    path: str | PathLike[str],
    graph: Graph,
    rows: Iterable[EdgeRow],
    nodes: Sequence[str],
    record: Record,
    **more: Mapping[str, Any],
) -> Path:
    """Write circuit.json atomically and return its path. `nodes`: names of the edges' nodes. `more`: facts, groups."""
    content = {
        "format": FORMAT,
        "version": VERSION,
        "graph": graph.as_dict(),
        "record": plain(asdict(record)),
        "nodes": list(nodes),
        "edges": [
            {"edge": graph.edge_name(u, r), "estimate": plain(estimate), "exact": plain(exact)}
            for u, r, estimate, exact in rows
        ],
        **plain(more),
    }
    return write_text(path, _layout(content))


def read(path: str | PathLike[str]) -> StoredCircuit:
    """Read circuit.json.

    Raises:
        FileError: the file is missing, not JSON, of another format or a newer version; holds wrong types; or names an
            edge or node that its graph lacks, or an edge twice.
    """
    raw = read_object(path, FORMAT)
    try:
        content = _WHOLE.model_validate(raw)
        graph = Graph(**content.graph.model_dump())
    except ValidationError as error:
        raise FileError(f"{path}: {_first(error)}") from None
    except FileError as error:
        raise FileError(f"{path}: graph: {error}") from None
    groups = {name: tuple(nodes) for name, nodes in content.groups.items()}
    for name, nodes in groups.items():
        if strange := [node for node in nodes if node not in graph.node_names]:
            raise FileError(f"{path}: group '{name}': {graph.not_named('node', strange[0], graph.node_names)}")
    record = Record(**content.record.model_dump())
    return StoredCircuit(graph, _rows(path, graph, content.edges), record, content.facts, groups)


def _rows(path: str | PathLike[str], graph: Graph, edges: list[EdgePart]) -> list[EdgeRow]:
    rows: dict[tuple[int, int], EdgeRow] = {}
    for part in edges:
        try:
            cell = graph.edge(part["edge"])
        except FileError as error:
            raise FileError(f"{path}: {error}") from None
        if cell in rows:
            raise FileError(f"{path}: edge '{part['edge']}' is listed twice")
        rows[cell] = EdgeRow(*cell, part.get("estimate"), part.get("exact"))
    return list(rows.values())


def _first(error: ValidationError) -> str:
    """Return the first error that pydantic found, as one line."""
    first = error.errors(include_url=False, include_context=False)[0]
    where = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in first["loc"]).lstrip(".")
    more = f" (and {error.error_count() - 1} more)" if error.error_count() > 1 else ""
    text = repr(first["input"])
    given = "" if first["type"] == "missing" else f", not {text if len(text) <= 60 else text[:57] + '...'}"
    return f"{where}: {first['msg'][0].lower()}{first['msg'][1:]}{given}{more}"


def _layout(content: dict[str, Any]) -> str:
    """Return JSON text with one edge per line, so that a changed edge is one changed line."""
    lines = []
    for key, value in content.items():
        if key == "edges" and value:
            inner = _dump(value)[1:-1].replace("}, {", "},\n    {")  # names and numbers contain no braces
            text = f"[\n    {inner}\n  ]"
        else:
            text = _dump(value, indent=None if key == "nodes" else 2).replace("\n", "\n  ")
        lines.append(f'  "{key}": {text}')
    return "{\n" + ",\n".join(lines) + "\n}\n"


def _dump(value: Any, indent: int | None = None) -> str:
    return json.dumps(value, indent=indent, ensure_ascii=False, allow_nan=False)
