"""circuit.json: a circuit by the names of its edges, with everything that is known about it.

Version 1 (UTF-8, one JSON object; unknown keys are ignored, so that later versions may add some):

    format   "circuitfind.circuit"
    version  1
    graph    {n_layers, n_heads, n_kv_heads, d_model, parallel}: the graph that the names belong to; of a hybrid model
             also "mixers", the layers without attention
    record   where the numbers come from: model, task, method, metric, ablation, sign, seed, pairs, settings, versions
    nodes    names of the nodes that the edges touch (for other tools; reading takes them from the edges)
    edges    [{edge: "a0.h1->m2", estimate: 0.12 | null, exact: 0.11 | null}, ...] in units of the metric,
             positive = supports
    facts    what was measured of the circuit as a whole
    groups   {"name movers": ["a9.h9", ...]}: nodes under a name of the user's; only where there are any

Numbers are finite: what is NaN or infinite in memory is null in the file. Nothing here needs a model.
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
    """The numbers of a `Graph`; the file's own copy, so that a change of the class cannot change the format."""

    n_layers: int = Field(ge=1)
    n_heads: int = Field(ge=1)
    n_kv_heads: int = Field(ge=1)
    d_model: int
    parallel: bool = False
    mixers: list[int] = []


# The fields of a `Record`; what a file leaves out is empty, never filled with what holds on the machine that reads it.
_FIELDS: dict[str, Any] = {name: (kind, (get_origin(kind) or kind)()) for name, kind in get_type_hints(Record).items()}
RecordPart = create_model("RecordPart", __base__=_Part, **_FIELDS)


class EdgePart(TypedDict):
    """One edge by name; a dictionary, because a file may hold a million of them."""

    __pydantic_config__ = ConfigDict(strict=True)  # type: ignore[misc]  # how pydantic configures a TypedDict

    edge: str
    estimate: NotRequired[FiniteFloat | None]
    exact: NotRequired[FiniteFloat | None]


class CircuitFile(_Part):
    """The whole file; `_WHOLE` checks the record, too."""

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
    """What a file holds, in the package's own terms."""

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
    """Writes circuit.json, whole or not at all; `more`: `facts`, `groups`."""
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
    """Reads circuit.json; a FileError where it is missing, no JSON, of another format or a newer version, holds
    wrong types, or names edges that its graph lacks or names them twice."""
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
    """The first thing that pydantic found wrong, as one line."""
    first = error.errors(include_url=False, include_context=False)[0]
    where = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in first["loc"]).lstrip(".")
    more = f" (and {error.error_count() - 1} more)" if error.error_count() > 1 else ""
    text = repr(first["input"])
    given = "" if first["type"] == "missing" else f", not {text if len(text) <= 60 else text[:57] + '...'}"
    return f"{where}: {first['msg'][0].lower()}{first['msg'][1:]}{given}{more}"


def _layout(content: dict[str, Any]) -> str:
    """JSON text with one edge a line: short to read, and a change of one edge is a change of one line."""
    lines = []
    for key, value in content.items():
        if key == "edges" and value:
            inner = _dump(value)[1:-1].replace("}, {", "},\n    {")  # edges' names and numbers hold no braces
            text = f"[\n    {inner}\n  ]"
        else:
            text = _dump(value, indent=None if key == "nodes" else 2).replace("\n", "\n  ")
        lines.append(f'  "{key}": {text}')
    return "{\n" + ",\n".join(lines) + "\n}\n"


def _dump(value: Any, indent: int | None = None) -> str:
    return json.dumps(value, indent=indent, ensure_ascii=False, allow_nan=False)
