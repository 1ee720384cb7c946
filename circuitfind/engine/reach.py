"""Connectivity of a circuit that loses edges, kept up to date by counts.

1. A node is *reached* while a path of kept edges leads to it from `input`. A reader is *useful* while a path of kept
   edges leads from it to `logits`. Under interchange a writer that is not reached has exactly its ablated value. A
   reader that is not useful does not change the logits. So an edge from a writer that is not reached, or into a reader
   that is not useful, has an effect of exactly 0, and needs no run.
2. Three counts are kept: `into[node]`, the kept edges into it from reached writers; `out[writer]`, the kept edges from
   it into useful readers; `inputs[node]`, all kept edges into it. When `into` or `out` falls to 0, the loss is passed
   on, forwards or backwards. Each edge is visited at most once in each direction, however many are removed.
"""

from __future__ import annotations

from functools import cached_property

import numpy as np

from circuitfind.circuit import paths
from circuitfind.graph import Graph


def without_effect(graph: Graph, mask: np.ndarray, coupled: bool, interchange: bool) -> np.ndarray:
    """Return the edges of a mask whose effect is known to be exactly 0, `[writers, readers]` bool.

    `coupled`: as for `feeding`; `interchange`: whether a writer that is not reached has its ablated value.
    """
    reach = Reach(graph, mask.copy(), coupled)
    idle = ~reach.useful[None]
    return np.asarray(mask & (idle | ~reach.reached[: graph.n_writers, None] if interchange else idle))


def feeding(graph: Graph, coupled: bool) -> np.ndarray:
    """Return the nodes that each reader feeds, `[readers, nodes]` bool. `coupled`: a norm of the attention's output
    scales all heads of a layer together, so each q, k or v changes them all."""
    feeds = graph.serves.copy()
    for layer in range(graph.n_layers if coupled else 0):
        feeds[graph.readers(layer, "qkv"), graph.heads(layer)] = True
    return feeds


class Reach:
    """Connectivity of a mask that only loses edges.

    Attributes:
        mask: `[writers, readers]` bool, shared with the caller and changed by `remove`.
        feeds: `[readers, nodes]` bool, from `feeding`.
        reached: `[nodes]` bool.
        useful: `[readers]` bool.
        inputs: `[nodes]`, the number of kept edges into each.
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
        """The nodes that each reader feeds."""
        return [np.flatnonzero(row).tolist() for row in self.feeds]

    @cached_property
    def _feeding(self) -> list[list[int]]:
        """The readers that feed each node."""
        return [np.flatnonzero(column).tolist() for column in self.feeds.T]

    def remove(self, writer: int, reader: int) -> list[int]:
        """Remove an edge from the mask; returns the nodes that lose their last input by this."""
        self.mask[writer, reader] = False
        self.inputs[self._fed[reader]] -= 1
        if self.reached[writer]:
            self._lose_inputs(reader)
        if self.useful[reader]:
            self._lose_output(writer)
        return [node for node in self._fed[reader] if not self.inputs[node]]

    def without_inputs(self, edges: list[tuple[int, int]]) -> int | None:
        """Return the index of the first edge whose removal, after the edges before it, leaves a node without inputs;
        None if there is none."""
        left = self.inputs.copy()
        for place, (_, reader) in enumerate(edges):
            left[self._fed[reader]] -= 1
            if not left[self._fed[reader]].all():
                return place
        return None

    def _lose_inputs(self, reader: int) -> None:
        """Update counts: an edge into this reader was removed, or its writer is no longer reached."""
        pending = [reader]
        while pending:
            for node in self._fed[pending.pop()]:
                self.into[node] -= 1
                if not self.into[node]:
                    self.reached[node] = False
                    pending += np.flatnonzero(self.mask[node]).tolist() if node < self.graph.n_writers else []

    def _lose_output(self, writer: int) -> None:
        """Update counts: an edge from this writer was removed, or its reader is no longer useful."""
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
