"""A circuit as an attribution graph's JSON, which Neuronpedia and circuit-tracer's own page open.

The format is that of circuit-tracer 0.5 (`frontend/graph_models.py`) and of Neuronpedia's `graph-schema.json`: nodes
with a layer and a column `ctx_idx`, and links with a weight. Their nodes are features at tokens; here heads, MLPs,
`input` and `logits` are nodes, and none is an error node.

1. A circuit has no positions. Its columns, which the page heads with `prompt_tokens`, are `input`, the heads' numbers,
   the MLPs (and mixers) and `logits`: a row a layer, a column a head.
2. Edges at places go to the column of their place. A key or value is read by a node of its own (`a20.kv0 reads`), with
   a link on to the head wherever it stands; its weight is the sum of what is read there.
3. A link's weight is the effect (exact where measured, else the estimate; 1 where neither is known), positive =
   supports. The page knows one link from node to node: q, k and v of a head are summed, and `edges` lists each.
4. `influence`, by which their page prunes, is left out: the circuit is pruned already. Small circuits are pinned as a
   whole, because the page draws the links of pinned nodes; of large ones only nodes in groups.
5. Groups are supernodes. A node stands in one supernode only: the first group that has it.
6. Their page takes `(p=...)` of a logit's label for granted, and a node above layer 0.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import Any, NamedTuple

from circuitfind.export.files import plain, write_text
from circuitfind.export.graphs import EdgeRow, described, fed, node_attributes
from circuitfind.export.placed_picture import PlacedRow
from circuitfind.graph import Graph
from circuitfind.record import Record
from circuitfind.version import __version__

ENDING = ".neuronpedia.json"
PINNED = 60  # nodes
TYPES = {"input": "embedding", "head": "attention head", "mixer": "mixer", "logits": "logit", "kv": "attention input"}
READS = " reads"


class _Node(NamedTuple):
    name: str
    column: int


class _Link(NamedTuple):
    """One edge, or what leads on from where a key or value is read."""

    source: _Node
    target: _Node
    edge: str
    weight: float


def write(
    path: str | PathLike[str],
    graph: Graph,
    rows: Iterable[EdgeRow],
    nodes: Sequence[str],
    record: Record,
    facts: Mapping[str, Any],
    groups: Mapping[str, Sequence[str]],
) -> Path:
    """Writes a circuit; the record's model is the name of the model that Neuronpedia looks for."""
    columns, inside, links = _columns(graph), set(nodes), []
    at = {name: _Node(name, _column(graph, name)) for name in nodes}
    for row in rows:
        source, weight = graph.writer_names[row.writer], 1.0 if row.effect is None else row.effect
        edge = graph.edge_name(row.writer, row.reader)
        targets = fed(graph, row.reader, inside) or [graph.node_names[graph.serves[row.reader].argmax()]]
        for target in targets:
            at.setdefault(target, _Node(target, _column(graph, target)))
            links.append(_Link(at[source], at[target], edge, weight))
    return _write(path, graph, list(at.values()), links, columns, record, facts, groups)


def write_placed(
    path: str | PathLike[str], graph: Graph, rows: Iterable[PlacedRow], places: Sequence[str], record: Record
) -> Path:
    """Writes edges at their places, as `placed_picture.source` draws them."""
    at = dict.fromkeys(_Node("input", place) for place in range(len(places)))  # the page heads columns with these
    links, read = [], dict[_Node, tuple[list[str], float]]()
    for place, writer, reader, effect in rows:
        served = [graph.node_names[node] for node in graph.serves[reader].nonzero()[0]]
        source, edge = _Node(graph.writer_names[writer], place), graph.edge_name(writer, reader)
        if graph.reader(reader).kind in ("k", "v", "mixer"):
            target = _Node(graph.reader_names[reader].partition("<")[0] + READS, place)
            read[target] = served, read.get(target, ([], 0.0))[1] + effect
        else:
            target = _Node(served[0], place)
        at |= {source: None, target: None}
        links.append(_Link(source, target, edge, effect))
    for node, (served, weight) in read.items():
        links += [_Link(node, head, node.name, weight) for head in at if head.name in served]
    return _write(path, graph, list(at), links, places, record, {}, {})


# -------------------------------------------------------------------- columns of a circuit
def _columns(graph: Graph) -> list[str]:
    return ["input", *(f"head {head}" for head in range(graph.n_heads)), "MLP", "logits"]


