"""Exact pruning: remove edges that a circuit can do without, with an exact run for each removal.

1. Edges are tried weakest first, in groups. After a removal that is accepted the next group is twice as large, after
   one that is not, half as large.
2. A removal is accepted if the distance from the whole model grows by no more than an allowance, over all removals, and
   the circuit stays on target (or, if it was off target, comes no further from it).
"""

from __future__ import annotations

import math

import numpy as np

from circuitfind.circuit import connected
from circuitfind.progress import progress
from circuitfind.search.trials import Trials, Tried

OVER = 1.005  # smallest faithfulness that is reported as an overshoot
FREE = 0.01  # the default allowance


def pruned(trials: Trials, start: Tried, strength: np.ndarray, growth: float, most: float = math.inf) -> Tried:
    """Return the circuit without the edges that it does not need.

    Args:
        strength: `[writers, readers]`; weaker edges are tried first.
        growth: how much all removals together may add to the distance from the whole model.
        most: the most circuits to run.
    """
    limit = min(start.distance + growth, max(trials.tolerance, start.distance))
    edges = np.argwhere(start.mask.T)[:, ::-1]  # reader by reader, the graph's order
    order = edges[np.argsort(strength[tuple(edges.T)], kind="stable")]
    best, run, at, tries = start, 1, 0, 0
    with progress("pruning", len(order)) as advance:
        while at < len(order) and tries < most:
            mask = best.mask.copy()
            mask[tuple(order[at : at + run].T)] = False
            mask, goes = connected(trials.graph, mask), False
            if mask.sum() < best.n_edges:  # else all of them are already removed
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
        trials.say("pruning", f"faithfulness is {over:.3f} above 1: the circuit leaves out edges that oppose the task")
    return best
