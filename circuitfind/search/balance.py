"""Which edges a round of re-scored pruning drops: weak ones, together of no effect (`rescoring.py`).

Dropping the edges of smallest |gradient| bleeds the metric: most weak edges help a little, and what they give adds up.
So a round drops helpful and opposing edges together, in the proportion that leaves the metric where it should be.

Given `G[e, i]`, the gradient of pair i's metric with respect to edge e, and `r[i]`, how much of pair i's metric is to
go (what the circuit has too much, less what it lacks), both as shares of the total effect, n edges are chosen so that
the sum of their G is near r:

* **Mean** (`balanced_mean`). Only means over pairs count. Of the n edges j are the weakest that help and n - j the
  weakest that oppose; prefix sums give the best j at once.
* **Pairs** (`balanced_pairs`). The sum is near r for each pair. Start from the n edges of smallest norm over pairs.
  Then swap, as long as the norm of what is left of r falls: drop the edge that lowers it most (among the 1.6 n weakest)
  and take back the one that costs least.

The pairs are the better balance while edges are many; where no set of a hundred edges can balance every pair, the mean.
"""

from __future__ import annotations

import numpy as np

WEAK = 1.6  # times the number of dropped edges: how far up the ranking a swap may reach
SWAPS = 3000


def balanced_mean(gradients: np.ndarray, residual: np.ndarray, n: int) -> np.ndarray:
    """`[edges]` bool, n of them true: the mean of what goes is near the mean residual.

    Args:
        gradients: `[edges, pairs]`, residual: `[pairs]`, as shares of the total effect.
    """
    effect, wanted = gradients.mean(axis=1), residual.mean()
    order = np.argsort(np.abs(effect), kind="stable")
    helps, opposes = order[effect[order] >= 0], order[effect[order] < 0]
    lost, won = (np.concatenate([[0.0], effect[side].cumsum()]) for side in (helps, opposes))
    counts = np.arange(max(0, n - len(opposes)), min(n, len(helps)) + 1)
    count = int(counts[np.abs(wanted - (lost[counts] + won[n - counts])).argmin()])
    drop = np.zeros(len(gradients), dtype=bool)
    drop[helps[:count]] = drop[opposes[: n - count]] = True
    return drop


def balanced_pairs(gradients: np.ndarray, residual: np.ndarray, n: int) -> np.ndarray:
    """As `balanced_mean`, but what goes is near the residual of every pair."""
    norms = np.linalg.norm(gradients, axis=1)
    order = np.argsort(norms, kind="stable")
    drop = np.zeros(len(gradients), dtype=bool)
    drop[order[:n]] = True
    weak = np.zeros_like(drop)
    weak[order[: round(WEAK * n)]] = True
    left = residual - gradients[drop].sum(axis=0)
    for _ in range(SWAPS):
        goes = int(np.where(weak & ~drop, 2 * gradients @ left - norms**2, -np.inf).argmax())
        without = left - gradients[goes]
        stays = int(np.where(drop, -2 * gradients @ without - norms**2, -np.inf).argmax())
        swapped = without + gradients[stays]
        if drop[goes] or np.linalg.norm(swapped) >= np.linalg.norm(left) - 1e-6:
            break
        drop[goes], drop[stays], left = True, False, swapped
    return drop
