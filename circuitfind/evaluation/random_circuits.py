"""Circuits to compare a found one with: random connected ones of its size or among its nodes, and small changes of it.

A random circuit of n edges begins with `input` and `logits` inside. While edges are missing:

1. Draw a random edge that is out; if its ends are not on paths yet, complete it by random edges forwards to a node
   inside and backwards to one, as long as that fits in what is missing.
2. Where nothing drawn fits (one edge is missing, and every edge between the nodes inside is in), take a detour of two
   edges, if need be in place of `input->logits`.

Every edge is on a path from `input` to `logits`, so pruning removes none.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from circuitfind.circuit import Circuit, connected
from circuitfind.graph import Graph

PATIENCE, DRAWS = 200, 256


def random_circuit(graph: Graph, n_edges: int, rng: np.random.Generator) -> Circuit:
    """A connected circuit of `n_edges` edges (all edges if there are not that many)."""
    if n_edges >= graph.n_edges:
        return Circuit.full(graph)
    growth, refused = _Growth(graph, rng), 0
    while growth.size < n_edges:
        room = n_edges - growth.size  # after many proposals that do not fit, only edges between nodes inside are drawn
        if growth.propose(room, inside_only=refused >= PATIENCE):
            refused = 0
        elif refused < PATIENCE:
            refused += 1
        else:
            growth.detour(room)  # there was no such edge left
    return Circuit(graph, growth.mask)


def same_nodes(graph: Graph, mask: np.ndarray, rng: np.random.Generator) -> np.ndarray | None:
    """As many random edges among the nodes of a circuit, on paths from `input` to `logits`; None if it has all of them.
    Edges on no path are drawn again, up to `PATIENCE` times, and then left out."""
    among, n, drawn = graph.among(Circuit(graph, mask).node_mask), int(mask.sum()), np.zeros_like(mask)
    if not n or int(among.sum()) <= n:
        return None
    for _ in range(PATIENCE):
        free = np.argwhere(among & ~drawn)
        drawn[tuple(rng.choice(free, min(n - int(drawn.sum()), len(free)), replace=False).T)] = True
        drawn = connected(graph, drawn)
        if drawn.sum() == n:
            break
    return drawn


def random_path(graph: Graph, through: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """A random path from `input` to `logits` through an edge (writer, reader), as a `[writers, readers]` mask."""
    path = np.zeros_like(graph.real)
    path[tuple(np.transpose(_Growth(graph, rng).path(*map(int, through))))] = True
    return path


def inflated(graph: Graph, mask: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """A circuit with a random path added, and the same without one random edge of what was added."""
    larger = mask | random_path(graph, rng.choice(np.argwhere(graph.real & ~mask)), rng)
    smaller = larger.copy()
    smaller[tuple(rng.choice(np.argwhere(larger & ~mask)))] = False
    return larger, smaller


def without_each(mask: np.ndarray, edges: np.ndarray) -> Iterator[np.ndarray]:
    """A circuit without each of some edges `[edges, 2]` (writer, reader)."""
    for edge in edges:
        smaller = mask.copy()
        smaller[tuple(edge)] = False
        yield smaller


class _Growth:
    def __init__(self, graph: Graph, rng: np.random.Generator) -> None:
        self.graph, self.rng = graph, rng
        self.mask = np.zeros_like(graph.real)
        self.inside = np.zeros(graph.n_nodes, dtype=bool)
        self.inside[[0, -1]] = True
        self.size = 0

    def propose(self, room: int, inside_only: bool) -> bool:
        """Adds a random edge with what connects it; false if that needs more than `room` edges."""
        cell = self._any(self.graph.among(self.inside) & ~self.mask) if inside_only else self._free()
        if cell is None:
            return False
        writer, reader = divmod(cell, self.graph.n_readers)
        edges = list(dict.fromkeys(edge for edge in self.path(writer, reader) if not self.mask[edge]))
        if len(edges) > room:
            return False
        for u, r in edges:
            self.mask[u, r] = True
            self.inside[u] = True  # every reader on the way serves a writer of the list, or a node that was inside
        self.size += len(edges)
        return True

    def _free(self) -> int | None:
        """A random edge that is out, as a flat index: cells are drawn until one is; a nearly full mask is listed."""
        cells = self.rng.integers(self.mask.size, size=DRAWS)
        hits = cells[self.graph.real.ravel()[cells] & ~self.mask.ravel()[cells]]
        return int(hits[0]) if len(hits) else self._any(self.graph.real & ~self.mask)

    def _any(self, cells: np.ndarray) -> int | None:
        found = np.flatnonzero(cells)
        return int(self.rng.choice(found)) if len(found) else None

    def detour(self, room: int) -> None:
        """Adds a path of two edges through a node outside; with room for one edge only, in place of input->logits."""
        node = int(self.rng.choice(np.flatnonzero(~self.inside)))
        reader = int(self.rng.choice(np.flatnonzero(self.graph.serves[:, node])))
        if room < 2 and not self.mask[0, reader]:
            self.mask[0, -1] = False
        self.mask[[0, node], [reader, -1]] = True
        self.inside[node] = True
        self.size = int(self.mask.sum())

    def path(self, writer: int, reader: int) -> list[tuple[int, int]]:
        """An edge, with random ones that lead to it from a node inside and on to one."""
        return [(writer, reader), *self._backwards(writer), *self._forwards(reader)]

    def _backwards(self, node: int) -> list[tuple[int, int]]:
        """Random edges from a node inside to this one."""
        edges = []
        while not self.inside[node]:
            reader = int(self.rng.choice(np.flatnonzero(self.graph.serves[:, node])))
            node = int(self.rng.integers(self.graph.limits[reader]))
            edges.append((node, reader))
        return edges

    def _forwards(self, reader: int) -> list[tuple[int, int]]:
        """Random edges from this reader's node to one inside."""
        edges = []
        while not (self.graph.serves[reader] & self.inside).any():
            node = int(self.rng.choice(np.flatnonzero(self.graph.serves[reader])))
            reader = int(self.rng.choice(np.flatnonzero(self.graph.real[node])))
            edges.append((node, reader))
        return edges
