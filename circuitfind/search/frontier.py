"""The frontier of a search: for each size the circuit nearest to the whole model; and the choice of the result.

1. A circuit is on the frontier if it is nearer to the whole model than every smaller circuit that was run, by the
   criterion of the search or by the error of single pairs.
2. Up to 16 circuits of the frontier are also run on the held-out pairs, if there is time.
3. The result is the smallest circuit on target; or, if a number of edges was asked for, the nearest circuit of at most
   that many edges.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from circuitfind.evaluation.faithfulness import Evaluator, Outcome
from circuitfind.progress import track
from circuitfind.search.found import FrontierPoint
from circuitfind.search.trials import Trials, Tried, distance

MOST = 16  # points


def nearest(trials: Trials) -> list[Tried]:
    """Return the circuits on the frontier, smallest first."""
    found: list[Tried] = []
    best = np.full(2, np.inf)
    for one in trials.every():
        far = np.array([one.distance, distance("pairs", one.outcome, trials.evaluator.ends)])
        new = one.n_edges > (found[-1].n_edges if found else 0)  # the first of each size is the nearest
        if new and (far < best).any():
            found.append(one)
            best = np.minimum(best, far)
    return found


def chosen(trials: Trials, edges: int | None) -> Tried:
    """Return the result of the search; the whole model if no smaller circuit is on target. If `edges` is given and no
    circuit is as small, return the smallest that was run.
    """
    points = nearest(trials)
    if edges is not None:
        small = [one for one in points if one.n_edges <= edges] or points[:1]
        return min(small, key=lambda one: one.distance, default=trials.whole())
    return next((one for one in points if trials.meets(one)), trials.whole())


def measured(
    trials: Trials, taken: Tried, values: np.ndarray | None, held_out: Evaluator | None
) -> tuple[FrontierPoint, ...]:
    """Return the frontier's points, and that of `taken`, the result.

    Args:
        values: `[writers, readers]` estimated effects; None if the scores are no effects.
        held_out: the evaluator of the held-out pairs; None if there is no time to run circuits on them.
    """
    points = _thinned(nearest(trials), taken)
    return tuple(_point(trials, one, values, held_out) for one in track(points, "frontier"))


def _thinned(points: Sequence[Tried], taken: Tried) -> list[Tried]:
    """Return at most `MOST` of the points, evenly spread, and the result."""
    kept = np.linspace(0, len(points) - 1, min(MOST, len(points))).round().astype(int).tolist()
    found = [points[at] for at in kept]
    if not any(np.array_equal(one.mask, taken.mask) for one in found):
        found.append(taken)
    return sorted(found, key=lambda one: one.n_edges)


def _point(trials: Trials, one: Tried, values: np.ndarray | None, held_out: Evaluator | None) -> FrontierPoint:
    opposing = None if values is None else int((values[one.mask] < 0).sum())
    here = _measures(trials.evaluator, one.outcome)
    there, far = (np.nan,) * 4, np.nan
    if held_out is not None:
        outcome = held_out.run(one.mask[None]).of(0)
        there, far = _measures(held_out, outcome), distance(trials.criterion, outcome, held_out.ends)
    return FrontierPoint(one.n_edges, opposing, one.distance, *here, far, *there)


def _measures(evaluator: Evaluator, outcome: Outcome) -> tuple[float, float, float, float]:
    """Return faithfulness, error of single pairs, KL divergence and accuracy."""
    off, right = distance("pairs", outcome, evaluator.ends), float(evaluator.share(outcome.accurate))
    return float(evaluator.faithfulness(outcome.metric)), off, float(outcome.kl.mean()), right
