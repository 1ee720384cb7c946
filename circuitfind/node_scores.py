"""Numbers over the nodes of a graph, by position if so scored; circuits and edge rankings made of them."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from circuitfind.circuit import Circuit
from circuitfind.errors import FileError, ScoreError
from circuitfind.export import eap_ig
from circuitfind.export.eap_ig_forms import EapIgFile
from circuitfind.graph import Graph
from circuitfind.node_ranking import edge_values, edges_among
from circuitfind.record import NO_EFFECT, Record
from circuitfind.score_checks import By, check_array, check_by, check_count, check_finite
from circuitfind.score_files import open_scores, save_scores

if TYPE_CHECKING:
    from circuitfind.scores import Scores


@dataclass(frozen=True, eq=False)
class NodeScores:
    """Effects of every writer: `values [writers]`, or `[writers, position]` when scored by position.

    As with edges, baselines' scores are no effects.

    Attributes:
        positions: of scores by position, what each is called, such as "3 Mary": tokens of the first pair. None where
            that is not known.
    """

    graph: Graph
    values: np.ndarray
    record: Record = field(default_factory=Record)
    positions: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        check_array(self.values)
        if self.values.shape[:1] != (self.graph.n_writers,):
            given = len(np.atleast_1d(self.values))
            raise ScoreError(f"node scores for {given} writers, the graph has {self.graph.n_writers}")
        if self.positions is not None and self.values.shape[1:] != (len(self.positions),):
            raise ScoreError(f"{len(self.positions)} positions for node scores of shape {list(self.values.shape)}")
        bad = ~np.isfinite(self.values).reshape(self.graph.n_writers, -1).all(axis=1)
        check_finite(self.values, [self.graph.writer_names[i] for i in np.flatnonzero(bad)])

    def __getitem__(self, node: str) -> float | np.ndarray:
        value = self.values[self.graph.writer(node)]
        return float(value) if value.ndim == 0 else value

    def to_dict(self) -> dict[str, float | list[float]]:
        """`{node name: effect}`, or lists over positions."""
        return dict(zip(self.graph.writer_names, self.values.tolist(), strict=True))

    def heads(self) -> np.ndarray:
        """`[layer, head, ...]`: the heads' scores."""
        return np.stack([self.values[self.graph.heads(layer)] for layer in range(self.graph.n_layers)])

    def key(self, by: By = "absolute") -> np.ndarray:
        """`[writers]`: what nodes are ranked by (positions summed)."""
        check_by(by)
        total = self.values.reshape(self.graph.n_writers, -1).sum(axis=1)
        return np.abs(total) if by == "absolute" else total

    def top(self, n: int, by: By = "absolute") -> list[str]:
        """Names of the n best nodes, best first."""
        check_count(n, "nodes")
        order = np.argsort(-self.key(by), kind="stable")
        return [self.graph.writer_names[i] for i in order[:n]]

    # ---------------------------------------------------------------- nodes as edges
    def circuit(self, nodes: int | Iterable[str], by: By = "absolute") -> Circuit:
        """All edges among some nodes, with `input` and `logits`.

        Args:
            nodes: names, or how many of the best besides `input`.

        Raises:
            FileError: the graph has no such node.
        """
        graph, kept = self.graph, np.zeros(self.graph.n_writers, dtype=bool)
        if not isinstance(nodes, Iterable):
            check_count(nodes, "nodes")
            best = [name for name in self.top(graph.n_writers, by) if name != "input"][:nodes]
            settings = {"cut": "nodes", "n": nodes, "by": by}
        else:
            best = [name for name in ([nodes] if isinstance(nodes, str) else nodes) if name != "logits"]
            settings = {"cut": "nodes"}
        kept[[graph.writer(name) for name in best]] = True
        return Circuit(graph, edges_among(graph, kept), record=self.record.with_settings(**settings))

    def to_edges(self, by: By = "absolute") -> Scores:
        """The edges in the order in which they come in as nodes do, best first; see `circuitfind/node_ranking.py`.

        An edge's score is its weaker end's (`input` and `logits` are always in): of magnitudes, or of signed scores
        (then rank the result by="signed", too). It is no effect of the edge.
        """
        from circuitfind.scores import Scores  # which makes node scores of edges, in turn

        sign = f"{NO_EFFECT}the {'magnitude' if by == 'absolute' else 'score'} of the weaker of an edge's two nodes"
        record = replace(self.record, sign=sign).with_settings(level="edge", nodes_by=by)
        return Scores(self.graph, edge_values(self.graph, self.key(by)), record)

    def save(self, path: str | PathLike[str], format: eap_ig.Format = "circuitfind") -> Path:
        """Writes safetensors, graph and record in the header; "eap-ig": the EAP-IG library's `.json` or `.pt`."""
        if eap_ig.check_format(format) == "eap-ig":
            if self.values.ndim > 1:
                raise FileError(f"{path}: the file holds one score a node: sum these over positions first")
            return eap_ig.write(path, EapIgFile(self.graph, np.zeros_like(self.graph.real), node_scores=self.values))
        return save_scores(path, "node", self.graph, self.values, self.record, self.positions)

    @classmethod
    def open(cls, path: str | PathLike[str], sign: eap_ig.Sign = "effect", graph: Graph | None = None) -> NodeScores:
        """Reads what `save` wrote, in either format, without any model; `sign` and `graph`: see `Circuit.open`."""
        return cls(*(eap_ig.read_scores(path, "node", sign, graph) or open_scores(path, "node")))
