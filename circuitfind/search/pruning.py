"""Exact pruning: remove the edges that a circuit does not need, and run the circuit after each removal.

1. Edges are tried in groups, weakest first. The group size starts at 1, doubles after each removal and halves when a
   group has to stay; an edge that has to stay on its own is skipped.
2. A removal is accepted if the circuit stays on target, and its distance from the whole model grows by no more than an
   allowance in all. If the circuit starts off target, the distance may not grow.
"""

from __future__ import annotations

import math

import numpy as np

from circuitfind.circuit import connected
from circuitfind.progress import progress
from circuitfind.search.trials import Trials, Tried

OVER = 1.005  # less is rounding
FREE = 0.01  # of the total effect: what is lost without an edge that is not needed


def pruned(trials: Trials, start: Tried, strength: np.ndarray, growth: float, most: float = math.inf) -> Tried:
    """Return the circuit without the edges that it does not need.

    Args:
        strength: `[writers, readers]`; the weakest edges are tried first.
        growth: how much pruning may add to the distance, in all.
        most: circuits to run at most.
    """
    limit = min(start.distance + growth, max(trials.tolerance, start.distance))
    edges = np.argwhere(start.mask.T)[:, ::-1]  # reader by reader, as the graph's order is
    order = edges[np.argsort(strength[tuple(edges.T)], kind="stable")]
    best, run, at, tries = start, 1, 0, 0
    with progress("pruning", len(order)) as advance:
        while at < len(order) and tries < most:
            mask = best.mask.copy()
            mask[tuple(order[at : at + run].T)] = False
            mask, goes = connected(trials.graph, mask), False
            if mask.sum() < best.n_edges:  # otherwise earlier removals disconnected them
                tried, tries = trials.run(mask, "pruning"), tries + 1
                goes = tried.distance <= limit
                best = tried if goes else best
            else:
                goes = True
            if run == 1 or goes:
                advance(min(run, len(order) - at))
                at += run
            run = 2 * run if goes else max(1, run // 2)
    change = f"faithfulness {start.faithfulness:.3f} -> {best.faithfulness:.3f}"
    trials.say("pruning", f"{start.n_edges - best.n_edges} of {start.n_edges} edges removed; {change}")
    if best.faithfulness > OVER:
        over = best.faithfulness - 1
        trials.say("pruning", f"overshoot of {over:.3f}: edges that oppose the behaviour are left out")
    return best
