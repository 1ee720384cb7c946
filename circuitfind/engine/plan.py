"""What a circuit run must compute: which readers need arithmetic, and which writers they need it from.

In either form of a circuit run (see `circuit_run.py`) a reader's stream is a baseline plus some writers' terms. Readers
without a term keep the baseline's value; writers without a term are never formed. Under interchange a writer that no
kept edge reaches carries exactly its ablated value, so its terms vanish from the sparse form.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from circuitfind.engine.prepare import Prepared
from circuitfind.graph import Graph


@dataclass(frozen=True)
class Plan:
    """Which readers need arithmetic and which writers they need it from.

    Attributes:
        terms: `[circuits, writers, readers]` bool, the D that enter each reader's stream.
        writers: indices of the writers that occur in any term.
        active: `[readers]` bool.
    """

    graph: Graph
    terms: np.ndarray
    sparse: bool
    writers: np.ndarray
    active: np.ndarray

    @classmethod
    def of(cls, prepared: Prepared, masks: np.ndarray, sparse: bool) -> Plan:
        graph = prepared.adapter.graph
        terms = masks.copy() if sparse else graph.real & ~masks
        if sparse and prepared.interchange:
            _drop_unreached(graph, terms, coupled=prepared.adapter.family.post_attn_norm is not None)
        return cls(graph, terms, sparse, np.flatnonzero(terms.any(axis=(0, 2))), np.asarray(terms.any(axis=(0, 1))))

    def readers(self, layer: int, kind: str) -> np.ndarray:
        """Indices of the active readers of a layer."""
        readers = self.graph.readers(layer, kind)
        return np.asarray(readers.start + np.flatnonzero(self.active[readers]))

    def runs(self, layer: int, kind: str) -> bool:
        """Whether any reader of this layer and kind is active."""
        return bool(self.active[self.graph.readers(layer, kind)].any())

    @cached_property
    def slots(self) -> dict[int, int]:
        """Row of `D` that each needed writer takes."""
        return {int(u): slot for slot, u in enumerate(self.writers)}


def _drop_unreached(graph: Graph, terms: np.ndarray, coupled: bool) -> None:
    """Removes the terms of nodes that nothing reaches: they carry their ablated value, so D is exactly zero.

    `coupled`: a norm on the attention's output scales all heads of a layer together, so reaching one moves them all.
    """
    for u in range(1, graph.n_writers):
        layer = graph.layer_of(u)
        if coupled and u != graph.mlp(layer):
            feeding = np.zeros(graph.n_readers, dtype=bool)
            feeding[graph.readers(layer, "qkv")] = True
        else:
            feeding = graph.serves[:, u]
        terms[:, u] &= np.asarray(terms[:, :u, feeding].any(axis=(1, 2)))[:, None]


def prefers_sparse(prepared: Prepared, masks: np.ndarray) -> bool:
    """Which form is taken: the one with fewer active readers.

    Under zero and mean ablation it is the sparse one, unless every edge is in: what is left of a stream after
    subtracting all of it is rounding noise, which a norm would blow up.
    """
    real = prepared.adapter.graph.real
    inside, outside = (edges.any(axis=(0, 1)).sum() for edges in (masks, real & ~masks))
    if not prepared.interchange:
        return bool(outside > 0)
    return bool(inside <= outside)
