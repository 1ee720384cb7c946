"""Certified edges: edges that stay in (or out of) a circuit if a few pairs change (Certified Circuits, 2602.22968).

1. Each draw deletes every pair with probability `deletion`. The remaining pairs give scores, and the top edges make a
   circuit; without any pair left, it is empty.
2. The fraction of draws whose circuit contains an edge estimates a probability, with a Clopper-Pearson interval that is
   corrected for the number of edges (Bonferroni).
3. An edge is "in" if the interval is above 1/2, "out" if it is below, and otherwise "unsure".
4. Let r pairs be added to the task, or removed. A draw that deletes all of them, with probability deletion^r, is a
   draw from the original task. So the edge's probability moves by at most `1 - deletion^r`, and a verdict holds for
   every task that differs by at most `radius` pairs: the largest r for which the interval stays on its side of 1/2.

The verdicts are about circuits found on as few pairs as a draw has: a tenth of them with deletion 0.9.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple, Unpack

import numpy as np
from scipy.stats import beta

from circuitfind.attribution.attribute import ScoreKeywords
from circuitfind.attribution.methods import method_of, request_of
from circuitfind.calls import model_call
from circuitfind.circuit import Circuit
from circuitfind.engine.experiment import Experiment
from circuitfind.errors import ScoreError, TaskError, check_count
from circuitfind.evaluation.stability import FromScores
from circuitfind.graph import Graph
from circuitfind.models.load import Model
from circuitfind.progress import track
from circuitfind.record import Record
from circuitfind.result import By, Result
from circuitfind.statistics import Interval
from circuitfind.tasks.task import BoundTask, Task

IN, OUT, UNSURE = "in", "out", "unsure"


class CertifiedEdge(NamedTuple):
    """An edge: the fraction of circuits that contain it, the interval of its probability, the verdict, and the number
    of pairs by which the task may differ (`radius`)."""

    edge: str
    share: float
    interval: Interval
    verdict: str
    radius: int


@dataclass(frozen=True, eq=False, repr=False)
class Certified(Result):
    """Verdicts on all edges; rows are those that are in some circuit, the most frequent first.

    Attributes:
        counts: `[writers, readers]`, number of draws whose circuit contains the edge.
        deletion: the probability that a pair is deleted.
        draws: number of draws.
        level: the probability that any of the intervals is wrong.
    """

    FORMAT, ROWS = "circuitfind.certified", "edges"
    DERIVED = ("edges", "n_in", "n_unsure")

    graph: Graph
    counts: np.ndarray
    draws: int
    deletion: float
    level: float
    record: Record

    @cached_property
    def bounds(self) -> tuple[np.ndarray, np.ndarray]:
        """`[writers, readers]` each: the ends of the intervals of an edge's probability."""
        tail = self.level / self.graph.n_edges / 2
        misses = self.draws - self.counts
        with np.errstate(invalid="ignore"):
            low = np.where(self.counts > 0, beta.ppf(tail, self.counts, misses + 1), 0.0)
            high = np.where(misses > 0, beta.ppf(1 - tail, self.counts + 1, misses), 1.0)
        return low, high

    @property
    def mask(self) -> np.ndarray:
        """`[writers, readers]` bool: the edges that are in."""
        return np.asarray((self.bounds[0] > 0.5) & self.graph.real)

    @property
    def n_in(self) -> int:
        return int(self.mask.sum())

    @property
    def n_unsure(self) -> int:
        low, high = self.bounds
        return int(((low <= 0.5) & (high >= 0.5) & self.graph.real).sum())

    def circuit(self) -> Circuit:
        """The edges that are in (they need not be connected)."""
        return Circuit(self.graph, self.mask, record=self.record)

    @property
    def edges(self) -> tuple[CertifiedEdge, ...]:
        seen = np.argwhere(self.counts > 0).tolist()
        return tuple(self._row(u, r) for u, r in sorted(seen, key=lambda edge: -self.counts[tuple(edge)]))

    def _row(self, writer: int, reader: int) -> CertifiedEdge:
        low, high = (float(one[writer, reader]) for one in self.bounds)
        verdict = IN if low > 0.5 else OUT if high < 0.5 else UNSURE
        share = float(self.counts[writer, reader]) / self.draws
        sure = radius(max(low - 0.5, 0.5 - high), self.deletion)
        return CertifiedEdge(self.graph.edge_name(writer, reader), share, Interval(low, high), verdict, sure)


def radius(margin: float, deletion: float) -> int:
    """Return the largest number of pairs by which a task may differ while a probability moves by less than `margin`.

    >>> radius(0.49, 0.9), radius(0.05, 0.9), radius(-0.1, 0.9)
    (6, 0, 0)
    """
    return max(math.ceil(math.log(1 - margin) / math.log(deletion)) - 1, 0) if margin > 0 else 0


@model_call
def certified(
    model: Model,
    task: Task | BoundTask,
    *,
    method: str = "eap-ig-inputs",
    n_edges: int = 200,
    by: By = "absolute",
    deletion: float = 0.9,
    draws: int = 1000,
    level: float = 0.01,
    **asked: Unpack[ScoreKeywords],
) -> Certified:
    """Find the edges that are in most circuits of random subsets of a task's pairs, even if a few pairs change.

    Args:
        method: one that scores pair by pair: "eap", "eap-ig-inputs", "clean-corrupted", "relp", "gim" or "exact".
        n_edges, by: a circuit is `scores.top(n_edges, by)`.
        deletion: the probability that a pair is deleted. The higher it is, the larger is the radius, and the fewer
            pairs each circuit is made from.
        draws: number of subsets, each with its own circuit; a draw costs one matrix product.
        level: the probability that any verdict is wrong.
        asked: keywords (seed: of the draws, too) and options of the method, as for `circuitfind.attribute`.

    Raises:
        ScoreError: the method cannot score this pair by pair, or a number makes no sense.
        TaskError: so few different pairs that a draw may well have none.
    """
    check_count("draws", draws, 20)
    for name, value in (("deletion", deletion), ("level", level)):
        if not 0 < value < 1:
            raise ScoreError(f"{name}={value!r} is not between 0 and 1")
    chosen = method_of(method)
    request, setting = request_of(chosen, "edge", None, asked)
    experiment = Experiment.of(model, task, setting)
    experiment = experiment.on(experiment.bound.distinct())
    n = len(experiment.bound)
    if n * (1 - deletion) < 2:
        raise TaskError(
            f"{n} different pairs, of which {1 - deletion:.0%} stay: give more pairs, or deletion= of at most"
            f" {1 - 2 / max(n, 3):.2f}"
        )
    source = FromScores([experiment], chosen, request, n_edges, by)
    rng = np.random.default_rng(experiment.setting.seed)
    counts = np.zeros(experiment.graph.real.shape, dtype=int)
    for _ in track(range(draws), "draws"):
        rows = np.flatnonzero(rng.random(n) >= deletion)
        if len(rows):  # of no pairs there are no edges
            counts += source.cut(source.scores(rows)).mask
    record = experiment.record(chosen.name, **source.settings, deletion=deletion, draws=draws, level=level)
    return Certified(experiment.graph, counts, draws, deletion, level, record)
