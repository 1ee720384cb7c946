"""A circuit in the JSON of attribution graphs, which Neuronpedia and circuit-tracer's page open.

The format is that of circuit-tracer 0.5 (`frontend/graph_models.py`) and of Neuronpedia's `graph-schema.json`: nodes
with a layer and a column `ctx_idx`, and links with a weight. Their nodes are features at token positions. Here the
nodes are heads, MLPs, `input` and `logits`, and there are no error nodes.

1. A circuit has no positions. Every layer is a row, and the columns are `input`, one per head, the MLPs and `logits`
   (mixers are in the first head's column). `prompt_tokens` holds the columns' headings.
2. Edges at places are in the column of their place. A key or value is read by a node of its own (`a20.kv0 reads`),
   which has a link to the head in every column where the head is. Its weight is the sum of the effects of the edges
   into that node.
3. A link's weight is the effect, positive = supports: exact if measured, else the estimate, and 1 if neither is known.
   The page allows one link between two nodes, so the edges into q, k and v of a head are summed, and `edges` lists
   each.
4. `influence`, by which the page prunes, is left out because the circuit is pruned already. The page draws the links of
   pinned nodes, so all nodes of a small circuit are pinned; of a large one, only nodes in groups.
5. Groups become supernodes. A node can be in one supernode only, that of the first group that has it.
6. The page fails without `(p=...)` in the label of a logit, without a node above layer 0, or with a single column. So a
   single place gets an empty column beside it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import Any, NamedTuple

from circuitfind.export.arrows import PlacedRow, Spot, attributes_of
from circuitfind.export.files import plain, write_text
from circuitfind.export.graphs import EdgeRow, described, fed, served
from circuitfind.graph import Graph
from circuitfind.record import Record
from circuitfind.version import __version__

ENDING = ".neuronpedia.json"
PINNED = 60  # nodes
TYPES = {"input": "embedding", "head": "attention head", "mixer": "mixer", "logits": "logit", "kv": "attention input"}


class _Link(NamedTuple):
    """One edge, or the link from a node that reads keys or values to a head; a `Spot`'s place is its column."""

    source: Spot
    target: Spot
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
    """Write a circuit, and return the path. Neuronpedia looks for the model by the name in the record."""
    columns, inside = ["input", *(f"head {head}" for head in range(graph.n_heads)), "MLP", "logits"], set(nodes)

    def spot(name: str) -> Spot:
        kind = attributes_of(graph, name)
        ends = {"input": 0, "mlp": graph.n_heads + 1, "mixer": 1, "logits": graph.n_heads + 2}
        return Spot(ends.get(kind["kind"], 1 + kind.get("head", 0)), name)

    links = []
    for row in rows:
        source, edge = spot(graph.writer_names[row.writer]), graph.edge_name(row.writer, row.reader)
        weight = 1.0 if row.effect is None else row.effect
        targets = fed(graph, row.reader, inside) or served(graph, row.reader)[:1]
        links += [_Link(source, spot(target), edge, weight) for target in targets]
    spots = dict.fromkeys([*map(spot, nodes), *(link.target for link in links)])
    return _write(path, graph, spots, links, columns, record, facts, groups)


def write_placed(
    path: str | PathLike[str], graph: Graph, rows: Iterable[PlacedRow], places: Sequence[str], record: Record
) -> Path:
    """Write edges at places, with the same nodes as `placed_picture.source`, and return the path."""
    if len(places) == 1:
        places, rows = ("", *places), [row._replace(place=1) for row in rows]
    spots = dict.fromkeys(Spot(place, "input") for place in range(len(places)))  # the page needs these for headings
    links, read = [], dict[Spot, tuple[list[str], float]]()
    for row in rows:
        start, end = row.ends(graph)
        spots |= {start: None, end: None}
        links.append(_Link(start, end, graph.edge_name(row.writer, row.reader), row.effect))
        if end.reads:
            read[end] = served(graph, row.reader), read.get(end, ([], 0.0))[1] + row.effect
    for spot, (heads, weight) in read.items():
        links += [_Link(spot, head, spot.name, weight) for head in spots if head.name in heads]
    return _write(path, graph, spots, links, places, record, {}, {})


