"""The size search: the smallest n for which the circuit of the top n edges of a ranking is on target.

1. **Grid**: run circuits of the top 1, 2, 4, ... edges (pruned to connected edges) exactly, up to the first size that
   is on target, or on the other side of the target than the size before it. (Faithfulness is not monotone in size.)
2. **Bisection** between these two sizes, towards the smallest size on target. If there is none, the grid continues.
"""

from __future__ import annotations

from circuitfind.progress import track
from circuitfind.scores import By, Scores
from circuitfind.search.trials import Trials, Tried


class SizeSearch:
    """The search over sizes of one ranking."""

    def __init__(self, trials: Trials, scores: Scores, by: By) -> None:
        self.trials, self.scores, self.by = trials, scores, by

    def _top(self, n: int, stage: str) -> Tried:
        """Run the circuit of the top n edges."""
        return self.trials.run(self.scores.top(n, self.by).mask, stage, n)

    def _over(self, tried: Tried) -> bool:
        """Whether a circuit is off target because it does more than the whole model."""
        return tried.faithfulness > 1 and not self.trials.meets(tried)

    def smallest(self, edges: int | None = None) -> Tried:
        """Return the smallest circuit on target among those of the grid and the bisections; if there is none, the whole
        model. With `edges`, run the grid up to that size and return the circuit of the top `edges` edges.
        """
        last = min(edges or self.scores.graph.n_edges, self.scores.graph.n_edges)
        sizes = [2**k for k in range((last - 1).bit_length())] + [last]
        before, over_before = 0, False
        for n in track(sizes, "search over sizes"):
            tried = self._top(n, "grid")
            best, over = (tried if self.trials.meets(tried) else None), self._over(tried)
            what = f"the top {n} edges ({tried.n_edges} connected)"
            if best is not None:
                self.trials.say("grid", f"{what} reach faithfulness {tried.faithfulness:.3f}: on target")
            elif over:
                self.trials.say("grid", f"{what} overshoot: faithfulness {tried.faithfulness:.3f}")
            if edges is None and (best is not None or over != over_before):
                best = self._bisect(before, over_before, n, best)
                if best is not None:
                    return best
            before, over_before = n, over
        return self._top(last, "grid")

    def _bisect(self, low: int, low_is_over: bool, high: int, best: Tried | None) -> Tried | None:
        """Bisect (low, high] towards the smallest size on target; return the circuit, or None if no size is on target.

        Args:
            low_is_over: whether `low` overshoots the target; `high` is on the other side of it, or on target.
            best: the circuit at `high` if that is on target.
        """
        found = high
        while high - low > 1:
            middle = (low + high) // 2
            tried = self._top(middle, "bisection")
            if self.trials.meets(tried):
                best, found, high = tried, middle, middle
            elif self._over(tried) == low_is_over:
                low = middle
            else:
                high = middle
        if best is not None:
            said = f"the smallest size on target is the top {found} edges ({best.n_edges} connected)"
        else:
            said = f"faithfulness jumps over the target between {low} and {high} edges: the grid continues"
        self.trials.say("bisection", said)
        return best
