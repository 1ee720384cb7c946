"""ACDC's rule: in which order edges are tried, when one goes, and which go untested.

The circuit depends on the order (Chen et al. 2024), so every order has a name and a seed. The reverse-topological ones
go through the readers from `logits` back to layer 0; in a layer the MLP comes first, then the attention's v, k and q
readers, each from the last head to the first. They differ in a reader's own edges:

* `reverse-topological`: latest writers first, as in the original code.
* `reverse-topological-earliest`: earliest writers first.
* `reverse-topological-shuffled`: in a random order, drawn with the seed.
* `shuffled`: all edges in a random order; no topology.
* `scores`: all edges, smallest |score| first; needs `scores=`.

With screening, edges whose estimated effect is far below the threshold go untested, and a sample of them is checked:

1. An edge is screened if |estimate| < factor * threshold. When its turn comes it goes; what is left is measured, so the
   edges that are tested are compared with the circuit as it is.
2. Afterwards some of the edges that went so, drawn at random, are measured exactly, each *in the circuit at the moment
   it was removed*: all decisions before it made, none after it. One that ACDC's rule would have kept is a wrong skip.
3. The rate of wrong skips among all skipped edges lies in Wilson's score interval (1927), at 95%.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from numbers import Real
from typing import Any, NamedTuple

import numpy as np

from circuitfind.errors import ScoreError
from circuitfind.evaluation.faithfulness import Evaluator
from circuitfind.graph import Graph
from circuitfind.scores import Scores
from circuitfind.statistics import Interval

Edge = tuple[int, int]  # writer, reader
ORDERS = ("reverse-topological", "reverse-topological-earliest", "reverse-topological-shuffled", "shuffled", "scores")
# How an edge is decided.
TESTED = "tested"
CUT_OFF = "reader cut off from the logits"
UNREACHED = "writer carries its ablated value"
DANGLING = "writer left dangling"
SCREENED = "screened"
REASONS = (TESTED, CUT_OFF, UNREACHED, DANGLING, SCREENED)

CHECKED = 100  # skipped edges that are measured, or all if there are fewer
Z = 1.959964  # of the standard normal distribution, for 95%


class Decision(NamedTuple):
    """What was decided of an edge: its effect at that moment (NaN: not measured), whether it stays, and how."""

    edge: Edge
    effect: float
    kept: bool
    how: str


@dataclass(frozen=True, eq=False)
class Rule:
    """An edge goes if its effect (or the effect's magnitude) is strictly below the threshold.

    Attributes:
        dangling: whether what nodes without inputs write goes, too: None, "tested" or "untested".
        screened: `[writers, readers]` bool, edges that go without a test; None for none.
    """

    threshold: float
    absolute: bool = False
    dangling: str | None = None
    screened: np.ndarray | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.threshold, Real) or math.isnan(self.threshold):
            raise ScoreError(f"threshold={self.threshold!r} is not a threshold: give a number in units of the metric")
        if self.absolute and self.threshold <= 0:
            raise ScoreError(
                f"threshold={self.threshold!r}: no |effect| is below it, so every edge would stay: give a positive"
                " number, or leave absolute out"
            )

    def _size(self, effect: float) -> float:
        return abs(effect) if self.absolute else effect

    def goes(self, effect: float) -> bool:
        """Whether an edge of this effect is removed."""
        return self._size(effect) < self.threshold

    def close(self, effect: float, rounding: float) -> bool:
        """Whether rounding, of either of the two metrics that differ by the effect, may turn the decision."""
        return abs(self._size(effect) - self.threshold) <= 2 * rounding

    def screens(self, edge: Edge) -> bool:
        """Whether the edge goes without a test."""
        return self.screened is not None and bool(self.screened[edge])


def mask_after(real: np.ndarray, decisions: Iterable[Decision]) -> np.ndarray:
    """`[writers, readers]` bool: what is left of all edges after some decisions."""
    mask = real.copy()
    for edge, _, kept, _ in decisions:
        mask[edge] = kept
    return mask


# -------------------------------------------------------------------- orders
def edges_in_order(graph: Graph, order: str | Sequence[str], seed: int = 0, scores: Scores | None = None) -> list[Edge]:
    """Every edge, in the order in which they are tried.

    Args:
        order: a name of `ORDERS`, or the edges' names themselves (then only these are tried).

    Raises:
        ScoreError: unknown order, or no scores for `scores`.
        FileError: a list names an edge that the graph lacks.
    """
    if not isinstance(order, str):
        return [graph.edge(name) for name in order]
    if order not in ORDERS:
        raise ScoreError(f"order '{order}' is unknown: use one of {', '.join(ORDERS)}, or a list of edge names")
    rng = np.random.default_rng(seed)
    if order == "scores":
        if not isinstance(scores, Scores) or scores.graph != graph:
            raise ScoreError("order='scores' needs scores=: edge scores that attribute() computed for this model")
        return [(int(u), int(r)) for u, r in scores.ranked("absolute")[::-1]]
    readers = reversed(range(graph.n_readers))
    backwards = [(writer, reader) for reader in readers for writer in _writers(int(graph.limits[reader]), order, rng)]
    return [backwards[i] for i in rng.permutation(len(backwards))] if order == "shuffled" else backwards


def _writers(count: int, order: str, rng: np.random.Generator) -> list[int]:
    """The writers of a reader's own edges."""
    if order.endswith("-shuffled"):
        return [int(writer) for writer in rng.permutation(count)]
    return list(range(count) if order.endswith("-earliest") else reversed(range(count)))


# -------------------------------------------------------------------- screening
def screened(scores: Scores | None, factor: float, threshold: float, evaluator: Evaluator) -> np.ndarray:
    """`[writers, readers]` bool: the edges whose estimate is far below the threshold; a ScoreError without
    estimates, with those of something else, or a factor that is not positive."""
    if not isinstance(scores, Scores) or scores.graph != evaluator.graph or not scores.record.is_effect:
        raise ScoreError("screen= needs scores=: effects of edges that attribute() estimated for this model")
    if not isinstance(factor, Real) or not 0 < factor <= 1:
        remedy = "give a number above 0, at most 1, such as 0.1"
        raise ScoreError(f"screen={factor!r} is not a part of the threshold: {remedy}")
    for name in ("metric", "ablation"):
        made, now = getattr(scores.record, name), getattr(evaluator.record, name)
        if made and made != now:
            raise ScoreError(
                f"scores= estimate effects with {name} '{made}', the edges are tried with '{now}': screening compares"
                f" the two, so make the scores with {name}='{now}', or give acdc {name}='{made}'"
            )
    return (np.abs(scores.values) < factor * threshold) & scores.graph.real


@dataclass(frozen=True)
class SkipCheck:
    """Exact effects of some skipped edges in the circuits in which they were skipped, and which of them should stay."""

    skipped: int
    effects: dict[Edge, float]
    wrong: tuple[Edge, ...]

    @classmethod
    def of(cls, evaluator: Evaluator, rule: Rule, decisions: list[Decision]) -> SkipCheck:
        """Measures a sample of the skipped edges, drawn with the evaluator's seed."""
        skipped = [at for at, decision in enumerate(decisions) if decision.how == SCREENED]
        drawn = np.random.default_rng(evaluator.seed).permutation(len(skipped))[:CHECKED]
        effects: dict[Edge, float] = {}
        for at in sorted(skipped[i] for i in drawn):
            edge, before = decisions[at].edge, mask_after(evaluator.graph.real, decisions[:at])
            after = before.copy()
            after[edge] = False
            with_it, without = evaluator.run(np.stack([before, after])).metric.mean(-1)
            effects[edge] = float(with_it - without)
        wrong = tuple(edge for edge, effect in effects.items() if not rule.goes(effect))
        return cls(len(skipped), effects, wrong)

    @property
    def interval(self) -> Interval:
        """Of the rate of wrong skips; exactly the rate where all skipped edges were measured."""
        found, size = len(self.wrong), len(self.effects)
        if size == self.skipped:
            return Interval(self.rate, self.rate)
        centre, half = found + Z**2 / 2, Z * math.sqrt(found * (size - found) / size + Z**2 / 4)
        return Interval(max(0.0, (centre - half) / (size + Z**2)), min(1.0, (centre + half) / (size + Z**2)))

    @property
    def rate(self) -> float:
        """Wrong skips among those measured; NaN where nothing was skipped."""
        return len(self.wrong) / len(self.effects) if self.effects else float("nan")

    def facts(self, graph: Graph) -> dict[str, Any]:
        """JSON values."""
        wrong = [{"edge": graph.edge_name(*edge), "effect": self.effects[edge]} for edge in self.wrong]
        rate = {"rate": self.rate, "interval": list(self.interval)} if self.effects else {}
        return {"skipped": self.skipped, "checked": len(self.effects), "wrong": wrong, **rate}
