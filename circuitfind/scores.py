"""Numbers over a graph, and the three ways to cut a circuit from them.

1. `top(n)`: the n edges of highest score (`by="signed"`) or highest magnitude (`by="absolute"`, the default).
2. `threshold(t)`: the edges whose score (or magnitude) is at least t.
3. `greedy(n)`: grown from `logits`: of all edges into nodes that are already in, the best one comes next
   (Hanna et al. 2024); every edge has a path to the logits by construction.

Each cut is pruned to what is connected from `input` to `logits` unless `prune=False`: it can hold fewer than n edges.
Ties are broken by the graph's order, so a cut is the same on every machine.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import repeat
from numbers import Real
from os import PathLike
from pathlib import Path

import numpy as np

from circuitfind.circuit import Circuit, connected
from circuitfind.errors import ScoreError
from circuitfind.export import eap_ig
from circuitfind.export.eap_ig_forms import EapIgFile
from circuitfind.graph import Graph
from circuitfind.node_scores import NodeScores
from circuitfind.record import Record
from circuitfind.score_checks import By, check_array, check_by, check_count, check_finite
from circuitfind.score_files import open_scores, save_scores

__all__ = ["By", "NodeScores", "Scores"]


@dataclass(frozen=True, eq=False)
class Scores:
    """Effects of every edge: `values [writers, readers]` float32 in units of the metric, positive = supports.

    Baselines' scores are no effects (`record.is_effect`); `record.sign` says what they are.
    """

    graph: Graph
    values: np.ndarray
    record: Record = field(default_factory=Record)

    def __post_init__(self) -> None:
        check_array(self.values)
        shape = (self.graph.n_writers, self.graph.n_readers)
        if self.values.shape != shape:
            raise ScoreError(f"scores have shape {list(self.values.shape)}, the graph needs {list(shape)}")
        check_finite(self.values[self.graph.real], self.graph.names(~np.isfinite(self.values) & self.graph.real))

    def __getitem__(self, edge: str) -> float:
        return float(self.values[self.graph.edge(edge)])

    def __len__(self) -> int:
        return self.graph.n_edges

    def __repr__(self) -> str:
        return f"Scores({len(self)} edges by {self.record.method or '?'}; {self.graph})"

    def to_dict(self) -> dict[str, float]:
        """`{edge name: effect}` of every edge of the graph."""
        names = self.graph.names(self.graph.real)
        return dict(zip(names, self.values.T[self.graph.real.T].tolist(), strict=True))

    def key(self, by: By = "absolute") -> np.ndarray:
        """`[writers, readers]`: what edges are ranked by; -inf where there is no edge."""
        check_by(by)
        values = np.abs(self.values) if by == "absolute" else self.values
        return np.where(self.graph.real, values, -np.inf)

    def ranked(self, by: By = "absolute") -> np.ndarray:
        """`[edges, 2]` (writer, reader) of every edge, best first, ties in the graph's order."""
        key = self.key(by).T.ravel()
        order = np.argsort(-key, kind="stable")[: self.graph.n_edges]
        readers, writers = np.divmod(order, self.graph.n_writers)
        return np.stack([writers, readers], axis=1)

    # ---------------------------------------------------------------- cuts
    def top(self, n: int, by: By = "absolute", prune: bool = True) -> Circuit:
        """The n highest edges."""
        check_count(n)
        mask = np.zeros_like(self.graph.real)
        best = self.ranked(by)[:n]
        mask[best[:, 0], best[:, 1]] = True
        return self.cut(mask, prune, cut="top", n=n, by=by)

    def threshold(self, t: float, by: By = "absolute", prune: bool = True) -> Circuit:
        """The edges that reach t (in units of the scores)."""
        if not isinstance(t, Real) or math.isnan(t):
            raise ScoreError(f"t={t!r} is no threshold: give a number in units of the scores")
        return self.cut((self.key(by) >= t) & self.graph.real, prune, cut="threshold", t=t, by=by)

    def greedy(self, n: int, by: By = "absolute", prune: bool = True) -> Circuit:
        """n edges grown from the logits."""
        check_count(n)
        graph, key = self.graph, self.key(by)
        mask = np.zeros_like(graph.real)
        inside: set[int] = set()
        columns: dict[int, Iterator[tuple[float, int, int]]] = {}  # by reader: its edges that are out, best first
        frontier: list[tuple[float, int, int]] = []  # a heap: the first of every column

        def enter(node: int) -> None:
            """Offers the edges into a node that has just come in."""
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
            _, reader, writer = frontier[0]
            mask[writer, reader] = True
            following = next(columns[reader], None)
            if following is None:
                heapq.heappop(frontier)
            else:
                heapq.heapreplace(frontier, following)
            if writer and writer not in inside:
                enter(writer)
        return self.cut(mask, prune, cut="greedy", n=n, by=by)

    def cut(self, mask: np.ndarray, prune: bool = True, **settings: object) -> Circuit:
        """The circuit of `mask`, carrying these scores as its estimates and `settings` in its record.

        Scores that are no effects are nobody's estimates: then the circuit carries none.
        """
        mask = connected(self.graph, mask) if prune else mask
        estimates = self.values if self.record.is_effect else None
        return Circuit(self.graph, mask, estimates=estimates, record=self.record.with_settings(**settings))

    def of_nodes(self) -> NodeScores:
        """Node scores as sums over outgoing edges, the first-order effect of ablating the node's whole output."""
        return NodeScores(self.graph, np.where(self.graph.real, self.values, 0).sum(axis=1), self.record)

    @classmethod
    def of(cls, circuit: Circuit) -> Scores | None:
        """The estimates that a circuit carries; None where it has none for some edge, as after a circuit.json."""
        values = circuit.estimates
        if values is None or not np.isfinite(values[circuit.graph.real]).all():
            return None
        return cls(circuit.graph, values, circuit.record)

    # ---------------------------------------------------------------- files
    def save(self, path: str | PathLike[str], format: eap_ig.Format = "circuitfind") -> Path:
        """Writes safetensors, graph and record in the header; "eap-ig": the EAP-IG library's `.json` or `.pt`.

        Raises:
            FileError: the place cannot be written to; or "eap-ig" for a grouped-query model, whose scores would have
                to be split over the query heads.
        """
        if eap_ig.check_format(format) == "eap-ig":
            return eap_ig.write(path, EapIgFile(self.graph, np.zeros_like(self.graph.real), self.values))
        return save_scores(path, "edge", self.graph, self.values, self.record)

    @classmethod
    def open(cls, path: str | PathLike[str], sign: eap_ig.Sign = "effect", graph: Graph | None = None) -> Scores:
        """Reads what `save` wrote, in either format, without any model.

        Args:
            sign, graph: of an EAP-IG file; see `Circuit.open`. Scores of query heads are summed into a shared head's.
        """
        return cls(*(eap_ig.read_scores(path, "edge", sign, graph) or open_scores(path, "edge")[:3]))
