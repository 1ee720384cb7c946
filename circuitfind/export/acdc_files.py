"""Files of ACDC's own code (Conmy et al. 2023): the `.pth` of `save_subgraph` and the `.pkl` of `save_edges`.

    subgraph   {(receiver, index, sender, index): present}
    edges      [((receiver, index, sender, index), effect)], the edges of the circuit

1. Nodes are hooks of TransformerLens with an index, `(None, None, head)` or `(None,)`. Edges inside a head or an MLP
   (from a query's input to the query) are skipped, because they belong to one node here.
2. Token and position embeddings are one node here, `input`. Its edge is in the circuit if either one's edge is, and
   their effects are summed.
3. `effect` is the increase of ACDC's loss when the edge was tried, after the removals before it: positive = supports.
4. The files name no model. Unless a graph is given, the smallest graph that has all their nodes is used.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

import numpy as np

from circuitfind.errors import FileError
from circuitfind.export.eap_ig import Foreign
from circuitfind.graph import Graph
from circuitfind.record import Record

RECORD = Record(method="acdc", settings={"file": "acdc", "assumed": "ablation and direction"}, versions={})
_RECEIVERS = re.compile(r"blocks\.(\d+)\.hook_(?:([qkv])_input|(mlp_in|resid_mid)|(resid_post))")
_SENDERS = re.compile(
    r"blocks\.(\d+)\.(?:(attn\.hook_result)|(hook_mlp_out))|blocks\.0\.hook_resid_pre|hook_(?:pos_)?embed"
)
_INSIDE = re.compile(r"blocks\.\d+\.(?:attn\.hook_(?:[qkv]|result)|hook_mlp_out)")

Edge = tuple[str, Any, str, Any]


def fits(raw: Any) -> bool:
    """Whether this is the content of a file of ACDC's code."""
    first = next(iter(raw), None) if isinstance(raw, (dict, list)) else None
    edge = first[0] if isinstance(raw, list) and isinstance(first, tuple) and len(first) == 2 else first
    return isinstance(edge, tuple) and len(edge) == 4 and all(isinstance(edge[at], str) for at in (0, 2))


def read(raw: Any, graph: Graph | None = None) -> Foreign:
    """Return the circuit and effects. `graph`: the model's graph with a key and a value for every query head, if known.

    Raises:
        FileError: the file names a hook or index that ACDC's graph does not have.
    """
    known = [(edge, bool(present), None) for edge, present in raw.items()] if isinstance(raw, dict) else None
    known = known or [(edge, True, effect) for edge, effect in raw]
    ends = [(_named(edge), present, effect) for edge, present, effect in known]
    found = [(*end, present, effect) for end, present, effect in ends if end is not None]
    graph = graph or _smallest(end for writer, reader, *_ in found for end in (writer, reader))
    mask = np.zeros(graph.real.shape, dtype=bool)
    effects = np.full(mask.shape, np.nan, dtype=np.float32)
    for writer, reader, present, effect in found:
        cell = graph.edge(f"{writer}->{reader}")
        mask[cell] |= present
        if effect is not None:
            effects[cell] = float(effect) + (0 if np.isnan(effects[cell]) else effects[cell])
    return Foreign(graph, mask, None if np.isnan(effects).all() else effects, record=RECORD)


def _named(edge: Edge) -> tuple[str, str] | None:
    """Return the names of an edge's writer and reader; None for an edge inside a head or an MLP."""
    receiver, at, sender, origin = edge
    into, out = _RECEIVERS.fullmatch(receiver), _SENDERS.fullmatch(sender)
    if into is None and _INSIDE.fullmatch(receiver):
        return None
    if into is None or out is None:
        raise FileError(f"'{receiver if into is None else sender}' is not a hook of ACDC's graph")
    layer, letter, mlp, _ = into.groups()
    reader = f"a{layer}.h{_head(at)}<{letter}>" if letter else f"m{layer}" if mlp else "logits"
    if out[2]:
        return f"a{out[1]}.h{_head(origin)}", reader
    return f"m{out[1]}" if out[3] else "input", reader


def _head(index: Any) -> int:
    parts = tuple(getattr(index, "hashable_tuple", index))
    if len(parts) != 3 or not isinstance(parts[2], int) or parts[:2] != (None, None):
        raise FileError(f"the index {parts} is not that of a head at all positions, (None, None, head)")
    return parts[2]


def _smallest(names: Iterable[str]) -> Graph:
    """Return the smallest graph that has all these nodes."""
    found = [re.match(r"[am](\d+)(?:\.h(\d+))?", name) for name in names]
    layers = [int(one[1]) for one in found if one]
    heads = [int(one[2]) for one in found if one and one[2]]
    n_heads = max(heads, default=0) + 1
    return Graph(max(layers, default=0) + 1, n_heads, n_heads, 0)
