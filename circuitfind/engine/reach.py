"""What a shrinking circuit still connects: counts that are kept up to date while edges go.

1. A node is *reached* while a path of kept edges leads to it from `input`; a reader is *useful* while one leads from it
   to `logits`. Under interchange a writer that is not reached carries exactly its ablated value; a reader that is not
   useful changes nothing that is measured. So an edge without both has an effect of exactly 0, and needs no run.
2. `into[node]` counts kept edges from reached writers, `out[writer]` kept edges into useful readers, `inputs[node]` all
   kept edges. Where a count falls to 0 the loss is passed on, forwards or backwards. Each edge is passed at most once
   in either direction, however many are removed.
"""

from __future__ import annotations

from functools import cached_property

import numpy as np

from circuitfind.circuit import paths
from circuitfind.graph import Graph


def without_effect(graph: Graph, mask: np.ndarray, coupled: bool, interchange: bool) -> np.ndarray:
    """`[writers, readers]` bool: edges of a mask whose effect is known to be exactly 0."""
    reach = Reach(graph, mask.copy(), coupled)
    idle = ~reach.useful[None]
    return np.asarray(mask & (idle | ~reach.reached[: graph.n_writers, None] if interchange else idle))


def feeding(graph: Graph, coupled: bool) -> np.ndarray:
    """`[readers, nodes]` bool: the nodes that each reader feeds. `coupled`: a norm on the attention's output scales all
    heads of a layer together, so each q, k or v moves them all."""
    feeds = graph.serves.copy()
    for layer in range(graph.n_layers if coupled else 0):
        feeds[graph.readers(layer, "qkv"), graph.heads(layer)] = True
    return feeds


class Reach:
    """Connectivity of a mask that only loses edges.

    `mask`: `[writers, readers]` bool, shared with the caller and changed by `remove`; `coupled`, `feeds`: as for
    `feeding`; `reached`: `[nodes]` bool; `useful`: `[readers]` bool; `inputs`: `[nodes]` number of kept edges in.
    """

    def __init__(self, graph: Graph, mask: np.ndarray, coupled: bool = False) -> None:
        self.graph, self.mask = graph, mask
        self.feeds = feeds = feeding(graph, coupled)
        self.reached, self.useful = paths(graph, mask, feeds)
        counted = feeds.astype(np.int64)
        self.inputs, self.into = mask.sum(axis=0) @ counted, mask[self.reached[:-1]].sum(axis=0) @ counted
        self.out = (mask & self.useful).sum(axis=1)

    @cached_property
    def _fed(self) -> list[list[int]]:
        """Nodes that a reader feeds."""
        return [np.flatnonzero(row).tolist() for row in self.feeds]

    @cached_property
    def _feeding(self) -> list[list[int]]:
        """Readers that feed a node."""
        return [np.flatnonzero(column).tolist() for column in self.feeds.T]

    def remove(self, writer: int, reader: int) -> list[int]:
        """Takes an edge out of the mask; returns the nodes that have lost their last input by it."""
        self.mask[writer, reader] = False
        self.inputs[self._fed[reader]] -= 1
        if self.reached[writer]:
            self._lose_inputs(reader)
        if self.useful[reader]:
            self._lose_output(writer)
        return [node for node in self._fed[reader] if not self.inputs[node]]

    def without_inputs(self, edges: list[tuple[int, int]]) -> int | None:
        """The place of the first edge whose removal, after those before it, leaves a node without inputs."""
        left = self.inputs.copy()
        for place, (_, reader) in enumerate(edges):
            left[self._fed[reader]] -= 1
            if not left[self._fed[reader]].all():
                return place
        return None

    def _lose_inputs(self, reader: int) -> None:
        """A kept edge into this reader no longer carries anything."""
        pending = [reader]
        while pending:
            for node in self._fed[pending.pop()]:
                self.into[node] -= 1
                if not self.into[node]:
                    self.reached[node] = False
                    pending += np.flatnonzero(self.mask[node]).tolist() if node < self.graph.n_writers else []

    def _lose_output(self, writer: int) -> None:
        """A kept edge out of this writer no longer leads anywhere."""
        pending = [writer]
        while pending:
            node = pending.pop()
            self.out[node] -= 1
            if self.out[node]:
                continue
            for reader in self._feeding[node]:
                if self.useful[reader] and not self.out[self._fed[reader]].any():
                    self.useful[reader] = False
                    pending += np.flatnonzero(self.mask[:, reader]).tolist()
