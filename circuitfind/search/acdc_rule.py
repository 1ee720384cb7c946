"""ACDC's rule: the order in which edges are tried, which of them are removed, and which are removed without a test.

The circuit depends on the order (Chen et al. 2024), so every order has a name and a seed. The reverse-topological ones
go through the readers from `logits` back to layer 0; within a layer the MLP comes first, then the v, k and q inputs,
each from the last head to the first. They differ in the order of the edges into one reader:

* `reverse-topological`: latest writers first, as in the original code.
* `reverse-topological-earliest`: earliest writers first.
* `reverse-topological-shuffled`: writers in a random order, drawn with the seed.
* `shuffled`: all edges in a random order, drawn with the seed.
* `scores`: all edges, smallest |score| first; needs `scores=`.

With screening, edges whose estimated effect is far below the threshold are skipped: removed without a test. A sample of
them is checked.

1. An edge is screened if |estimate| < factor * threshold. It is removed when its turn comes. The circuit that is left
   is then measured, so that the next test compares with the current circuit.
2. Afterwards the effects of some skipped edges, drawn at random, are measured exactly, each *in the circuit from which
   it was removed*, after all earlier decisions and before all later ones. A skip is wrong if the rule would have kept
   the edge.
3. The rate of wrong skips among all skipped edges has Wilson's score interval (1927), at 95%.
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
# how an edge is decided
TESTED = "tested"
CUT_OFF = "reader cut off from the logits"
UNREACHED = "writer carries its ablated value"
DANGLING = "writer left dangling"
SCREENED = "screened"
REASONS = (TESTED, CUT_OFF, UNREACHED, DANGLING, SCREENED)

CHECKED = 100  # the most skipped edges that are measured
Z = 1.959964  # the 97.5th percentile of the standard normal distribution


class Decision(NamedTuple):
    """A decision about an edge: its effect in the circuit of that moment (NaN: not measured), whether it is kept, and
    how this was decided (one of `REASONS`)."""

    edge: Edge
    effect: float
    kept: bool
    how: str


@dataclass(frozen=True, eq=False)
class Rule:
    """An edge is removed if its effect (with `absolute`, the effect's magnitude) is strictly below the threshold.

    Attributes:
        dangling: whether nodes without inputs lose their outgoing edges: None, "tested" or "untested" (as for `acdc`).
        screened: `[writers, readers]` bool, edges that are removed without a test; None for none.
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
        """Whether an edge with this effect is removed."""
        return self._size(effect) < self.threshold

    def close(self, effect: float, rounding: float) -> bool:
        """Whether rounding could reverse the decision. The effect is a difference of two metrics, each off by up to
        `rounding`."""
        return abs(self._size(effect) - self.threshold) <= 2 * rounding

    def screens(self, edge: Edge) -> bool:
        """Whether the edge is removed without a test."""
        return self.screened is not None and bool(self.screened[edge])


def mask_after(real: np.ndarray, decisions: Iterable[Decision]) -> np.ndarray:
    """Return the circuit after some decisions, `[writers, readers]` bool: all real edges without the removed ones."""
    mask = real.copy()
    for edge, _, kept, _ in decisions:
        mask[edge] = kept
    return mask


# -------------------------------------------------------------------- orders
def edges_in_order(graph: Graph, order: str | Sequence[str], seed: int = 0, scores: Scores | None = None) -> list[Edge]:
    """Return the edges in the order in which they are tried.

    Args:
        order: a name of `ORDERS`, or a list of edge names (then only these are tried).

    Raises:
        ScoreError: the order is unknown, or "scores" without edge scores of this graph.
        FileError: a name in the list is not an edge of the graph.
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
    """Return the first `count` writers, those of one reader's edges, in the order of trial."""
    if order.endswith("-shuffled"):
        return [int(writer) for writer in rng.permutation(count)]
    return list(range(count) if order.endswith("-earliest") else reversed(range(count)))


# -------------------------------------------------------------------- screening
def screened(scores: Scores | None, factor: float, threshold: float, evaluator: Evaluator) -> np.ndarray:
    """Return the edges with |estimate| < factor * threshold, `[writers, readers]` bool.

    Raises:
        ScoreError: the scores are not estimated effects of this graph's edges, with the evaluator's metric and
            ablation; or the factor is not in (0, 1].
    """
    if not isinstance(scores, Scores) or scores.graph != evaluator.graph or not scores.record.is_effect:
        raise ScoreError("screen= needs scores=: effects of edges that attribute() estimated for this model")
    if not isinstance(factor, Real) or not 0 < factor <= 1:
        raise ScoreError(f"screen={factor!r} is not a fraction of the threshold: give a number in (0, 1], such as 0.1")
    for name in ("metric", "ablation"):
        made, now = getattr(scores.record, name), getattr(evaluator.record, name)
        if made and made != now:
            raise ScoreError(
                f"scores= estimate effects with {name} '{made}', but acdc tries edges with '{now}': compute the scores"
                f" with {name}='{now}', or give acdc {name}='{made}'"
            )
    return (np.abs(scores.values) < factor * threshold) & scores.graph.real


@dataclass(frozen=True)
class SkipCheck:
    """How good the screening was.

    Attributes:
        skipped: number of edges that were removed without a test.
        effects: exact effects of a sample of them, each in the circuit from which the edge was removed.
        wrong: the edges of the sample that the rule would have kept.
    """

    skipped: int
    effects: dict[Edge, float]
    wrong: tuple[Edge, ...]

    @classmethod
    def of(cls, evaluator: Evaluator, rule: Rule, decisions: list[Decision]) -> SkipCheck:
        """Measure a sample of the skipped edges, drawn with the evaluator's seed."""
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
        """The 95% interval of the rate of wrong skips; the rate itself if all skipped edges were measured."""
        found, size = len(self.wrong), len(self.effects)
        if size == self.skipped:
            return Interval(self.rate, self.rate)
        centre, half = found + Z**2 / 2, Z * math.sqrt(found * (size - found) / size + Z**2 / 4)
        return Interval(max(0.0, (centre - half) / (size + Z**2)), min(1.0, (centre + half) / (size + Z**2)))

    @property
    def rate(self) -> float:
        """The fraction of wrong skips among the measured ones; NaN if no edge was skipped."""
        return len(self.wrong) / len(self.effects) if self.effects else float("nan")

    def facts(self, graph: Graph) -> dict[str, Any]:
        """Return the check as JSON values."""
        wrong = [{"edge": graph.edge_name(*edge), "effect": self.effects[edge]} for edge in self.wrong]
        rate = {"rate": self.rate, "interval": list(self.interval)} if self.effects else {}
        return {"skipped": self.skipped, "checked": len(self.effects), "wrong": wrong, **rate}
