"""The positions of the page's slider: circuits of growing size inside the whole one.

1. The circuit's edges are ranked: in the order given (`find` gives that of its scores; faithfulness is measured on
   held-out pairs), else by |effect|.
2. A cut is the strongest n edges, pruned to those on a path from `input` to `logits`. Each cut contains all smaller
   ones, so every edge has one *entry*, the smallest n whose cut contains it: the maximum of its rank, the first n that
   connects `input` to its writer, and the first n that connects its reader to `logits`. One sweep over the nodes in
   each direction gives the entries of all edges.
3. Sizes are chosen evenly on a logarithmic scale. The last is the circuit itself, or its strongest `MOST` edges if it
   is too large for a page.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from circuitfind.circuit import Circuit
from circuitfind.graph import Graph

MOST = 10_000  # edges on a page
COUNT = 16  # most sizes


class Size(NamedTuple):
    """One position of the slider: a circuit, with its faithfulness and interval if it was run exactly."""

    circuit: Circuit
    faithfulness: float | None = None
    interval: tuple[float, float] | None = None


def cuts(circuit: Circuit, order: np.ndarray | None = None, most: int = MOST, count: int = COUNT) -> list[Circuit]:
    """Return cuts of a circuit, smallest first, each contained in the next; the circuit itself is last.

    Args:
        order: `[edges, 2]` (writer, reader), best first, as from `Scores.ranked`, with every edge of the circuit. By
            default its edges by |effect|, unknown effects last.
        most: the most edges that a page holds.
        count: how many sizes to try.
    """
    ranked = _by_effect(circuit) if order is None else order[circuit.mask[order[:, 0], order[:, 1]]]
    entries = _entries(circuit.graph, ranked)
    steps, lengths = np.unique(entries[entries <= len(ranked)], return_counts=True)
    lengths = lengths.cumsum()
    steps, lengths = steps[lengths <= most], lengths[lengths <= most]
    whole = len(circuit) <= most
    largest = len(circuit) if whole else max(lengths, default=1)
    wanted = np.geomspace(1, max(largest, 1), count).tolist() if len(lengths) else []
    nearest = np.array(sorted({int(np.abs(np.log(lengths / size)).argmin()) for size in wanted}), dtype=int)
    result = [_cut(circuit, ranked[entries <= step]) for step in steps[nearest]]
    if whole:  # not pruned: the circuit itself may have unconnected edges
        return [*(cut for cut in result if len(cut) < len(circuit)), circuit]
    return result or [_cut(circuit, ranked[:most])]


def strongest(circuit: Circuit, n: int) -> Circuit:
    """The n edges of largest |effect| (exact where measured); unknown effects come last."""
    return _cut(circuit, _by_effect(circuit)[:n])


def sizes_of(circuit: Circuit, faithfulness: float | None, interval: tuple[float, float] | None) -> list[Size]:
    """The cuts of a circuit, of which only the whole circuit was run."""
    *smaller, last = cuts(circuit)
    return [*map(Size, smaller), Size(last, faithfulness, interval) if len(last) == len(circuit) else Size(last)]


def say(sizes: Sequence[Size], position: int, level: float = 0.95) -> str:
    """The text of a position: its measured faithfulness, or that of the nearest measured sizes."""
    here = sizes[position]
    if here.faithfulness is not None and math.isfinite(here.faithfulness):
        between = ""
        if here.interval is not None and all(map(math.isfinite, here.interval)):
            between = f" ({level:.0%} interval {here.interval[0]:.3g} to {here.interval[1]:.3g})"
        return f"faithfulness {here.faithfulness:.3g}{between}"
    below, above = (
        [size for size in side if size.faithfulness is not None and math.isfinite(size.faithfulness)]
        for side in (sizes[:position], sizes[position + 1 :])
    )
    near = ", ".join(f"{len(size.circuit):,} edges: {size.faithfulness:.3g}" for size in (*below[-1:], *above[:1]))
    return f"faithfulness not measured{f'; nearest measured, {near}' if near else ''}"


def _cut(circuit: Circuit, edges: np.ndarray) -> Circuit:
    mask = np.zeros_like(circuit.mask)
    mask[edges[:, 0], edges[:, 1]] = True
    return circuit.with_mask(mask)


def _entries(graph: Graph, ranked: np.ndarray) -> np.ndarray:
    """`[edges]`: for each edge of `ranked`, the least n at which the first n edges connect it to `input` and `logits`;
    `len(ranked) + 1` if none does."""
    never = len(ranked) + 1
    served = {reader: np.flatnonzero(graph.serves[reader]).tolist() for reader in set(ranked[:, 1].tolist())}
    reached, leads = [never] * graph.n_nodes, [never] * graph.n_nodes  # by node: from `input`, to `logits`
    reached[0] = leads[-1] = 0
    by_rank = [(writer, reader, rank) for rank, (writer, reader) in enumerate(ranked.tolist(), start=1)]
    by_writer = sorted(by_rank)
    for writer, reader, rank in by_writer:  # writers are numbered in order of computation
        for node in served[reader]:
            reached[node] = min(reached[node], max(rank, reached[writer]))
    onward: dict[int, int] = {}
    for writer, reader, rank in reversed(by_writer):
        onward[reader] = min(leads[node] for node in served[reader])
        leads[writer] = min(leads[writer], max(rank, onward[reader]))
    return np.array([max(rank, reached[writer], onward[reader]) for writer, reader, rank in by_rank], dtype=int)


def _by_effect(circuit: Circuit) -> np.ndarray:
    rows = sorted(circuit.rows(), key=lambda row: (row.effect is None, -abs(row.effect or 0.0)))
    return np.array([(row.writer, row.reader) for row in rows], dtype=int).reshape(-1, 2)
