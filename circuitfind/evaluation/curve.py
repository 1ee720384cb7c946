"""Faithfulness over sizes and the area under it: which scores rank edges better, independently of size.

1. At each size, the best edges of the scores are pruned to a connected circuit. It may have fewer edges than requested;
   both numbers are reported. Given circuits are not pruned.
2. Run every distinct circuit exactly, once. The whole model and the empty circuit need no run. Warn of a ranking whose
   circuits do nothing (`idle`).
3. Faithfulness is a ratio of means over examples. The jackknife leaves out the same example at all sizes, so that the
   areas have intervals, too.
4. The areas of the benchmark MIB (Mueller et al. 2025) are trapezoids, linear in the fraction of edges and not divided
   by the range: CPR = area under f, CMD = area of |1 - f|. Over MIB's ten fractions, `PERCENTAGES`, scores with correct
   circuits at every size have CPR 0.999 and CMD 0; if only the complete graph works, 0.25 and 0.749.
5. As in MIB, CPR selects edges of highest *signed* score (opposing edges are left out, so CPR can exceed 1), and CMD
   edges of highest *magnitude*. So each number has its own curve.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import reduce
from numbers import Integral, Real
from typing import Any, NamedTuple, Unpack

import numpy as np

from circuitfind.calls import model_call
from circuitfind.circuit import Circuit, as_circuit
from circuitfind.engine.experiment import check_model
from circuitfind.errors import ScoreError, warn
from circuitfind.evaluation.agreement import PERCENTAGES, area_under
from circuitfind.evaluation.faithfulness import Evaluator
from circuitfind.graph import Graph
from circuitfind.models.load import Model
from circuitfind.record import Record
from circuitfind.result import UNSAVED, Result
from circuitfind.scores import By, Scores
from circuitfind.setting import JudgeKeywords
from circuitfind.statistics import Interval, as_intervals, jackknife, left_out, magnitude_intervals
from circuitfind.tasks.task import BoundTask, Task

NOTHING = 0.05  # a smaller faithfulness is about 0
SMALL, LARGE = 0.1, 0.02  # fractions of the graph
WRONG = 1 / 3  # signs are wrong if a larger fraction of the strongest early edges is negative
REPAIRS = ("eap-ig-inputs", "relp")  # methods with the right signs


def area_from_one(fractions: np.ndarray | Sequence[float], f: np.ndarray | Sequence[float]) -> np.ndarray:
    """Area between f `[..., points]` and 1, of |1 - f| (MIB's CMD)."""
    return area_under(fractions, np.abs(1 - np.asarray(f, dtype=np.float64)))


class CurvePoint(NamedTuple):
    """One size of a curve.

    asked, n_edges, fraction: edges requested, edges left after pruning, and requested edges as a fraction of all.
    faithfulness, interval: with its 95% interval.
    metric, accuracy, top1, kl: means over examples; KL(whole model || circuit) in nats.
    """

    asked: int
    n_edges: int
    fraction: float
    faithfulness: float
    interval: Interval
    metric: float
    accuracy: float
    top1: float
    kl: float


class CurveExamples(NamedTuple):
    """`[points, examples]` as in `Outcome`, and the metric of the whole model and of the empty circuit `[examples]`."""

    metric: np.ndarray
    accurate: np.ndarray
    top1: np.ndarray
    kl: np.ndarray
    full: np.ndarray
    empty: np.ndarray


@dataclass(frozen=True, eq=False, repr=False)
class Curve(Result):
    """Evaluations of circuits of many sizes; rows are the points.

    Attributes:
        points: smallest fraction first.
        cpr, cmd: areas under faithfulness and under |1 - faithfulness| over the fractions measured. Compare them only
            over the same fractions. Noise biases CMD upwards, like every magnitude.
        seen_pairs: number of pairs that were also used to find the circuits; None if not known.
        circuits: the circuit of each point; not saved.
    """

    FORMAT, ROWS, OLD_KEYS = "circuitfind.curve", "points", ("points", "cpr")

    points: tuple[CurvePoint, ...]
    cpr: float
    cpr_interval: Interval
    cmd: float
    cmd_interval: Interval
    seen_pairs: int | None
    per_example: CurveExamples
    record: Record
    circuits: tuple[Circuit, ...] = field(default=(), metadata=UNSAVED)

    @property
    def full(self) -> np.ndarray:
        """`[examples]`: the metric of the whole model."""
        return self.per_example.full

    @property
    def empty(self) -> np.ndarray:
        """`[examples]`: the metric with every edge ablated."""
        return self.per_example.empty


@dataclass(frozen=True, eq=False, repr=False)
class Mib(Result):
    """MIB's two curves: CPR is that of the signed one, CMD that of the absolute one."""

    FORMAT, DERIVED = "circuitfind.mib", ("cpr", "cmd")
    SHOWN = ("cpr", "cmd")

    signed: Curve
    absolute: Curve

    @property
    def cpr(self) -> float:
        return self.signed.cpr

    @property
    def cmd(self) -> float:
        return self.absolute.cmd

    @property
    def record(self) -> Record:
        return self.signed.record

    def rows(self) -> tuple[CurvePoint, ...]:
        """Points of both curves, those of the signed one first."""
        return self.signed.points + self.absolute.points

    def columns(self) -> dict[str, list[Any]]:
        by = [how for how in ("signed", "absolute") for _ in getattr(self, how).points]
        return {"by": by, **super().columns()}


@model_call
def curve(
    model: Model,
    task: Task | BoundTask,
    given: Scores | Iterable[Circuit],
    *,
    sizes: Iterable[int] | None = None,
    percentages: Iterable[float] = PERCENTAGES,
    by: By = "absolute",
    prune: bool = True,
    **asked: Unpack[JudgeKeywords],
) -> Curve:
    """Measure the exact faithfulness of circuits of many sizes.

    Args:
        task: preferably held-out pairs (`task.on(model).split()`).
        given: edge scores, or circuits (ACDC at several thresholds, learned masks), which are not pruned.
        sizes: numbers of edges of circuits made from scores. Default: `percentages` of all edges, n = int(p x edges).
        by, prune: how circuits are made from scores, as for `Scores.top`.
        asked: metric, ablation (default: those of `given`), batch_size, seed; see `circuitfind.setting`.

    Raises:
        ScoreError: scores of another graph, no edge scores, an invalid size, or undefined faithfulness on this task.
    """
    check_model(model)
    chosen = given if isinstance(given, Scores) else _circuits(model.graph, given)
    made = (chosen.record, "the scores were") if isinstance(chosen, Scores) else (_made(chosen), "the circuits were")
    evaluator = Evaluator.of(model, task, *made, **asked)
    return curve_of(evaluator, chosen, sizes=sizes, percentages=percentages, by=by, prune=prune)


def curve_of(
    evaluator: Evaluator,
    given: Scores | Iterable[Circuit],
    *,
    sizes: Iterable[int] | None = None,
    percentages: Iterable[float] = PERCENTAGES,
    by: By = "absolute",
    prune: bool = True,
) -> Curve:
    """`curve` with an evaluator of the pairs."""
    evaluator.check_contrast()
    n_edges, record = evaluator.graph.n_edges, evaluator.record
    if isinstance(given, Scores):
        if given.graph != evaluator.graph:
            raise ScoreError(f"the scores belong to another graph {evaluator.graph.unlike(given.graph)}")
        asked, fractions = sizes_of(n_edges, sizes, percentages)
        circuits = [given.top(n, by, prune) for n in asked]
        record = record.with_settings(by=by, prune=prune, scores=given.record.method)
        found = given.record
    else:
        if sizes is not None:
            raise ScoreError("sizes= applies to scores, not to circuits: leave it out, or give scores")
        circuits = _circuits(evaluator.graph, given)
        asked = [len(circuit) for circuit in circuits]
        fractions = [n / n_edges for n in asked]
        found = reduce(Record.seeing, (circuit.record for circuit in circuits))
    outcome = evaluator.run_distinct([circuit.mask for circuit in circuits])
    f, share = evaluator.faithfulness(outcome.metric), evaluator.share
    if isinstance(given, Scores) and (said := idle(given, by, zip(asked, f.tolist(), strict=True))):
        warn(said)
    means = (outcome.metric.mean(-1), share(outcome.accurate), share(outcome.top1), outcome.kl.mean(-1))
    metrics = left_out(np.stack([*outcome.metric, evaluator.full, evaluator.empty]), evaluator.bound.copies)
    with np.errstate(divide="ignore", invalid="ignore"):
        without = (metrics[:-2] - metrics[-1]) / (metrics[-2] - metrics[-1])  # [points, groups]
    areas: dict[str, Any] = {}
    for name, area, intervals in (("cpr", area_under, jackknife), ("cmd", area_from_one, magnitude_intervals)):
        value = area(fractions, f)
        areas[name] = float(value)
        (areas[f"{name}_interval"],) = as_intervals(intervals(value, area(fractions, without.T))[None])
    columns = (f.tolist(), as_intervals(jackknife(f, without)), *(values.tolist() for values in means))
    return Curve(
        tuple(map(CurvePoint, asked, map(len, circuits), fractions, *columns)),
        **areas,
        seen_pairs=found.seen(evaluator.record),
        per_example=CurveExamples(*outcome, evaluator.full, evaluator.empty),
        record=record,
        circuits=tuple(circuits),
    )


@model_call
def mib(model: Model, task: Task | BoundTask, scores: Scores, **asked: Unpack[JudgeKeywords]) -> Mib:
    """CPR and CMD as defined by the benchmark MIB; arguments and errors as for `curve`."""
    evaluator = Evaluator.of(model, task, scores.record, "the scores were", **asked)
    return Mib(curve_of(evaluator, scores, by="signed"), curve_of(evaluator, scores, by="absolute"))


def sizes_of(n_edges: int, sizes: Iterable[int] | None, percentages: Iterable[float]) -> tuple[list[int], list[float]]:
    """Numbers of edges and fractions of all edges, ascending; a ScoreError if there is none or one is invalid."""
    for name, given in (("sizes", sizes), ("percentages", percentages)):
        if given is not None and (isinstance(given, str) or not isinstance(given, Iterable)):
            raise ScoreError(f"{name}={given!r} is not a list: give a list, such as {name}=[{given!r}]")
    if sizes is None:
        for p in (fractions := list(percentages)):
            if not isinstance(p, Real) or not 0 <= p <= 1:
                raise ScoreError(f"percentages are fractions of all edges, between 0 and 1, not {p!r}")
        fractions = sorted(set(fractions))
        asked = [int(p * n_edges) for p in fractions]
    else:
        for n in (asked := list(sizes)):
            if isinstance(n, bool) or not isinstance(n, Integral) or not 0 <= n <= n_edges:
                raise ScoreError(f"size {n!r} is not a number of edges: this graph has {n_edges:,}")
        asked = sorted(set(asked))
        fractions = [n / n_edges for n in asked]
    if not asked:
        raise ScoreError("a curve needs at least one size: none is given")
    return asked, fractions


def _circuits(graph: Graph, given: Iterable[Circuit]) -> list[Circuit]:
    """Check the circuits and sort them, smallest first."""
    if not isinstance(given, Iterable) or isinstance(given, (str, Circuit)):
        kind = type(given).__name__
        raise ScoreError(f"a curve is made from edge scores or from a list of circuits, not from a {kind}")
    circuits = sorted((as_circuit(graph, circuit) for circuit in given), key=len)
    if not circuits:
        raise ScoreError("a curve needs at least one circuit: the list is empty")
    return circuits


def _made(circuits: list[Circuit]) -> Record:
    """The record of the circuits, without metric or ablation where they differ."""
    records = [circuit.record for circuit in circuits]
    differ = (name for name in ("metric", "ablation") if len({getattr(record, name) for record in records}) > 1)
    unknown: dict[str, Any] = dict.fromkeys(differ, "")
    return replace(records[0], **unknown)


def idle(scores: Scores, by: By, tried: Iterable[tuple[int, float]]) -> str | None:
    """Return a warning if the circuits of a ranking by effects do nothing, although the whole model does the task.

    That is: all circuits from a few edges up to a tenth of the graph have faithfulness about 0. The usual reason, in
    small models, is that the gradient at the clean run has the wrong sign in the first layers, because the metric is
    curved between the prompts. Edges that everything passes through then get strongly negative effects, and a signed
    ranking puts them last. Integrated gradients and relevance propagation get the sign right; a ranking by magnitude
    does not depend on it.

    `tried`: number of edges requested, and faithfulness, of each circuit that was run.
    """
    graph = scores.graph
    small = [(n, f) for n, f in tried if 0 < n <= SMALL * graph.n_edges]
    most = max((n for n, _ in small), default=0)
    if (
        not scores.record.is_effect
        or len(small) < 2
        or most < LARGE * graph.n_edges
        or any(f >= NOTHING for _, f in small)
    ):
        return None
    method = scores.record.method
    ways = [f"method='{name}'" for name in REPAIRS if name != method]
    said = f"the best edges by {by} effect ('{method}') do nothing: at every"
    said += f" size up to {most:,} edges, faithfulness is below {NOTHING}, although the whole model does the task"
    if by == "signed":
        ways.append("by='absolute'")
        strong = scores.ranked("absolute")[:most]
        layers = np.array([graph.reader(reader).layer for _, reader in strong.tolist()])
        early = strong[layers < max(1, graph.n_layers // 3)]
        wrong = int((scores.values[tuple(early.T)] < 0).sum())
        if wrong > WRONG * len(early) > 0:
            said += (
                f". Of the {len(early):,} strongest edges into the first layers {wrong:,} have negative effects, so a"
                " signed ranking leaves them out: gradients there have the wrong sign"
            )
    return f"{said}. Use {' or '.join(ways)}"
