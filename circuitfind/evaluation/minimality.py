"""Minimality: which edges a circuit can do without.

1. Measure the effect of each edge, metric(C) - metric(C without it), by an exact run on every example; positive = the
   circuit needs the edge. Edges that cannot have an effect (`engine/reach.py`) take no run.
2. An edge is superfluous if the 95% interval of its effect over the examples includes 0, or if the effect is below a
   threshold or within rounding (`rounding.py`). With few pairs, intervals are wide and an effect may be missed.
3. Edges without an effect of their own may have one together, if one backs up the other. So the joint effect of all
   superfluous edges is compared with the sum of their effects, and the circuit without all of them is evaluated.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from numbers import Real
from typing import NamedTuple, Unpack

import numpy as np

from circuitfind.calls import model_call
from circuitfind.circuit import Circuit
from circuitfind.engine.reach import without_effect
from circuitfind.errors import ScoreError
from circuitfind.evaluation.faithfulness import Evaluation, Evaluator
from circuitfind.evaluation.random_circuits import without_each
from circuitfind.evaluation.rounding import of_mean
from circuitfind.graph import ends_of
from circuitfind.models.load import Model
from circuitfind.record import Record
from circuitfind.result import Result, saved_as
from circuitfind.setting import JudgeKeywords
from circuitfind.statistics import Interval, mean_intervals
from circuitfind.tasks.task import BoundTask, Task


class EdgeNeed(NamedTuple):
    """What a circuit loses without one of its edges, in units of the metric, with the 95% interval over examples."""

    edge: str
    writer: str
    reader: str
    effect: float
    interval: Interval
    superfluous: bool

    @property
    def name(self) -> str:
        return self.edge


@dataclass(frozen=True, eq=False, repr=False)
class Minimality(Result):
    """Minimality of a circuit; rows are its edges.

    Attributes:
        edges: largest effect first.
        circuit, evaluation: the whole circuit and its evaluation.
        reduced, reduced_evaluation: the circuit without all superfluous edges, and its evaluation.
        threshold: in units of the metric.
        per_example: `[edges, examples]` effects, in the order of `edges`.
        seen_pairs: number of pairs that were also used to find the circuit; None if not known.
    """

    FORMAT, ROWS, DERIVED = "circuitfind.minimality", "edges", ("superfluous", "joint_effect", "summed_effect")
    SHOWN = ("n_edges", "n_superfluous", "joint_effect", "summed_effect", "threshold")

    edges: tuple[EdgeNeed, ...]
    circuit: Circuit = field(metadata=saved_as("whole_circuit"))
    reduced: Circuit = field(metadata=saved_as("reduced_circuit"))
    evaluation: Evaluation = field(metadata=saved_as("circuit"))
    reduced_evaluation: Evaluation = field(metadata=saved_as("reduced"))
    threshold: float
    per_example: np.ndarray
    seen_pairs: int | None
    record: Record

    @property
    def n_edges(self) -> int:
        return len(self.edges)

    @property
    def n_superfluous(self) -> int:
        return len(self.superfluous)

    @property
    def superfluous(self) -> tuple[str, ...]:
        """Names of the edges that the circuit can do without, taken one at a time."""
        return tuple(row.edge for row in self.edges if row.superfluous)

    @property
    def joint_effect(self) -> float:
        """Effect of all superfluous edges together: metric(C) - metric(C without all of them)."""
        return self.evaluation.metric - self.reduced_evaluation.metric

    @property
    def summed_effect(self) -> float:
        """Sum of the effects of single superfluous edges; its difference from `joint_effect` is their interaction."""
        return sum(edge.effect for edge in self.edges if edge.superfluous)


@model_call
def minimality(
    model: Model,
    task: Task | BoundTask,
    circuit: Circuit | Iterable[str],
    *,
    threshold: float = 0.0,
    **asked: Unpack[JudgeKeywords],
) -> Minimality:
    """Measure what a circuit loses without each of its edges, with an exact run for each edge.

    Args:
        circuit: a `Circuit`, or names of edges.
        threshold: smaller |effects| make an edge superfluous, in units of the metric.
        asked: metric, ablation (by default the circuit's own), batch_size, seed; see `circuitfind.setting`.

    Raises:
        ScoreError: faithfulness is undefined on this task, or the threshold is negative.
    """
    if not isinstance(threshold, Real) or not threshold >= 0:
        raise ScoreError(f"threshold={threshold!r} is compared with magnitudes: give a number, 0 or more")
    evaluator, chosen = Evaluator.judging(model, task, circuit, **asked)
    evaluation, mask, experiment = evaluator.evaluate(chosen), chosen.mask, evaluator.experiment
    cells = np.argwhere(mask.T)[:, ::-1]  # in the order of `Circuit.edges`
    coupled = experiment.adapter.coupled
    acts = ~without_effect(evaluator.graph, mask, coupled, experiment.interchange)[tuple(cells.T)]
    effects = np.zeros((len(cells), len(evaluator.full)))
    without = evaluator.metrics(without_each(mask, cells[acts]), int(acts.sum()), "edges")
    effects[acts] = evaluation.per_example.circuit - without
    means, intervals = effects.mean(-1), mean_intervals(effects, evaluator.bound.copies)
    around_zero = (intervals[:, 0] <= 0) & (intervals[:, 1] >= 0)
    rounding = of_mean(evaluator.rounding(mask))
    superfluous = around_zero | (np.abs(means) < threshold) | (np.abs(means) <= rounding)
    columns = zip(chosen.edges, means.tolist(), intervals.tolist(), superfluous.tolist(), strict=True)
    rows = [EdgeNeed(name, *ends_of(name), mean, Interval(*ends), flag) for name, mean, ends, flag in columns]
    order = np.argsort(-means, kind="stable")
    left = mask.copy()
    left[tuple(cells[superfluous].T)] = False
    reduced = chosen.with_mask(left)
    return Minimality(
        tuple(rows[i] for i in order),
        chosen,
        reduced,
        evaluation,
        evaluator.evaluate(reduced),
        threshold,
        effects[order],
        evaluation.seen_pairs,
        evaluator.record.with_settings(threshold=threshold),
    )
