"""The search over circuit sizes, and the pruning of its result: steps 3 to 5 of `find`.

Faithfulness is not monotone in size, so nothing here assumes it: sizes 1, 2, 4, ... are run exactly, the first interval
in which the target can lie is bisected, and where it holds no size on target the grid goes on. Every circuit that was
run is on record, and every decision in words.
"""

from __future__ import annotations

import hashlib

import numpy as np

from circuitfind.circuit import connected
from circuitfind.evaluation.faithfulness import Evaluator
from circuitfind.progress import progress, track
from circuitfind.scores import By, Scores
from circuitfind.search.found import Step, TriedCircuit


class SizeSearch:
    """The search over sizes and the pruning, with every circuit that was run on record."""

    def __init__(self, evaluator: Evaluator, scores: Scores, by: By, tolerance: float, one_sided: bool) -> None:
        self.evaluator, self.scores, self.graph, self.by = evaluator, scores, scores.graph, by
        self.tolerance, self.one_sided = tolerance, one_sided
        self.curve: list[TriedCircuit] = []
        self.steps: list[Step] = []
        self._known: dict[bytes, float] = {}

    # ---------------------------------------------------------------- measuring
    def faithfulness_of(self, mask: np.ndarray) -> float:
        """Exact faithfulness, run once per distinct circuit."""
        key = hashlib.blake2b(np.packbits(mask).tobytes()).digest()
        if key not in self._known:
            metric = self.evaluator.run(mask[None]).metric
            self._known[key] = float(self.evaluator.faithfulness(metric)[0])
        return self._known[key]

    def _top(self, n: int, stage: str) -> tuple[np.ndarray, float]:
        mask = self.scores.top(n, self.by).mask
        value = self.faithfulness_of(mask)
        self.curve.append(TriedCircuit(stage, n, int(mask.sum()), value))
        return mask, value

    def meets(self, value: float) -> bool:
        """Whether a faithfulness is on target."""
        return value >= 1 - self.tolerance and (self.one_sided or value <= 1 + self.tolerance)

    # ---------------------------------------------------------------- the right size
    def smallest(self) -> np.ndarray:
        """Mask of the smallest top-n circuit on target that the grid and the bisections see."""
        sizes = [2**k for k in range((self.graph.n_edges - 1).bit_length())] + [self.graph.n_edges]
        before, over_before = 0, False
        for n in track(sizes, "search over sizes"):
            tried, value = self._top(n, "grid")
            best, over = (tried if self.meets(value) else None), value > 1 + self.tolerance
            what = f"the top {n} edges ({tried.sum()} connected)"
            if best is not None:
                self._say("grid", f"{what} reach faithfulness {value:.3f}: on target")
            elif over:
                self._say("grid", f"{what} overshoot: faithfulness {value:.3f}")
            if best is not None or over != over_before:
                best = self._bisect(before, over_before, n, best)
                if best is not None:
                    return best
            before, over_before = n, over
        return self.graph.real.copy()  # the full graph has faithfulness 1: the grid always ends there

    def _bisect(self, low: int, low_is_over: bool, high: int, best: np.ndarray | None) -> np.ndarray | None:
        """Halves (low, high] towards the smallest size on target, or where the target is crossed first.

        Args:
            low_is_over: `low` overshoots, otherwise it undershoots; `high` is on the other side, or on target.
            best: the circuit at `high` if that is on target.
        """
        found = high
        while high - low > 1:
            middle = (low + high) // 2
            mask, value = self._top(middle, "bisection")
            if self.meets(value):
                best, found, high = mask, middle, middle
            elif (value > 1 + self.tolerance) == low_is_over:
                low = middle
            else:
                high = middle
        if best is not None:
            self._say("bisection", f"the smallest size on target is the top {found} edges ({best.sum()} connected)")
        else:
            self._say("bisection", f"faithfulness jumps over the target between {low} and {high} edges: going on")
        return best

    # ---------------------------------------------------------------- pruning
    def pruned(self, mask: np.ndarray, growth: float) -> np.ndarray:
        """Removes edges, weakest first, within the tolerance."""
        start = self.faithfulness_of(mask)
        limit = min(abs(1 - start) + growth, max(self.tolerance, abs(1 - start)))
        ranked = self.scores.ranked(self.by)
        order = ranked[mask[ranked[:, 0], ranked[:, 1]]][::-1]
        before, run, at = int(mask.sum()), 1, 0
        with progress("pruning", len(order)) as advance:
            while at < len(order):
                trial = mask.copy()
                trial[tuple(order[at : at + run].T)] = False
                trial = connected(self.graph, trial)
                value = self.faithfulness_of(trial)
                goes = abs(1 - value) <= limit and (self.meets(value) or not self.meets(start))
                if goes and trial.sum() < mask.sum():
                    mask = trial
                    self.curve.append(TriedCircuit("pruning", int(mask.sum()), int(mask.sum()), value))
                if run == 1 or goes:
                    advance(min(run, len(order) - at))
                    at += run
                run = 2 * run if goes else max(1, run // 2)
        value = self.faithfulness_of(mask)
        self._say(
            "pruning", f"{before - int(mask.sum())} of {before} edges removed; faithfulness {start:.3f} -> {value:.3f}"
        )
        if value > 1:
            self._say("pruning", f"overshoot of {value - 1:.3f}: edges that oppose the behaviour are left out")
        return mask

    def _say(self, stage: str, text: str) -> None:
        self.steps.append(Step(stage, text))