# -------------------------------------------------------------------- the document
def _write(
    path: str | PathLike[str],
    graph: Graph,
    spots: Iterable[Spot],
    links: Sequence[_Link],
    columns: Sequence[str],
    record: Record,
    facts: Mapping[str, Any],
    groups: Mapping[str, Sequence[str]],
) -> Path:
    named = {spot: _node(graph, spot, record) for spot in sorted(spots, key=lambda one: _rank(graph, one))}
    ids = {spot: str(content["node_id"]) for spot, content in named.items()}
    joined: dict[tuple[str, str], dict[str, float]] = {}
    for link in links:
        joined.setdefault((ids[link.source], ids[link.target]), {})[link.edge] = float(link.weight)
    name = Path(path).name.lower().removesuffix(ENDING).removesuffix(".json")
    said = f"{record.task or 'A circuit'} in {record.model or 'a model'}: heads and MLPs, found with circuitfind"
    metadata = {
        "slug": re.sub(r"[^a-z0-9_-]+", "-", name),  # part of the page's URL
        "scan": record.model or "unknown",
        "transcoder_list": [],
        "prompt_tokens": list(columns),
        "prompt": f"{record.task} ({record.model})" if record.task else " ".join(columns),
        "schema_version": 1,  # version 1 numbers features by Cantor's pairing of layer and index
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


def _shown(ids: Mapping[Spot, str], groups: Mapping[str, Sequence[str]]) -> dict[str, Any]:
    """Return what the page shows when it opens: pinned nodes, and groups as supernodes."""
    first = {node: group for group in reversed(list(groups)) for node in groups[group]}
    members = {group: [id for node, id in ids.items() if first.get(node.name) == group] for group in groups}
    supernodes = [[group, *inside] for group, inside in members.items() if inside]
    pinned = list(ids.values()) if len(ids) <= PINNED else [id for inside in members.values() for id in inside]
    return {"pinnedIds": pinned, "supernodes": supernodes, "linkType": "both", "clickedId": "", "sg_pos": ""}


def _index(graph: Graph, kind: Mapping[str, Any]) -> int:
    """Return the number of a node in its layer: first the heads, then the MLP, then nodes that read keys and values."""
    index: int = kind.get("head", graph.n_heads if kind["kind"] == "mlp" else 0)
    return index + (graph.n_heads + 1 if kind["kind"] == "kv" else 0)


def _rank(graph: Graph, spot: Spot) -> tuple[int, bool, int, int]:
    kind = attributes_of(graph, spot.name)
    return kind["layer"], kind["kind"] == "mlp", _index(graph, kind), spot.place


def _node(graph: Graph, spot: Spot, record: Record) -> dict[str, Any]:
    kind = attributes_of(graph, spot.name)
    what, layer, index, column = kind["kind"], kind["layer"], _index(graph, kind), spot.place
    text = {"input": "E", "logits": str(layer + 1)}.get(what, str(layer))  # the page shows logits one layer higher
    label = f'Output "{record.metric or "logits"}" (p=1.000)' if what == "logits" else spot.name
    return {
        "node_id": f"{text}_{index}_{column}",
        "feature": column if what == "input" else _pair(max(layer, 0), index),
        "layer": text,
        "ctx_idx": column,
        "feature_type": TYPES.get(what, what),
        "token_prob": float(what == "logits"),
        "is_target_logit": what == "logits",
        "run_idx": 0,
        "reverse_ctx_idx": 0,
        "jsNodeId": f"{text}_{index}-{column}",
        "clerp": label,
        "influence": None,
        "activation": None,
    }


def _pair(x: int, y: int) -> int:
    """Return Cantor's pairing number."""
    return (x + y) * (x + y + 1) // 2 + y
