"""Scores of the edges or the nodes of a graph, and the ways to cut a circuit from them.

Edges (`Scores`):

1. `top(n)`: the n edges of highest magnitude (`by="absolute"`, the default) or highest score (`by="signed"`).
2. `threshold(t)`: the edges whose magnitude (or score) is at least t.
3. `greedy(n)`: grown from `logits`: of all edges into nodes that are already in, the best one comes next
   (Hanna et al. 2024); every edge has a path to the logits by construction.

Each cut is pruned to the edges on a path from `input` to `logits` unless `prune=False`, so it can hold fewer than n
edges. Ties are broken by the graph's order, so a cut is the same on every machine.

Nodes (`NodeScores`): `circuit(n)` holds all edges among the n best nodes, `to_edges()` ranks edges by their nodes.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from itertools import repeat
from numbers import Real
from os import PathLike
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from circuitfind.circuit import Circuit, connected
from circuitfind.errors import FileError, ScoreError, check_count
from circuitfind.export import eap_ig, foreign, html
from circuitfind.export.eap_ig import Foreign
from circuitfind.graph import Graph, ends_of
from circuitfind.record import NO_EFFECT, Record
from circuitfind.result import By, check_by, strongest
from circuitfind.score_base import ScoreTable, edge_values, open_scores

__all__ = ["By", "NodeScores", "Scores"]


class EdgeScore(NamedTuple):
    """One edge and its score."""

    edge: str
    writer: str
    reader: str
    score: float


class NodeScore(NamedTuple):
    """One node, its position (label or number; empty if positions are summed), and its score."""

    node: str
    position: str
    score: float


@dataclass(frozen=True, eq=False, repr=False)
class Scores(ScoreTable):
    """Effects of every edge: `values [writers, readers]` float32 in units of the metric, positive = supports.

    Baselines' scores are not effects (`record.is_effect`); `record.sign` says what they are.
    """

    LEVEL = "edge"

    graph: Graph
    values: np.ndarray
    record: Record = field(default_factory=Record)

    def __post_init__(self) -> None:
        self._check_array()
        if self.values.shape != (shape := self.graph.real.shape):
            raise ScoreError(f"scores have shape {list(self.values.shape)}, the graph needs {list(shape)}")
        self._check_finite(self.graph.names(~np.isfinite(self.values) & self.graph.real))

    def __getitem__(self, edge: str) -> float:
        return float(self.values[self.graph.edge(edge)])

    def __len__(self) -> int:
        return self.graph.n_edges

    def __repr__(self) -> str:
        return f"Scores({len(self)} edges by {self.record.method or '?'}; {self.graph})"

    def to_dict(self) -> dict[str, float]:
        """Return `{edge name: effect}` of every edge of the graph."""
        names = self.graph.names(self.graph.real)
        return dict(zip(names, self.values.T[self.graph.real.T].tolist(), strict=True))

    def rows(self) -> tuple[EdgeScore, ...]:
        """Return every edge with its score, in the graph's order."""
        return tuple(EdgeScore(name, *ends_of(name), score) for name, score in self.to_dict().items())

    def key(self, by: By = "absolute") -> np.ndarray:
        """Return the values that edges are ranked by, `[writers, readers]`; -inf where there is no edge."""
        check_by(by)
        values = np.abs(self.values) if by == "absolute" else self.values
        return np.where(self.graph.real, values, -np.inf)

    def ranked(self, by: By = "absolute") -> np.ndarray:
        """Return every edge as (writer, reader), `[edges, 2]`, best first, ties in the graph's order."""
        key = self.key(by).T.ravel()
        order = np.argsort(-key, kind="stable")[: self.graph.n_edges]
        readers, writers = np.divmod(order, self.graph.n_writers)
        return np.stack([writers, readers], axis=1)

    def heatmap(self) -> Any:
        """Return a plotly figure: effects summed by layer and kind, a row a writer, a column a reader."""
        return self.plot("layers")

    def layers(self) -> np.ndarray:
        """Return edge scores summed by layer, `[writers' layers, readers' layers]`, NaN where there is no edge; rows
        are `input` and the layers, columns the layers and `logits`."""
        graph = self.graph
        rows = [slice(0, 1), *(slice(graph.head(at), graph.head(at + 1)) for at in range(graph.n_layers))]
        columns = [*(graph.readers(at, "all") for at in range(graph.n_layers)), graph.readers(0, "logits")]
        cells = [[(self.values[u, r], graph.real[u, r]) for r in columns] for u in rows]
        return np.array([[value[real].sum() if real.any() else np.nan for value, real in row] for row in cells])

    def _repr_html_(self) -> str:
        best = self.ranked()[:15].tolist()
        rows = [(self.graph.edge_name(u, r), float(self.values[u, r])) for u, r in best]
        sides = [str(layer) for layer in range(self.graph.n_layers)]
        layers = html.heat(self.layers(), ["input", *sides], [*sides, "logits"], "sums by layer (writer, reader)")
        return html.block(repr(self), html.table(["edge", self.unit], rows, "strongest edges"), layers)

    # ---------------------------------------------------------------- cuts
    def top(self, n: int, by: By = "absolute", prune: bool = True) -> Circuit:
        """Return the circuit of the n strongest edges."""
        check_count("n", n)
        mask = np.zeros_like(self.graph.real)
        best = self.ranked(by)[:n]
        mask[best[:, 0], best[:, 1]] = True
        return self.cut(mask, prune, cut="top", n=n, by=by)

    def threshold(self, t: float, by: By = "absolute", prune: bool = True) -> Circuit:
        """Return the circuit of the edges of at least t, in units of the scores."""
        if not isinstance(t, Real) or math.isnan(t):
            raise ScoreError(f"t={t!r} is not a threshold: give a number in units of the scores")
        return self.cut((self.key(by) >= t) & self.graph.real, prune, cut="threshold", t=t, by=by)

    def greedy(self, n: int, by: By = "absolute", prune: bool = True) -> Circuit:
        """Return a circuit of n edges grown from the logits (see the module docstring)."""
        check_count("n", n)
        graph, key = self.graph, self.key(by)
        mask = np.zeros_like(graph.real)
        inside: set[int] = set()
        columns: dict[int, Iterator[tuple[float, int, int]]] = {}  # by reader: its remaining edges, best first
        frontier: list[tuple[float, int, int]] = []  # a heap: the first of every column

        def enter(node: int) -> None:
            """Put the edges into a node that was just added on the heap."""
            inside.add(node)
            for reader in np.flatnonzero(graph.serves[:, node]).tolist():
                if reader in columns:  # a shared key/value head serves several nodes
                    continue
                cost = -key[: graph.limits[reader], reader]
                order = np.argsort(cost, kind="stable")
                columns[reader] = zip(cost[order].tolist(), repeat(reader), order.tolist(), strict=False)
                heapq.heappush(frontier, next(columns[reader]))

        enter(graph.n_nodes - 1)
        for _ in range(min(n, graph.n_edges)):
            _, reader, writer = heapq.heappop(frontier)
            mask[writer, reader] = True
            if following := next(columns[reader], None):
                heapq.heappush(frontier, following)
            if writer and writer not in inside:
                enter(writer)
        return self.cut(mask, prune, cut="greedy", n=n, by=by)

    def cut(self, mask: np.ndarray, prune: bool = True, **settings: object) -> Circuit:
        """Return the circuit of `mask`, with `settings` in its record, and with these scores as its estimates if they
        are effects."""
        mask = connected(self.graph, mask) if prune else mask
        estimates = self.values if self.record.is_effect else None
        return Circuit(self.graph, mask, estimates=estimates, record=self.record.with_settings(**settings))

    def of_nodes(self) -> NodeScores:
        """Return node scores, each the sum over a node's outgoing edges: the first-order effect of ablating its
        output."""
        return NodeScores(self.graph, np.where(self.graph.real, self.values, 0).sum(axis=1), self.record)

    @classmethod
    def of(cls, circuit: Circuit) -> Scores | None:
        """Return a circuit's estimates; None if some edge of the graph has none, as after reading a circuit.json."""
        values = circuit.estimates
        if values is None or not np.isfinite(values[circuit.graph.real]).all():
            return None
        return cls(circuit.graph, values, circuit.record)

    # ---------------------------------------------------------------- files
    def save(self, path: str | PathLike[str], format: eap_ig.Format = "circuitfind") -> Path:  # type: ignore[override]
        """Write safetensors with graph and record in the header; with "eap-ig" the EAP-IG library's `.json` or `.pt`;
        a table if the name ends in `.csv` or `.parquet`.

        Raises:
            FileError: the file cannot be written; or "eap-ig" for a grouped-query model's scores: that file has keys
                and values by query head (`attribute(ungrouped=True)`).
        """
        if eap_ig.check_format(format) == "eap-ig":
            return eap_ig.write(path, Foreign(self.graph, np.zeros_like(self.graph.real), self.values))
        return self._save(path)

    @classmethod
    def open(cls, path: str | PathLike[str], sign: foreign.Sign = "effect", graph: Graph | None = None) -> Scores:
        """Read a file that `save` wrote, in either format; needs no model.

        Args:
            sign, graph: for an EAP-IG file; see `Circuit.open`. Scores of query heads that share a key/value head are
                summed.
        """
        return cls(*(foreign.read_scores(path, "edge", sign, graph) or open_scores(path, "edge")[:3]))


