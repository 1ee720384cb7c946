"""The circuits that a search has run, each exactly and only once, with their distances from the whole model.

The distance is 0 if a circuit does the same as the whole model, and about 1 for the empty circuit. The criterion
defines it:

    mean      |1 - faithfulness|, where faithfulness is a ratio of means over pairs
    at-least  max(0, 1 - faithfulness): a circuit may do more than the model
    pairs     mean over pairs of |circuit - model|, divided by the mean of |model - empty circuit|: errors of opposite
              sign do not cancel
    kl        KL(whole model || circuit), divided by that of the empty circuit

A circuit is on target if its distance is at most the tolerance on *each half* of the search pairs (`FOLDS`; with few
pairs, on all of them together). A search takes the smallest circuit on target, and the smallest of many may be on
target by chance; it is less likely to be so on both halves.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Sequence
from typing import Literal, NamedTuple, get_args

import numpy as np

from circuitfind import processes
from circuitfind.errors import warn
from circuitfind.evaluation.faithfulness import Evaluator, Outcome
from circuitfind.search.found import Step, TriedCircuit

Criterion = Literal["mean", "at-least", "pairs", "kl"]
CRITERIA: tuple[str, ...] = get_args(Criterion)
ROUNDING = 1e-9  # in floating point 1 - 0.85 is larger than 0.15
FOLDS, LEAST = 2, 4  # parts of the search pairs, and the fewest pairs in each


class Tried(NamedTuple):
    """A circuit that was run: mask `[writers, readers]`, outcome `[pairs]`, distance from the whole model (on the worse
    half of the pairs), faithfulness."""

    mask: np.ndarray
    outcome: Outcome
    distance: float
    faithfulness: float

    @property
    def n_edges(self) -> int:
        return int(self.mask.sum())


class OutOfTime(Exception):
    """The time limit of a search has passed."""


class Deadline:
    """The time limit of a call, in seconds from now; None: no limit."""

    def __init__(self, limit: float | None) -> None:
        self.limit, self.started = limit, time.monotonic()

    def left(self, part: float = 1.0) -> float:
        """Return the seconds that are left of this fraction of the limit; the same in all processes."""
        if self.limit is None:
            return float("inf")
        return processes.same(part * self.limit - (time.monotonic() - self.started))


def distance(criterion: str, outcome: Outcome, ends: Outcome, pairs: np.ndarray | slice = slice(None)) -> float:
    """Return how far a circuit is from the whole model on some of the pairs (see the module docstring).

    Args:
        outcome: the circuit's, `[pairs]`.
        ends: those of the whole model and of the empty circuit, `[2, pairs]`.
        pairs: indices of the pairs that count.
    """
    full, empty = ends.metric
    if criterion == "kl":
        return float(outcome.kl[pairs].mean() / ends.kl[1].mean())
    missing = (full - outcome.metric)[pairs]
    if criterion == "pairs":
        return float(np.abs(missing).mean() / np.abs(full - empty).mean())
    share = float(missing.mean() / (full.mean() - empty.mean()))
    return max(share, 0.0) if criterion == "at-least" else abs(share)


class Trials:
    """Run circuits on the search pairs, and keep their outcomes.

    Attributes:
        part: the fraction of the time limit that the search may use.
        curve: every circuit that a stage of the search asked for, in order.
        steps: every decision, in words.
        stopped: why the search ended early; empty if it did not.
        folds: the indices of the pairs of each half.
    """

    def __init__(
        self, evaluator: Evaluator, criterion: str, tolerance: float, deadline: Deadline, part: float = 1.0
    ) -> None:
        self.evaluator, self.graph, self.criterion, self.tolerance = evaluator, evaluator.graph, criterion, tolerance
        self.deadline, self.part = deadline, part
        self.curve: list[TriedCircuit] = []
        self.steps: list[Step] = []
        self.stopped = ""
        self._known: dict[bytes, Tried] = {}
        self._seconds = 0.0
        n, seed = len(evaluator.full), evaluator.seed
        order = np.random.default_rng(seed).permutation(n)
        few = n < FOLDS * LEAST
        self.folds: Sequence[np.ndarray] = [np.sort(part) for part in np.array_split(order, 1 if few else FOLDS)]

    def run(self, mask: np.ndarray, stage: str, asked: int | None = None, late: bool = False) -> Tried:
        """Return the circuit of a mask, run now unless it was run before.

        Args:
            stage, asked: for `curve`.
            late: run it even if the time limit has passed.

        Raises:
            OutOfTime: the time limit has passed.
        """
        key = hashlib.blake2b(np.packbits(mask).tobytes()).digest()
        if key not in self._known:
            if not late:
                self.check_time()
            started = time.monotonic()
            self._known[key] = self._tried(mask, self.evaluator.run(mask[None]).of(0))
            self._seconds += time.monotonic() - started
        tried = self._known[key]
        self.curve.append(TriedCircuit(stage, asked or tried.n_edges, tried.n_edges, tried.faithfulness))
        return tried

    def look(self, mask: np.ndarray) -> Tried:
        """Run a circuit that is no candidate, such as the model without a node: it is not kept, nor on the frontier.

        Raises:
            OutOfTime: the time limit has passed.
        """
        self.check_time()
        return self._tried(mask, self.evaluator.run(mask[None]).of(0))

    def check_time(self) -> None:
        """Raise `OutOfTime` if the time limit has passed."""
        if self.deadline.left(self.part) <= 0:
            raise OutOfTime

    def whole(self) -> Tried:
        """Return the whole model, which needs no further run."""
        return self._tried(self.graph.real.copy(), self.evaluator.ends.of(0))

    def empty(self) -> Tried:
        """Return the circuit without edges, which needs no further run."""
        return self._tried(np.zeros_like(self.graph.real), self.evaluator.ends.of(1))

    def _tried(self, mask: np.ndarray, outcome: Outcome) -> Tried:
        worst = max(distance(self.criterion, outcome, self.evaluator.ends, fold) for fold in self.folds)
        return Tried(mask, outcome, worst, float(self.evaluator.faithfulness(outcome.metric)))

    def meets(self, tried: Tried) -> bool:
        """Whether a circuit is on target."""
        return tried.distance <= self.tolerance + ROUNDING

    def every(self) -> list[Tried]:
        """Return all circuits that were run, smallest first, and those of one size by distance."""
        return sorted(self._known.values(), key=lambda tried: (tried.n_edges, tried.distance))

    def say(self, stage: str, text: str) -> None:
        """Record a decision of the search."""
        self.steps.append(Step(stage, text))

    def stop(self, why: str, unfinished: str = "") -> None:
        """Warn that the search ends early, and record it. `unfinished`: ends the sentence with what was not done."""
        count = len(self._known)
        self.stopped = f"{why}: the search ends after {count} circuit{'' if count == 1 else 's'}{unfinished}"
        self.say("stopped", self.stopped)
        warn(self.stopped)

    def affords(self, part: float = 1.0) -> float:
        """Return how many runs of a circuit fit in this fraction of the time that is left; inf without a time limit."""
        average = self._seconds / max(1, len(self._known))
        return part * max(self.deadline.left(), 0.0) / max(processes.same(average), 1e-9)