def _column(graph: Graph, name: str) -> int:
    kind = node_attributes(graph, name)
    ends = {"input": 0, "mlp": graph.n_heads + 1, "mixer": 1, "logits": graph.n_heads + 2}
    return int(ends.get(kind["kind"], 1 + kind.get("head", 0)))


# -------------------------------------------------------------------- the document
def _write(
    path: str | PathLike[str],
    graph: Graph,
    nodes: Sequence[_Node],
    links: Sequence[_Link],
    columns: Sequence[str],
    record: Record,
    facts: Mapping[str, Any],
    groups: Mapping[str, Sequence[str]],
) -> Path:
    named = {node: _node(graph, node, record) for node in sorted(nodes, key=lambda one: _rank(graph, one))}
    ids = {node: str(content["node_id"]) for node, content in named.items()}
    joined: dict[tuple[str, str], dict[str, float]] = {}
    for link in links:
        joined.setdefault((ids[link.source], ids[link.target]), {})[link.edge] = float(link.weight)
    name = Path(path).name.lower().removesuffix(ENDING).removesuffix(".json")
    said = f"{record.task or 'A circuit'} in {record.model or 'a model'}: heads and MLPs, found with circuitfind"
    metadata = {
        "slug": re.sub(r"[^a-z0-9_-]+", "-", name),  # part of an address
        "scan": record.model or "unknown",
        "transcoder_list": [],
        "prompt_tokens": list(columns),
        "prompt": f"{record.task} ({record.model})" if record.task else " ".join(columns),
        "schema_version": 1,  # of features' numbers: Cantor's pairs of layer and index
        "info": {"description": said, "generator": {"name": "circuitfind", "version": __version__}},
        "generation_settings": described(graph, record, facts),
    }
    content = {
        "metadata": metadata,
        "qParams": _shown(ids, groups),
        "nodes": list(named.values()),
        "links": [
            {"source": source, "target": target, "weight": sum(edges.values()), "edges": edges}
            for (source, target), edges in joined.items()
        ],
    }
    return write_text(path, json.dumps(plain(content), ensure_ascii=False, indent=1) + "\n")


def _shown(ids: Mapping[_Node, str], groups: Mapping[str, Sequence[str]]) -> dict[str, Any]:
    """What the page shows at first: pinned nodes, and groups as supernodes."""
    first = {node: group for group in reversed(list(groups)) for node in groups[group]}
    members = {group: [id for node, id in ids.items() if first.get(node.name) == group] for group in groups}
    supernodes = [[group, *inside] for group, inside in members.items() if inside]
    pinned = list(ids.values()) if len(ids) <= PINNED else [id for inside in members.values() for id in inside]
    return {"pinnedIds": pinned, "supernodes": supernodes, "linkType": "both", "clickedId": "", "sg_pos": ""}


def _kind(graph: Graph, name: str) -> dict[str, Any]:
    """`node_attributes`, of a node that reads keys and values too."""
    if not name.endswith(READS):
        return node_attributes(graph, name)
    layer, _, head = name.removesuffix(READS)[1:].partition(".")
    return {"kind": "kv", "layer": int(layer), "head": graph.n_heads + 1 + int(head.strip("hkv") or 0)}


def _rank(graph: Graph, node: _Node) -> tuple[int, int, int, int]:
    kind = _kind(graph, node.name)
    return kind["layer"], kind["kind"] == "mlp", kind.get("head", 0), node.column


def _node(graph: Graph, node: _Node, record: Record) -> dict[str, Any]:
    kind = _kind(graph, node.name)
    what, layer = kind["kind"], kind["layer"]
    index = kind.get("head", graph.n_heads if what == "mlp" else 0)
    text = {"input": "E", "logits": str(layer + 1)}.get(what, str(layer))  # the page puts logits one above all others
    label = f'Output "{record.metric or "logits"}" (p=1.000)' if what == "logits" else node.name
    return {
        "node_id": f"{text}_{index}_{node.column}",
        "feature": node.column if what == "input" else _pair(max(layer, 0), index),
        "layer": text,
        "ctx_idx": node.column,
        "feature_type": TYPES.get(what, what),
        "token_prob": float(what == "logits"),
        "is_target_logit": what == "logits",
        "run_idx": 0,
        "reverse_ctx_idx": 0,
        "jsNodeId": f"{text}_{index}-{node.column}",
        "clerp": label,
        "influence": None,
        "activation": None,
    }


def _pair(x: int, y: int) -> int:
    """Cantor's number of a pair."""
    return (x + y) * (x + y + 1) // 2 + y
