"""The circuits that a search has run: each once, exactly, with how far it is from the whole model.

The distance is 0 where a circuit does what the whole model does. A criterion says which difference counts:

    mean      |1 - faithfulness|, of the mean metric over pairs
    at-least  the same, but only where the circuit does less than the model
    pairs     mean over pairs of |circuit - model|, over the mean of |model - empty circuit|: a mean that is right
              because errors of single pairs cancel is not enough
    kl        KL(whole model || circuit), over that of the empty circuit

A circuit is on target where the distance is at most the tolerance on *each half* of the search pairs (`FOLDS`; with
few pairs, on all of them): a search takes the smallest circuit on target, which is the luckiest one, too.
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
ROUNDING = 1e-9  # 1 - 0.85 is above 0.15
FOLDS, LEAST = 2, 4  # halves, of at least so many pairs each


class Tried(NamedTuple):
    """A circuit that was run: its mask, what came out `[pairs]`, and its distance from the whole model."""

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
    """How long a call may take in all (`limit`, in seconds; None: as long as it takes)."""

    def __init__(self, limit: float | None) -> None:
        self.limit, self.started = limit, time.monotonic()

    def left(self, part: float = 1.0) -> float:
        """Seconds that are left of a part of the limit."""
        if self.limit is None:
            return float("inf")
        return processes.same(part * self.limit - (time.monotonic() - self.started))


def distance(criterion: str, outcome: Outcome, ends: Outcome, pairs: np.ndarray | slice = slice(None)) -> float:
    """How far a circuit is from the whole model on some of the pairs.

    Args:
        outcome: of the circuit, `[pairs]`; ends: of the whole model and the empty circuit, `[2, pairs]`.
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
    """Runs circuits on the search pairs, and keeps what came out."""

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
        """The circuit of a mask, run unless it was run before; `late`: whatever the time.

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
        """Runs what is no candidate, such as the model without a node: it is not kept, and on no frontier.

        Raises:
            OutOfTime: the time limit has passed.
        """
        self.check_time()
        return self._tried(mask, self.evaluator.run(mask[None]).of(0))

    def check_time(self) -> None:
        """Raises `OutOfTime` where the time limit has passed."""
        if self.deadline.left(self.part) <= 0:
            raise OutOfTime

    def whole(self) -> Tried:
        """The whole model, which needs no run."""
        return self._tried(self.graph.real.copy(), self.evaluator.ends.of(0))

    def empty(self) -> Tried:
        """The circuit without edges, which needs no run either."""
        return self._tried(np.zeros_like(self.graph.real), self.evaluator.ends.of(1))

    def _tried(self, mask: np.ndarray, outcome: Outcome) -> Tried:
        worst = max(distance(self.criterion, outcome, self.evaluator.ends, fold) for fold in self.folds)
        return Tried(mask, outcome, worst, float(self.evaluator.faithfulness(outcome.metric)))

    def meets(self, tried: Tried) -> bool:
        """Whether a circuit is on target."""
        return tried.distance <= self.tolerance + ROUNDING

    def every(self) -> list[Tried]:
        """All that were run, smallest first."""
        return sorted(self._known.values(), key=lambda tried: (tried.n_edges, tried.distance))

    def say(self, stage: str, text: str) -> None:
        self.steps.append(Step(stage, text))

    def stop(self, why: str, unfinished: str = "") -> None:
        """Says that the search ends early, and what it has not done."""
        count = len(self._known)
        self.stopped = f"{why}: the search ends after {count} circuit{'' if count == 1 else 's'}{unfinished}"
        self.say("stopped", self.stopped)
        warn(self.stopped)

    def affords(self, part: float = 1.0) -> float:
        """How many runs of a circuit fit in a part of the time that is left."""
        average = self._seconds / max(1, len(self._known))
        return part * max(self.deadline.left(), 0.0) / max(processes.same(average), 1e-9)
