"""Files of the EAP-IG library (Hanna et al. 2024) and of MIB's circuit track: a graph, a circuit and scores.

JSON. Keys are written in the library's order, so that the same content gives the same bytes, and read in any order:

    cfg    {n_layers, n_heads, parallel_attn_mlp, d_model}
    nodes  {name: {in_graph, score?}}: `input`, layer by layer the heads and the MLP, `logits` (without a score)
    edges  {name: {score?, in_graph}}: block by block, in each by writer, by head, and then q, k, v

`.pt`, plain dictionaries, lists and tensors, read with `weights_only=True` (torch is imported only for these):

    cfg, src_nodes, dst_nodes      the graph, and the names of its writers and readers
    edges_scores, edges_in_graph   [writers, readers] float32, bool; 0 and false where there is no edge; scores optional
    nodes_in_graph, nodes_scores   [writers] bool, float32 with NaN where unscored; scores optional

1. `cfg` has no number of key/value heads: the graph has one k and one v per query head.
2. Edges that a file does not list are outside the circuit, with score 0. A score of -inf (the library's mark for what
   must stay outside) becomes the next float below the lowest score; NaN and +inf become NaN, no score.
3. Circuits of single neurons are refused: a node is either wholly inside or outside.
4. Scores are effects, as everywhere here: positive = keep.
5. In the circuit of a grouped-query model, an edge into a shared head is written for every query head of the group.
   Scores of such a model can be written only if they are by query head (`attribute(ungrouped=True)`), because a shared
   head's score does not tell its parts.
"""

from __future__ import annotations

import io
import json
import math
from collections.abc import Mapping
from os import PathLike
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

import numpy as np

from circuitfind.errors import FileError
from circuitfind.export.files import write_bytes
from circuitfind.graph import Graph
from circuitfind.record import Record

# These files do not name their ablation; the library's default is assumed.
RECORD = Record(settings={"file": "eap-ig", "assumed": "ablation and direction"}, versions={})
Format = Literal["circuitfind", "eap-ig"]
ENDINGS = (".json", ".pt")
CONFIG = ("n_layers", "n_heads", "parallel_attn_mlp", "d_model")


class Foreign(NamedTuple):
    """The content of another tool's file: a graph, a circuit and scores.

    Attributes:
        mask: `[writers, readers]` bool, the circuit.
        scores: `[writers, readers]` float32 effects, NaN for edges without a number; None if there are no scores.
        node_scores: `[writers]` float32 effects, NaN for nodes without a score; None if there are no scores.
        record: what is known about how the file was made.
    """

    graph: Graph
    mask: np.ndarray
    scores: np.ndarray | None = None
    node_scores: np.ndarray | None = None
    record: Record = RECORD

    def negated(self) -> Foreign:
        """Return the content with the sign of all scores reversed: changes of the metric become effects."""
        scores, nodes = (None if values is None else 0 - values for values in (self.scores, self.node_scores))
        return self._replace(scores=scores, node_scores=nodes)


def config(graph: Graph) -> dict[str, int | bool]:
    """Return the `cfg` of an ungrouped graph."""
    return dict(zip(CONFIG, (graph.n_layers, graph.n_heads, graph.parallel, graph.d_model), strict=True))


def graph_of(cfg: Any) -> Graph:
    """Return the graph that `cfg` describes."""
    if missing := [key for key in CONFIG if not isinstance(cfg, Mapping) or key not in cfg]:
        raise FileError(f"cfg: no {', '.join(missing)}")
    if not isinstance(cfg["d_model"], int) or not isinstance(cfg["parallel_attn_mlp"], bool):
        raise FileError("cfg: d_model must be a whole number, parallel_attn_mlp true or false")
    heads = cfg["n_heads"]
    return Graph(cfg["n_layers"], heads, heads, cfg["d_model"], cfg["parallel_attn_mlp"])


