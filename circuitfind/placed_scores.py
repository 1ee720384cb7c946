"""Edge scores by position, or by named span of the prompts (position-aware edges; PEAP, Haklay et al. 2025).

A writer adds to the residual stream at a token, and a reader reads it at the same token. So an edge's score is a sum
over tokens: `values[place, writer, reader]` add up over places to the edge's score. Information moves between tokens
only inside a head (or mixer): a key or value is read at one place, and the head writes at the same or a later one.

For drawing, the strongest edges at their places are pruned to those on a path from `input` to `logits`:

1. A node that is read at a place by `q` or by an MLP has its output there.
2. A head that reads a key or value at a place, or a mixer that reads there, may have its output at any place.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from os import PathLike
from pathlib import Path
from typing import NamedTuple

import numpy as np

from circuitfind.errors import ScoreError, check_count
from circuitfind.export import html, neuronpedia, picture, placed_picture
from circuitfind.export.arrows import PlacedRow
from circuitfind.graph import Graph
from circuitfind.record import Record
from circuitfind.result import By, check_by
from circuitfind.score_base import ScoreTable, open_scores
from circuitfind.scores import Scores

PLACE = "place"  # key of a record's settings that marks scores of edges at one place only
DRAWN = 40
ACROSS = ("k", "v", "mixer")  # kinds of readers that affect outputs at other places


class PlacedEdge(NamedTuple):
    """One edge at one place, and its score there."""

    edge: str
    place: str
    score: float


@dataclass(frozen=True, eq=False, repr=False)
class PlacedScores(ScoreTable):
    """Effects of every edge at every place: `values [places, writers, readers]` float32 in units of the metric.

    `positions`: the names of the places: spans, or positions such as "3 Mary" (tokens of the first pair).
    """

    LEVEL = "edge by place"

    graph: Graph
    values: np.ndarray
    record: Record = field(default_factory=Record)
    positions: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        self._check_array()
        if self.values.shape != (shape := (len(self.positions), *self.graph.real.shape)):
            raise ScoreError(f"scores by place have shape {list(self.values.shape)}, these need {list(shape)}")
        bad = ~np.isfinite(self.values).all(axis=0) & self.graph.real
        self._check_finite(self.graph.names(bad))

    def __getitem__(self, edge: str) -> np.ndarray:
        """Return the scores of an edge, `[places]`."""
        writer, reader = self.graph.edge(edge)
        return self.values[:, writer, reader]

    def __repr__(self) -> str:
        places = f"{len(self.positions)} places"
        return f"PlacedScores({self.graph.n_edges} edges at {places} by {self.record.method or '?'}; {self.graph})"

    def total(self) -> Scores:
        """Return the scores of edges summed over places."""
        settings = {name: value for name, value in self.record.settings.items() if name != PLACE}
        return Scores(self.graph, self.values.sum(axis=0), replace(self.record, settings=settings))

    def at(self, place: str) -> Scores:
        """Return the scores of edges at one place."""
        if place not in self.positions:
            raise ScoreError(f"no place '{place}': the places are {', '.join(self.positions)}")
        return Scores(self.graph, self.values[self.positions.index(place)], self.record.with_settings(**{PLACE: place}))

    def ranked(self, n: int, by: By = "absolute") -> np.ndarray:
        """Return the n strongest edges as (place, writer, reader), `[n, 3]`, best first, ties by place and then in the
        graph's order."""
        check_count("n", n)
        check_by(by)
        values = np.abs(self.values) if by == "absolute" else self.values
        key = np.where(self.graph.real, values, -np.inf).transpose(0, 2, 1)  # reader by reader, as the graph's edges
        best = np.argsort(-key.ravel(), kind="stable")[: min(n, self.graph.n_edges * len(self.positions))]
        place, reader, writer = np.unravel_index(best, key.shape)
        return np.stack([place, writer, reader], axis=1)

    def top(self, n: int, by: By = "absolute") -> list[PlacedEdge]:
        """Return the n strongest edges, each at its place."""
        return [
            PlacedEdge(self.graph.edge_name(u, r), self.positions[p], float(self.values[p, u, r]))
            for p, u, r in self.ranked(n, by).tolist()
        ]

    def rows(self) -> Sequence[PlacedEdge]:
        """Return every edge at every place, strongest first."""
        return self.top(self.graph.n_edges * len(self.positions))

    def to_dict(self) -> dict[str, dict[str, float]]:
        """Return `{place: {edge name: effect}}`."""
        return {place: self.at(place).to_dict() for place in self.positions}

    def _repr_html_(self) -> str:
        drawn = picture.svg(self.to_dot()) or ""
        return html.block(repr(self), html.table(PlacedEdge._fields, self.top(10), "strongest edges"), drawn)

    # ---------------------------------------------------------------- as a picture
    def cut(self, n: int, by: By = "absolute") -> np.ndarray:
        """Return those of the n strongest edges that are on a path from `input` to `logits`, `[places, writers,
        readers]` bool."""
        mask = np.zeros(self.values.shape, dtype=bool)
        mask[tuple(self.ranked(n, by).T)] = True
        return connected(self.graph, mask)

    def to_dot(self, n: int = DRAWN, by: By = "absolute", title: str | None = None) -> str:
        """Return Graphviz source of the n strongest edges, with one column a place and `title` above."""
        return placed_picture.source(self.graph, self._drawn(n, by), self.positions, title)

    def render(self, path: str | PathLike[str], n: int = DRAWN, by: By = "absolute", title: str | None = None) -> Path:
        """Draw `to_dot` to `.svg`, `.png` or `.pdf` with Graphviz's `dot`."""
        return picture.render(path, self.to_dot(n, by, title))

    def _drawn(self, n: int, by: By) -> list[PlacedRow]:
        places = np.argwhere(self.cut(n, by)).tolist()
        return [PlacedRow(p, u, r, float(self.values[p, u, r])) for p, u, r in places]

    # ---------------------------------------------------------------- files
    def save(self, path: str | PathLike[str], n: int = DRAWN, by: By = "absolute") -> Path:  # type: ignore[override]
        """Write safetensors with graph, record and places in the header; a table if the name ends in `.csv` or
        `.parquet`; if it ends in `.neuronpedia.json`, a graph for Neuronpedia's page of the edges that `to_dot` draws,
        each in the column of its place."""
        if str(path).lower().endswith(neuronpedia.ENDING):
            return neuronpedia.write_placed(path, self.graph, self._drawn(n, by), self.positions, self.record)
        return self._save(path)

    @classmethod
    def open(cls, path: str | PathLike[str]) -> PlacedScores:
        """Read a safetensors file that `save` wrote; needs no model."""
        graph, values, record, positions = open_scores(path, cls.LEVEL)
        return cls(graph, values, record, positions or ())


def connected(graph: Graph, mask: np.ndarray) -> np.ndarray:
    """Return those edges of `mask`, `[places, writers, readers]` bool, that are on a path from `input` to `logits`."""
    here = np.array([graph.reader(reader).kind not in ACROSS for reader in range(graph.n_readers)])
    serves = graph.serves.astype(np.float32)
    reached, useful = np.zeros((2, len(mask), graph.n_nodes), dtype=bool)
    reached[:, 0] = useful[:, -1] = True
    for u in range(graph.n_writers):  # writers are numbered in order of computation
        read = mask[:, u] & reached[:, u, None]  # places readers
        read = np.where(here, read, read.any(axis=0))
        reached |= read.astype(np.float32) @ serves > 0
    used = np.zeros(mask[:, 0].shape, dtype=bool)
    for u in reversed(range(graph.n_writers)):
        at_nodes = useful.astype(np.float32) @ serves.T > 0  # places readers
        used = np.where(here, at_nodes, at_nodes.any(axis=0))
        useful[:, u] = (mask[:, u] & used).any(axis=1)
    return np.asarray(mask & reached[:, : graph.n_writers, None] & used[:, None])
