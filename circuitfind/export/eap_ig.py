"""Files of the EAP-IG library, which MIB's circuit track takes too: read and written, JSON or `.pt` by the ending.

1. A file is known by what it holds, not by its name: JSON with `cfg`, `nodes` and `edges`. Only `.pt` is an ending.
2. Scores are written with the effect unchanged: positive = keep. A file whose scores are the *change* of the metric
   when the edge is ablated is read with `sign="change"`, which negates them.
3. These files hold a key and a value per query head. Writing the circuit of a grouped-query model repeats membership
   for every query head of a group. Reading goes back to the grouped graph where one is given: an edge into a shared
   head is in if it is in for any of its query heads, and its score is the sum over them, because the gradient at a
   shared key or value is the sum of those at its copies. Scores of a grouped model are not written: how a shared
   head's score splits over its query heads is not computed.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from os import PathLike
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np

from circuitfind.errors import FileError
from circuitfind.export.eap_ig_forms import PARTS, EapIgFile, as_json, as_pt, from_json, from_pt
from circuitfind.export.files import write_bytes
from circuitfind.graph import Graph
from circuitfind.record import Record

Sign = Literal["effect", "change"]
Format = Literal["circuitfind", "eap-ig"]
ENDINGS = (".json", ".pt")


def check_format(format: str) -> str:
    """Returns the format if circuits and scores can be saved in it."""
    if format not in get_args(Format):
        raise FileError(f"format='{format}' is unknown: use one of {', '.join(map(repr, get_args(Format)))}")
    return format


def read(path: str | PathLike[str], sign: str = "effect", graph: Graph | None = None) -> EapIgFile | None:
    """Reads a file of this kind; None where it is of another kind, or missing.

    `sign`: what the file's scores are: "effect" (positive = keep), or "change" of the metric on ablation. `graph`: the
    model's own, needed where key/value heads are grouped: the files do not say so.
    """
    if sign not in ("effect", "change"):
        raise FileError(f"sign='{sign}' is unknown: use 'effect' (positive = keep) or 'change' (of the metric)")
    found = _parse(Path(path))
    if found is None:
        if sign != "effect" and Path(path).is_file():
            raise FileError(f"{path}: sign='{sign}' is for EAP-IG's files, and this is not one")
        return None
    form, raw = found
    try:
        content = _over(graph, form(raw))
    except FileError as error:
        raise FileError(f"{path}: {error}") from None
    return content.negated() if sign == "change" else content


def read_scores(
    path: str | PathLike[str], level: str, sign: str = "effect", graph: Graph | None = None
) -> tuple[Graph, np.ndarray, Record] | None:
    """The "edge" or "node" scores of a file of this kind, as `read` gives them; None where it is of another kind."""
    content = read(path, sign, graph)
    if content is None:
        return None
    values = content.scores if level == "edge" else content.node_scores
    if values is None:
        raise FileError(f"{path}: holds no {level} scores")
    missing = np.isnan(values)
    if missing.any():
        name = content.graph.names(missing)[0] if level == "edge" else content.graph.writer_names[missing.argmax()]
        raise FileError(f"{path}: '{name}' has no score that is a number ({missing.sum()} of {values.size} have none)")
    return content.graph, values, content.record


def _parse(path: Path) -> tuple[Callable[[Any], EapIgFile], Any] | None:
    """The function that reads this form, and its argument; None for files of another kind."""
    if not path.is_file():
        return None
    try:
        with path.open("rb") as file:
            if path.suffix.lower() == ".pt":
                return from_pt, file.read()
            if (first := file.read(1)) != b"{":
                return None
            text = first + file.read()
        raw = json.loads(text) if b'"cfg"' in text else {}
    except OSError as error:
        raise FileError(f"{path}: cannot be read: {error.strerror or error}") from None
    except (ValueError, RecursionError):  # not JSON: the reader of the other kind says so
        return None
    return (from_json, raw) if raw.keys() >= PARTS else None


def _over(graph: Graph | None, content: EapIgFile) -> EapIgFile:
    """The content over the given graph, which may be grouped."""
    if graph is None or graph == content.graph:
        return content
    if graph.ungrouped() != content.graph:
        held, asked = (f"{g} (d_model {g.d_model})" for g in (content.graph, graph))
        raise FileError(f"this file is for {held}, the given graph has {asked}")
    scores = None if content.scores is None else regrouped(graph, content.scores)
    return EapIgFile(graph, regrouped(graph, content.mask), scores, content.node_scores)


def write(path: str | PathLike[str], content: EapIgFile, nodes: np.ndarray | None = None) -> Path:
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
            f"{path}: the file holds a score per query head, but {graph.group} heads share each key and value here,"
            " and how their score splits is not computed: save a circuit, scores.top(n), instead"
        )
    mask, graph = mask if graph.group == 1 else mask[:, columns(graph)], graph.ungrouped()
    filled = mask if scores is None else np.where(graph.real & ~np.isnan(scores), scores, 0)
    of_nodes = None if content.node_scores is None else content.node_scores.astype(np.float32)
    whole = EapIgFile(graph, mask, filled.astype(np.float32), of_nodes)
    inside = np.zeros(graph.n_nodes, dtype=bool) if nodes is None else nodes
    return write_bytes(path, as_pt(whole, inside) if ending == ".pt" else json.dumps(as_json(whole, inside)).encode())


# -------------------------------------------------------------------- grouped-query models
def columns(graph: Graph) -> np.ndarray:
    """`[readers of graph.ungrouped()]`: the reader of `graph` that each of them is a copy of."""
    readers = map(graph.ungrouped().reader, range(graph.ungrouped().n_readers))
    copied = ((layer, kind, head // graph.group if kind in ("k", "v") else head) for layer, kind, head in readers)
    return np.array([graph.readers(layer, kind).start + head for layer, kind, head in copied])


def regrouped(graph: Graph, values: np.ndarray) -> np.ndarray:
    """`[writers, readers]` of `graph` from the same over `graph.ungrouped()`: any for booleans, sums for numbers."""
    narrow = np.zeros((graph.n_readers, graph.n_writers), dtype=values.dtype)
    (np.logical_or if values.dtype == bool else np.add).at(narrow, columns(graph), values.T)
    return np.ascontiguousarray(narrow.T)