def number(name: str, value: Any) -> float:
    """Return a score; raise FileError unless it is a number."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise FileError(f"'{name}': its score is not a number: {str(value)[:40]!r}")
    return value


def finite(values: np.ndarray) -> np.ndarray:
    """Return scores as float32 with -inf replaced by a number below all others, and NaN for all that is not finite."""
    lowest = values[np.isfinite(values)].min(initial=0)
    values = np.where(values == -np.inf, np.nextafter(np.float32(lowest), np.float32(-np.inf)), values)
    return np.where(np.isfinite(values), values, np.float32(np.nan)).astype(np.float32)


def refuse_neurons(name: str, inside: bool, neurons: Any) -> None:
    """Raise FileError for a node of which only some neurons are in the circuit."""
    if inside and not np.all(neurons):
        remedy = "circuits of neurons are not supported, only of whole nodes"
        raise FileError(f"'{name}' is in the circuit with some of its neurons only: {remedy}")


# -------------------------------------------------------------------- JSON
PARTS = {"cfg", "nodes", "edges"}


def from_json(raw: dict[str, Any]) -> Foreign:
    """Return the content of a parsed JSON file."""
    graph = graph_of(raw["cfg"])
    mask = np.zeros((graph.n_writers, graph.n_readers), dtype=bool)
    scores = np.zeros(mask.shape, dtype=np.float32)
    edges = _entries(raw, "edges")
    if edges:
        listed = tuple(np.array([graph.edge(name) for name, _ in edges]).T)
        mask[listed] = [part["in_graph"] for _, part in edges]
        scores[listed] = [number(name, part.get("score", 0)) for name, part in edges]
    node_scores = np.full(graph.n_writers, np.nan, dtype=np.float32)
    for name, part in _entries(raw, "nodes"):
        if name != "logits":
            refuse_neurons(name, part["in_graph"], part.get("neurons", True))
            node_scores[graph.writer(name)] = number(name, part.get("score", math.nan))
    scored = any(part.get("score", -math.inf) != -math.inf for _, part in edges)  # all -inf if only nodes have scores
    of_nodes = None if np.isnan(node_scores).all() else finite(node_scores)
    return Foreign(graph, mask, finite(scores) if scored else None, of_nodes)


def _entries(raw: dict[str, Any], key: str) -> list[tuple[str, dict[str, Any]]]:
    if not isinstance(raw[key], dict):
        raise FileError(f"{key} are not listed by name")
    for name, part in raw[key].items():
        if not isinstance(part, dict) or part.get("in_graph") not in (False, True):
            raise FileError(f"'{name}': in_graph must be true or false")
    return list(raw[key].items())


def as_json(content: Foreign, inside: np.ndarray) -> dict[str, Any]:
    """Return the file's JSON object. `content`: over an ungrouped graph, with scores. `inside`: `[nodes]` bool."""
    graph, scores = content.graph, content.scores
    assert scores is not None
    nodes = {name: {"in_graph": own} for name, own in zip(graph.node_names, inside.tolist(), strict=True)}
    nodes["logits"] = {"in_graph": True}
    if content.node_scores is not None:
        for name, score in zip(graph.writer_names, content.node_scores.tolist(), strict=True):
            nodes[name] |= {} if math.isnan(score) else {"score": score}
    order = cells(graph)
    columns = zip(*(column.tolist() for column in (*order, scores[order], content.mask[order])), strict=True)
    edges = {graph.edge_name(u, r): {"score": score, "in_graph": own} for u, r, score, own in columns}
    return {"cfg": config(graph), "nodes": nodes, "edges": edges}


def cells(graph: Graph) -> tuple[np.ndarray, np.ndarray]:
    """Return the writers and the readers of all edges of an ungrouped graph, `[edges]` each, in the file's order."""
    blocks: list[tuple[int, np.ndarray]] = []  # number of writers, and the readers that read them
    for layer in range(graph.n_layers):
        heads = np.stack([np.r_[graph.readers(layer, kind)] for kind in "qkv"], axis=1).ravel()
        mlp = np.r_[graph.readers(layer, "mlp")]
        if graph.parallel:  # both read the same writers, and the file goes writer by writer
            blocks.append((graph.reads(layer, "mlp"), np.concatenate([heads, mlp])))
        else:
            blocks += [(graph.reads(layer, "qkv"), heads), (graph.reads(layer, "mlp"), mlp)]
    blocks.append((graph.n_writers, np.r_[graph.readers(0, "logits")]))
    writers = np.concatenate([np.repeat(np.arange(count), len(into)) for count, into in blocks])
    return writers, np.concatenate([np.tile(into, count) for count, into in blocks])