@dataclass(frozen=True, eq=False, repr=False)
class NodeScores(ScoreTable):
    """Effects of every writer: `values [writers]`, or `[writers, position]` when scored by position.

    Baselines' scores are not effects (`record.is_effect`); `record.sign` says what they are.

    Attributes:
        positions: for scores by position, a label for each, such as "3 Mary" (tokens of the first pair); None if the
            labels are not known.
    """

    LEVEL = "node"

    graph: Graph
    values: np.ndarray
    record: Record = field(default_factory=Record)
    positions: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        self._check_array()
        if self.values.shape[:1] != (self.graph.n_writers,):
            given = len(np.atleast_1d(self.values))
            raise ScoreError(f"node scores for {given} writers, the graph has {self.graph.n_writers}")
        if self.positions is not None and self.values.shape[1:] != (len(self.positions),):
            raise ScoreError(f"{len(self.positions)} positions for node scores of shape {list(self.values.shape)}")
        bad = ~np.isfinite(self.values).reshape(self.graph.n_writers, -1).all(axis=1)
        self._check_finite([self.graph.writer_names[i] for i in np.flatnonzero(bad)])

    def __getitem__(self, node: str) -> float | np.ndarray:
        value = self.values[self.graph.writer(node)]
        return float(value) if value.ndim == 0 else value

    def __repr__(self) -> str:
        by = f", {self.values.shape[1]} positions" if self.values.ndim > 1 else ""
        return f"NodeScores({self.graph.n_writers} nodes{by} by {self.record.method or '?'}; {self.graph})"

    def to_dict(self) -> dict[str, float | list[float]]:
        """Return `{node name: effect}`; by position, each effect is a list over positions."""
        return dict(zip(self.graph.writer_names, self.values.tolist(), strict=True))

    def rows(self) -> tuple[NodeScore, ...]:
        """Return every node with its score, at every position if scored by position."""
        values = self.values.reshape(self.graph.n_writers, -1)
        labels = self.positions or (list(map(str, range(values.shape[1]))) if self.values.ndim > 1 else [""])
        cells = zip(self.graph.writer_names, values.tolist(), strict=True)
        return tuple(NodeScore(node, *pair) for node, row in cells for pair in zip(labels, row, strict=True))

    def heads(self) -> np.ndarray:
        """Return the heads' scores, `[layer, head, ...]`; NaN in a layer with a mixer in place of attention."""
        found = np.full((self.graph.n_layers, self.graph.n_heads, *self.values.shape[1:]), np.nan, self.values.dtype)
        for layer in set(range(self.graph.n_layers)) - set(self.graph.mixers):
            found[layer] = self.values[self.graph.heads(layer)]
        return found

    def key(self, by: By = "absolute") -> np.ndarray:
        """Return the values that nodes are ranked by, summed over positions, `[writers]`."""
        check_by(by)
        total = self.values.reshape(self.graph.n_writers, -1).sum(axis=1)
        return np.asarray(np.abs(total) if by == "absolute" else total)

    def top(self, n: int, by: By = "absolute") -> list[str]:
        """Return the names of the n strongest nodes, best first."""
        check_count("n", n)
        return [self.graph.writer_names[i] for i in strongest(self.key(by), n, "signed")]

    def _repr_html_(self) -> str:
        graph, layers = self.graph, list(map(str, range(self.graph.n_layers)))
        total = self.key("signed")
        totals = replace(self, values=total, positions=None)
        mlps = total[[graph.mlp(layer) for layer in range(graph.n_layers)], None]
        by_layer, columns = np.hstack([totals.heads(), mlps]), [*map(str, range(graph.n_heads)), "MLP"]
        if graph.mixers:
            mixed = [total[graph.head(layer)] if layer in graph.mixers else np.nan for layer in range(graph.n_layers)]
            by_layer, columns = np.column_stack([by_layer, mixed]), [*columns, "mixer"]
        heat = html.heat(by_layer, layers, columns, f"{self.unit} by layer and head")
        rows = [("input", float(total[0])), *((name, float(np.sum(self[name]))) for name in self.top(10))]
        return html.block(repr(self), heat, html.table(["node", self.unit], rows, "input, and the strongest nodes"))

    # ---------------------------------------------------------------- nodes as edges
    def circuit(self, nodes: int | Iterable[str], by: By = "absolute") -> Circuit:
        """Return the circuit of all edges among some nodes, `input` and `logits`. `nodes`: names, or the number of best
        nodes besides `input`. Raises a `FileError` if the graph has no such node."""
        graph, kept = self.graph, np.zeros(self.graph.n_nodes, dtype=bool)
        settings: dict[str, Any] = {"cut": "nodes"}
        if isinstance(nodes, Iterable):
            best = [name for name in ([nodes] if isinstance(nodes, str) else nodes) if name != "logits"]
        else:
            check_count("nodes", nodes)
            best = [name for name in self.top(graph.n_writers, by) if name != "input"][:nodes]
            settings |= {"n": nodes, "by": by}
        kept[[0, -1, *(graph.writer(name) for name in best)]] = True
        return Circuit(graph, graph.among(kept), record=self.record.with_settings(**settings))

    def to_edges(self, by: By = "absolute") -> Scores:
        """Return edge scores that rank edges as circuits of more and more nodes add them; see
        `circuitfind/score_base.py`.

        An edge's score is the magnitude or the signed score of its weaker end, not an effect of the edge (`input` and
        `logits` are never the weaker end). With by="signed", rank the result by="signed", too.
        """
        sign = f"{NO_EFFECT}the {'magnitude' if by == 'absolute' else 'score'} of the weaker of an edge's two nodes"
        record = replace(self.record, sign=sign).with_settings(level="edge", nodes_by=by)
        return Scores(self.graph, edge_values(self.graph, self.key(by)), record)

    # ---------------------------------------------------------------- files
    def save(self, path: str | PathLike[str], format: eap_ig.Format = "circuitfind") -> Path:  # type: ignore[override]
        """Write safetensors with graph and record in the header; with "eap-ig" the EAP-IG library's `.json` or
        `.pt`."""
        if eap_ig.check_format(format) == "eap-ig":
            if self.values.ndim > 1:
                raise FileError(f"{path}: the file holds one score a node: sum these over positions first")
            return eap_ig.write(path, Foreign(self.graph, np.zeros_like(self.graph.real), node_scores=self.values))
        return self._save(path)

    @classmethod
    def open(cls, path: str | PathLike[str], sign: foreign.Sign = "effect", graph: Graph | None = None) -> NodeScores:
        """Read a file that `save` wrote, in either format; needs no model. `sign` and `graph`: see `Circuit.open`."""
        return cls(*(foreign.read_scores(path, "node", sign, graph) or open_scores(path, "node")))
