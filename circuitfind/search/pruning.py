"""Exact pruning: single edges of a circuit that it can do without, each removal run exactly.

1. Edges are tried weakest first. Runs of edges that all go are taken together and doubled; a run that may not go is
   halved.
2. What is left must stay on target, and no further from the whole model than before plus an allowance.
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
    """The circuit without what it does not need.

    Args:
        strength: `[writers, readers]`, by which edges are ordered.
        growth: how much the distance may grow by pruning, in all.
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
            if mask.sum() < best.n_edges:  # else they went with others
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