# -------------------------------------------------------------------- .pt
NEEDED = ("cfg", "src_nodes", "dst_nodes", "edges_in_graph", "nodes_in_graph")


def from_pt(raw: Any) -> Foreign:
    """Return the content of a loaded `.pt` file."""
    if missing := [key for key in NEEDED if not isinstance(raw, dict) or key not in raw]:
        raise FileError(f"not an EAP-IG graph: no {', '.join(missing)}")
    graph = graph_of(raw["cfg"])
    for key, names in (("src_nodes", graph.writer_names), ("dst_nodes", graph.reader_names)):
        if raw[key] != list(names):
            raise FileError(f"{key} are not the names of {graph}, in the graph's order")
    shape = (graph.n_writers, graph.n_readers)
    mask = _array(raw, "edges_in_graph", shape).astype(bool) & graph.real
    nodes = _array(raw, "nodes_in_graph", shape[:1]).astype(bool)
    scores = node_scores = None
    if raw.get("edges_scores") is not None:
        scores = finite(np.where(graph.real, _array(raw, "edges_scores", shape), np.float32(0)))
    if raw.get("nodes_scores") is not None:
        of_nodes = finite(_array(raw, "nodes_scores", shape[:1]))
        node_scores = None if np.isnan(of_nodes).all() else of_nodes
    if raw.get("neurons_in_graph") is not None:
        neurons = _array(raw, "neurons_in_graph", (graph.n_writers, graph.d_model))
        for name, inside, own in zip(graph.writer_names, nodes, neurons, strict=True):
            refuse_neurons(name, inside, own)
    return Foreign(graph, mask, scores, node_scores)


def _array(raw: dict[str, Any], key: str, shape: tuple[int, ...]) -> np.ndarray:
    if not hasattr(raw[key], "numpy") or tuple(raw[key].shape) != shape:
        raise FileError(f"{key} is not a tensor of shape {list(shape)}, as its graph needs")
    array: np.ndarray = raw[key].detach().float().numpy()
    return array


def as_pt(content: Foreign, inside: np.ndarray) -> bytes:
    """Return the bytes of a `.pt` file. `content`: over an ungrouped graph, with scores. `inside`: `[nodes]` bool."""
    import torch

    graph = content.graph
    raw = {"cfg": config(graph), "src_nodes": list(graph.writer_names), "dst_nodes": list(graph.reader_names)}
    arrays = {
        "edges_scores": content.scores,
        "edges_in_graph": content.mask,
        "nodes_in_graph": inside[: graph.n_writers],
        "nodes_scores": content.node_scores,
    }
    buffer = io.BytesIO()
    torch.save(raw | {key: torch.tensor(value) for key, value in arrays.items() if value is not None}, buffer)
    return buffer.getvalue()


# -------------------------------------------------------------------- writing
def check_format(format: str) -> str:
    """Return the format if it is known; raise FileError if not."""
    if format not in get_args(Format):
        raise FileError(f"format='{format}' is unknown: use one of {', '.join(map(repr, get_args(Format)))}")
    return format


def write(path: str | PathLike[str], content: Foreign, nodes: np.ndarray | None = None) -> Path:
    """Write a `.json` or `.pt` file, and return its path.

    Without scores, edges in the circuit get score 1 and all others 0. Unknown scores (NaN) are written as 0.

    Args:
        nodes: `[nodes]` bool, the nodes in the circuit; by default only `logits`, which always is.

    Raises:
        FileError: another ending, a model with mixers, or scores of shared key/value heads.
    """
    ending = Path(path).suffix.lower()
    if ending not in ENDINGS:
        raise FileError(f"{path}: EAP-IG's files end in {' or '.join(ENDINGS)}")
    graph, mask, scores = content.graph, content.mask, content.scores
    if graph.mixers:
        raise FileError(
            f"{path}: EAP-IG's files hold heads and MLPs only, and this model has a mixer in place of attention (layer"
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


def columns(graph: Graph) -> np.ndarray:
    """Return, for each reader of `graph.ungrouped()`, the reader of `graph` of which it is a copy."""
    readers = map(graph.ungrouped().reader, range(graph.ungrouped().n_readers))
    copied = ((layer, kind, head // graph.group if kind in ("k", "v") else head) for layer, kind, head in readers)
    return np.array([graph.readers(layer, kind).start + head for layer, kind, head in copied])
