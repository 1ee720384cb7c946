"""Random circuits for comparison: of the same size, with the same nodes, or with small changes of a circuit.

A random circuit of n edges starts with the nodes `input` and `logits`. While edges are missing:

1. Draw a random edge that is not in the circuit. If its ends are not in the circuit, connect them to it by random edges
   forwards and backwards, provided that all these edges still fit.
2. If nothing fits (one edge is missing, and all edges between the circuit's nodes are in it), add a path of two edges,
   if necessary in place of `input->logits`.

Every edge is on a path from `input` to `logits`, so pruning removes none.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from circuitfind.circuit import Circuit, connected
from circuitfind.graph import Graph

PATIENCE, DRAWS = 200, 256


def random_circuit(graph: Graph, n_edges: int, rng: np.random.Generator) -> Circuit:
    """A connected circuit of `n_edges` edges, or of all edges if the graph has fewer."""
    if n_edges >= graph.n_edges:
        return Circuit.full(graph)
    growth, refused = _Growth(graph, rng), 0
    while growth.size < n_edges:
        room = (
            n_edges - growth.size
        )  # after many proposals that do not fit, draw only edges between the circuit's nodes
        if growth.propose(room, inside_only=refused >= PATIENCE):
            refused = 0
        elif refused < PATIENCE:
            refused += 1
        else:
            growth.detour(room)  # no such edge is left
    return Circuit(graph, growth.mask)


def same_nodes(graph: Graph, mask: np.ndarray, rng: np.random.Generator) -> np.ndarray | None:
    """The same number of random edges between the nodes of a circuit, on paths from `input` to `logits`.

    None if the circuit has all such edges. Edges on no path are drawn again, up to `PATIENCE` times, then left out.
    """
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
    """A circuit with a random path added, and the same without one random edge of that path."""
    larger = mask | random_path(graph, rng.choice(np.argwhere(graph.real & ~mask)), rng)
    smaller = larger.copy()
    smaller[tuple(rng.choice(np.argwhere(larger & ~mask)))] = False
    return larger, smaller


def without_each(mask: np.ndarray, edges: np.ndarray) -> Iterator[np.ndarray]:
    """Yield the circuit without each of the edges `[edges, 2]` (writer, reader)."""
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
        """Add a random edge and the edges that connect it; False if these are more than `room` edges."""
        cell = self._any(self.graph.among(self.inside) & ~self.mask) if inside_only else self._free()
        if cell is None:
            return False
        writer, reader = divmod(cell, self.graph.n_readers)
        edges = list(dict.fromkeys(edge for edge in self.path(writer, reader) if not self.mask[edge]))
        if len(edges) > room:
            return False
        for u, r in edges:
            self.mask[u, r] = True
            self.inside[u] = (
                True  # every reader on the path serves a writer in the list, or a node already in the circuit
            )
        self.size += len(edges)
        return True

    def _free(self) -> int | None:
        """A random edge not in the circuit, as a flat index; listed instead of drawn if hardly any is left."""
        cells = self.rng.integers(self.mask.size, size=DRAWS)
        hits = cells[self.graph.real.ravel()[cells] & ~self.mask.ravel()[cells]]
        return int(hits[0]) if len(hits) else self._any(self.graph.real & ~self.mask)

    def _any(self, cells: np.ndarray) -> int | None:
        found = np.flatnonzero(cells)
        return int(self.rng.choice(found)) if len(found) else None

    def detour(self, room: int) -> None:
        """Add a path of two edges through a new node; with room for only one edge, in place of input->logits."""
        node = int(self.rng.choice(np.flatnonzero(~self.inside)))
        reader = int(self.rng.choice(np.flatnonzero(self.graph.serves[:, node])))
        if room < 2 and not self.mask[0, reader]:
            self.mask[0, -1] = False
        self.mask[[0, node], [reader, -1]] = True
        self.inside[node] = True
        self.size = int(self.mask.sum())

    def path(self, writer: int, reader: int) -> list[tuple[int, int]]:
        """An edge, with random edges that connect it to the circuit's nodes on both sides."""
        return [(writer, reader), *self._backwards(writer), *self._forwards(reader)]

    def _backwards(self, node: int) -> list[tuple[int, int]]:
        """Random edges from a node of the circuit to this node."""
        edges = []
        while not self.inside[node]:
            reader = int(self.rng.choice(np.flatnonzero(self.graph.serves[:, node])))
            node = int(self.rng.integers(self.graph.limits[reader]))
            edges.append((node, reader))
        return edges

    def _forwards(self, reader: int) -> list[tuple[int, int]]:
        """Random edges from this reader's node to a node of the circuit."""
        edges = []
        while not (self.graph.serves[reader] & self.inside).any():
            node = int(self.rng.choice(np.flatnonzero(self.graph.serves[reader])))
            reader = int(self.rng.choice(np.flatnonzero(self.graph.real[node])))
            edges.append((node, reader))
        return edges
