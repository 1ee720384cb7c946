"""Files of the EAP-IG library, which MIB's circuit track takes too: written, JSON or `.pt` by the ending.

1. Scores are written with the effect unchanged: positive = keep.
2. These files hold a key and a value per query head. Writing the circuit of a grouped-query model repeats membership
   for every query head of a group. Scores are written by query head where they were computed so
   (`attribute(ungrouped=True)`); how a shared head's score splits cannot be told from the score.
"""

from __future__ import annotations

import json
from os import PathLike
from pathlib import Path
from typing import Literal, get_args

import numpy as np

from circuitfind.errors import FileError
from circuitfind.export.eap_ig_forms import Foreign, as_json, as_pt
from circuitfind.export.files import write_bytes
from circuitfind.graph import Graph

Format = Literal["circuitfind", "eap-ig"]
ENDINGS = (".json", ".pt")


def check_format(format: str) -> str:
    """Returns the format if circuits and scores can be saved in it."""
    if format not in get_args(Format):
        raise FileError(f"format='{format}' is unknown: use one of {', '.join(map(repr, get_args(Format)))}")
    return format


def write(path: str | PathLike[str], content: Foreign, nodes: np.ndarray | None = None) -> Path:
    """Writes a file. `nodes`: `[nodes]` bool, the nodes inside, by default none; `logits` always is.

    Without scores, membership stands for them: 1 inside, 0 outside. Unknown scores (NaN) are written as 0.
    """
    ending = Path(path).suffix.lower()
    if ending not in ENDINGS:
        raise FileError(f"{path}: EAP-IG's files end in {' or '.join(ENDINGS)}")
    graph, mask, scores = content.graph, content.mask, content.scores
    if graph.mixers:
        raise FileError(
            f"{path}: EAP-IG's files know heads and MLPs only, and this model has a mixer in place of attention (layer"
            f" {', '.join(map(str, graph.mixers))}): save in circuitfind's own format"
        )
    if graph.group > 1 and scores is not None:
        raise FileError(
            f"{path}: the file holds a score per query head, but {graph.group} heads share each key and value here:"
            " score by query head (ungrouped=True, --ungrouped), or save a circuit, scores.top(n)"
        )
    mask, graph = mask if graph.group == 1 else mask[:, columns(graph)], graph.ungrouped()
    filled = mask if scores is None else np.where(graph.real & ~np.isnan(scores), scores, 0)
    of_nodes = None if content.node_scores is None else content.node_scores.astype(np.float32)
    whole = Foreign(graph, mask, filled.astype(np.float32), of_nodes)
    inside = np.zeros(graph.n_nodes, dtype=bool) if nodes is None else nodes
    return write_bytes(path, as_pt(whole, inside) if ending == ".pt" else json.dumps(as_json(whole, inside)).encode())


# -------------------------------------------------------------------- grouped-query models
def columns(graph: Graph) -> np.ndarray:
    """`[readers of graph.ungrouped()]`: the reader of `graph` that each of them is a copy of."""
    readers = map(graph.ungrouped().reader, range(graph.ungrouped().n_readers))
    copied = ((layer, kind, head // graph.group if kind in ("k", "v") else head) for layer, kind, head in readers)
    return np.array([graph.readers(layer, kind).start + head for layer, kind, head in copied])
