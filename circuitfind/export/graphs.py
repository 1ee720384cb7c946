"""A circuit as plain rows, as a networkx graph, and as GraphML for Gephi, Cytoscape and yEd.

1. Every node of the circuit is a networkx node with the attributes `kind` (input, head, mixer, mlp, logits), `layer`
   (-1 for `input`, the number of layers for `logits`) and, for heads, `head`.
2. Every edge of the circuit is a networkx edge from the writer to the node that its reader feeds. Its key is the
   reader's name, so that q, k and v of one head are parallel edges. Attributes: `edge` (the full name), `kind` (q, k,
   v, mixer, mlp or logits), `estimate`, `exact`, and `effect` (the exact effect if measured, else the estimate).
   Unknown values have no attribute.
3. The networkx graph has attributes of its own: the model's sizes, the record (model, task, metric, method, ...) and
   measurements of the whole circuit (faithfulness, ...), as far as they are single numbers or text.
4. A shared key or value feeds every query head of its group, so its edge becomes one edge to each of these heads that
   is in the circuit. If none is, the edge leads to a node of kind `kv` that stands for the shared head.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from io import BytesIO
from os import PathLike
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import networkx

from circuitfind.export.files import write_bytes
from circuitfind.graph import Graph
from circuitfind.record import Record

CONTROL = re.compile(rb"[\x00-\x08\x0b\x0c\x0e-\x1f]")  # characters that XML does not allow


class EdgeRow(NamedTuple):
    """One edge: writer and reader index, estimated and exact effect in units of the metric (None = unknown)."""

    writer: int
    reader: int
    estimate: float | None
    exact: float | None

    @property
    def effect(self) -> float | None:
        """The exact effect if it was measured, else the estimate."""
        return self.estimate if self.exact is None else self.exact


def node_attributes(graph: Graph, node: str) -> dict[str, Any]:
    """Return a node's `kind` (input, head, mixer, mlp, logits), `layer` and, for heads, `head`."""
    if node == "logits":
        return {"kind": "logits", "layer": graph.n_layers}
    index = graph.writer(node)
    layer = graph.layer_of(index)
    if layer < 0 or index == graph.mlp(layer):
        return {"kind": "input" if layer < 0 else "mlp", "layer": layer}
    if layer in graph.mixers:
        return {"kind": "mixer", "layer": layer}
    return {"kind": "head", "layer": layer, "head": index - graph.head(layer)}


def described(graph: Graph, record: Record, facts: Mapping[str, Any]) -> dict[str, Any]:
    """Return the graph's sizes, the record and the facts of a circuit as far as they are finite numbers or text."""
    known = {**graph.as_dict(), **asdict(record), **facts}

    def fits(value: Any) -> bool:
        return math.isfinite(value) if isinstance(value, float) else isinstance(value, (int, str)) and value != ""

    return {name: value for name, value in known.items() if fits(value)}


def served(graph: Graph, reader: int) -> list[str]:
    """Return the names of the nodes that a reader feeds."""
    return [graph.node_names[node] for node in graph.serves[reader].nonzero()[0]]


def fed(graph: Graph, reader: int, inside: set[str]) -> list[str]:
    """Return the names of the nodes in `inside` that a reader feeds."""
    return [name for name in served(graph, reader) if name in inside]


def to_networkx(
    graph: Graph, rows: Iterable[EdgeRow], nodes: Sequence[str], about: Mapping[str, Any] = MappingProxyType({})
) -> networkx.MultiDiGraph:
    """Return the circuit as a directed multigraph, with the attributes that the module's docstring describes.

    Args:
        rows: the circuit's edges, effects in units of the metric, positive = supports.
        nodes: names of the circuit's nodes.
        about: attributes of the graph itself, from `described`.
    """
    result: networkx.MultiDiGraph = networkx.MultiDiGraph(**about)
    result.add_nodes_from((node, node_attributes(graph, node)) for node in nodes)
    inside = set(nodes)
    for row in rows:
        name, (layer, kind, head) = graph.reader_names[row.reader], graph.reader(row.reader)
        attributes = {"edge": graph.edge_name(row.writer, row.reader), "kind": kind}
        values = {"estimate": row.estimate, "exact": row.exact, "effect": row.effect}
        known = {key: value for key, value in values.items() if value is not None and math.isfinite(value)}
        targets = fed(graph, row.reader, inside)
        if not targets:
            targets = [name.partition("<")[0]]
            result.add_node(targets[0], kind="kv", layer=layer, head=head)
        for target in targets:
            result.add_edge(graph.writer_names[row.writer], target, key=name, **attributes, **known)
    return result


def write_graphml(path: str | PathLike[str], circuit: networkx.MultiDiGraph) -> Path:
    """Write the result of `to_networkx` as GraphML, and return the path."""
    buffer = BytesIO()
    networkx.write_graphml(circuit, buffer)
    return write_bytes(path, CONTROL.sub(b" ", buffer.getvalue()))
