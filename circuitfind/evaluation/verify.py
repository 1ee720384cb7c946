"""Verification: measure exactly what attribution estimated.

1. The top candidates, and all edges of a given circuit, are patched exactly, one at a time. Their effects are compared
   with the estimates: correlation, slope, and number of wrong signs.
2. The whole circuit is run exactly, and compared with others of its size: random connected circuits, random edges
   between the circuit's own nodes (are its connections right, or only its nodes?), and the strongest edges by score.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Self, Unpack

import numpy as np

from circuitfind.attribution.exact import exact_effects
from circuitfind.calls import model_call
from circuitfind.circuit import Circuit, as_circuit
from circuitfind.engine.experiment import Experiment
from circuitfind.errors import ScoreError, check_count, warn
from circuitfind.evaluation.faithfulness import Evaluation, Evaluator
from circuitfind.evaluation.random_circuits import random_circuit, same_nodes
from circuitfind.graph import Graph, ends_of
from circuitfind.models.load import Model
from circuitfind.progress import stages, track
from circuitfind.record import Record
from circuitfind.result import Result, saved_as
from circuitfind.scores import Scores
from circuitfind.setting import Keywords
from circuitfind.statistics import Interval, as_intervals, correlation, mean_intervals, rank_correlation
from circuitfind.tasks.task import BoundTask, Task

MOST_RANDOM = 10_000  # circuits; each is run, and 20 are enough


class EdgeCheck(NamedTuple):
    """Estimated effect of an edge (NaN if scores are no estimates) and exact effect, in units of the metric."""

    name: str
    estimate: float
    exact: float

    @property
    def wrong_sign(self) -> bool:
        """Whether estimate and exact effect have opposite signs."""
        return self.estimate * self.exact < 0


class CheckedEdge(NamedTuple):
    """A row: an `EdgeCheck` with the ends of the edge, and the 95% interval of its exact effect over examples."""

    edge: str
    writer: str
    reader: str
    estimate: float
    exact: float
    interval: Interval
    wrong_sign: bool


@dataclass(frozen=True, eq=False, repr=False)
class Verification(Result):
    """Result of a verification; rows are the checked edges.

    Attributes:
        edges: checked edges, largest |score| first.
        intervals: 95% intervals of their exact effects over examples.
        correlation, rank_correlation: between estimates and exact effects.
        slope: of exact effects regressed on estimates (1 = unbiased, above 1 = estimates too small).
        evaluation: the circuit as a whole.
        random: faithfulness of random connected circuits of the same size.
        same_nodes: faithfulness of the same number of random edges between the circuit's nodes.
        ranked: faithfulness of the same number of edges of largest |score|; None if not run.
        graph: None in files of early versions.
    """

    FORMAT, ROWS, OLD_KEYS = "circuitfind.verification", "edges", ("edges", "correlation", "circuit")
    DERIVED = ("sign_errors", "checked")
    SHOWN = ("faithfulness", "interval", "beaten", "checked", "correlation", "slope", "sign_errors")

    edges: tuple[EdgeCheck, ...]
    intervals: tuple[Interval, ...]
    correlation: float
    rank_correlation: float
    slope: float
    evaluation: Evaluation = field(metadata=saved_as("circuit"))
    random: tuple[float, ...]
    graph: Graph | None = None
    same_nodes: tuple[float, ...] = ()
    ranked: float | None = None

    @property
    def checked(self) -> int:
        return len(self.edges)

    @property
    def exact(self) -> np.ndarray:
        """`[writers, readers]` float32 exact effects, NaN where not measured."""
        if self.graph is None:
            raise ScoreError("this file was written by an early version and lacks the graph: verify again")
        matrix = np.full(self.graph.real.shape, np.nan, dtype=np.float32)
        for edge in self.edges:
            matrix[self.graph.edge(edge.name)] = edge.exact
        return matrix

    @property
    def sign_errors(self) -> int:
        """Number of estimates with the wrong sign."""
        return sum(edge.wrong_sign for edge in self.edges)

    @property
    def faithfulness(self) -> float:
        return self.evaluation.faithfulness

    @property
    def record(self) -> Record:
        return self.evaluation.record

    @property
    def interval(self) -> Interval:
        return self.evaluation.interval

    @property
    def beaten(self) -> int:
        """Number of random circuits further from faithfulness 1 than this circuit."""
        return sum(abs(1 - value) > abs(1 - self.faithfulness) for value in self.random)

    def rows(self) -> tuple[CheckedEdge, ...]:
        return tuple(
            CheckedEdge(edge.name, *ends_of(edge.name), edge.estimate, edge.exact, interval, edge.wrong_sign)
            for edge, interval in zip(self.edges, self.intervals, strict=True)
        )

    def to_dict(self) -> dict[str, Any]:
        content = super().to_dict()
        ends = content.pop("intervals")
        edges = [{**edge, "interval": pair} for edge, pair in zip(content["edges"], ends, strict=True)]
        return {**content, "edges": edges}

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> Self:
        return super().from_dict({**content, "intervals": [edge["interval"] for edge in content["edges"]]})


@model_call
def verify(
    model: Model,
    task: Task | BoundTask,
    scores: Scores,
    top: int = 50,
    *,
    circuit: Circuit | None = None,
    random: int = 20,
    **asked: Unpack[Keywords],
) -> Verification:
    """Measure the effects of the top candidates, and run a circuit as a whole.

    Args:
        task: preferably held-out pairs (`task.on(model).split()`).
        top: number of edges of largest |estimate| to patch, in addition to all edges of a given circuit.
        circuit: default: the connected circuit of the top candidates.
        random: number of random circuits of each kind to compare with.
        asked: metric, ablation, direction (by default those of the scores), batch_size, seed; see
            `circuitfind.setting`.

    Raises:
        ScoreError: the scores belong to another graph, or faithfulness is undefined on this task.
    """
    if not isinstance(scores, Scores):
        raise ScoreError(f"verify needs edge scores, not {type(scores).__name__}: attribute(level='edge') makes them")
    if scores.graph != model.graph:
        raise ScoreError(f"the scores belong to another graph {model.graph.unlike(scores.graph)}")
    check_count("top", top)
    check_count("random", random, most=MOST_RANDOM)
    experiment = Experiment.of(model, task, asked, inherit=scores.record, made="the scores were")
    if isinstance(circuit, Circuit):
        experiment.tell_of(circuit.record, "the circuit was")
    candidates = scores.top(top, prune=False)
    chosen = candidates.connected() if circuit is None else as_circuit(experiment.graph, circuit)
    if not len(chosen) and circuit is None:
        warn(f"the top {top} edges hold no path from input to logits: their circuit is empty")
    return verified(experiment, Evaluator(experiment), scores, chosen, candidates.mask | chosen.mask, random)


def verified(
    experiment: Experiment, evaluator: Evaluator, scores: Scores, circuit: Circuit, edges: np.ndarray, random: int
) -> Verification:
    """`verify` for an experiment and an evaluator of its pairs. `edges`: `[writers, readers]` bool, the edges to patch.
    `random`: number of circuits of each random kind."""
    _warn_of_overlap(scores.record, evaluator.record)
    graph, n, rng = experiment.graph, len(circuit), np.random.default_rng(evaluator.seed)
    masks = [random_circuit(graph, n, rng).mask for _ in range(random)]
    masks += [mask for mask in (same_nodes(graph, circuit.mask, rng) for _ in range(random)) if mask is not None]
    masks += [scores.top(n).mask] if random else []
    patching = 0.5 * int(edges.sum())  # each takes about half as long as a circuit
    with stages("verifying", patching + len(masks)) as stage:
        with stage(patching):
            effects = exact_effects(experiment, edges)
        evaluation = evaluator.evaluate(circuit)
        with stage(len(masks)):
            metrics = [evaluator.run(mask[None]).metric[0] for mask in track(masks, "other circuits")]
    others = evaluator.faithfulness(np.stack(metrics)).tolist() if metrics else []
    values = scores.values[effects.edges[:, 0], effects.edges[:, 1]]
    order = np.argsort(-np.abs(values), kind="stable")
    estimates = (values if scores.record.is_effect else np.full_like(values, np.nan))[order].astype(np.float64)
    exact = effects.values.mean(axis=1)[order].astype(np.float64)
    names = [experiment.graph.edge_name(*edge) for edge in effects.edges[order]]
    intervals = as_intervals(mean_intervals(effects.values, evaluator.bound.copies)[order])
    power = float((estimates**2).sum())
    return Verification(
        tuple(map(EdgeCheck, names, estimates.tolist(), exact.tolist())),
        tuple(intervals),
        correlation(estimates, exact),
        rank_correlation(estimates, exact),
        float((estimates * exact).sum() / power) if power else float("nan"),
        evaluation,
        tuple(others[:random]),
        graph,
        tuple(others[random:-1]),
        others[-1] if others else None,
    )


def _warn_of_overlap(made: Record, judged: Record) -> None:
    if judged.n_examples == 1:  # a single pair is scored and evaluated on itself
        return
    overlap, pairs = made.seen(judged), f"{judged.n_examples} pairs used for verification"
    if overlap:
        warn(
            f"{overlap} of the {pairs} were also used to make the scores: leave them out, or make the scores on others"
        )
    elif overlap is None and made.n_examples:
        warn(f"the scores do not say which pairs they were made on: these may include some of the {pairs}")
