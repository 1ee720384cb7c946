"""Verification: what attribution estimated, measured.

1. The top candidates (and a given circuit's own edges) are patched exactly, one at a time, and compared with their
   estimates: correlation, slope, and how many estimates have the wrong sign.
2. The circuit as a whole is run exactly, and beside it others of its size: random connected circuits, random edges
   among the circuit's own nodes (are its connections right, or only its heads?), and the strongest edges by score.
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

MOST_RANDOM = 10_000  # circuits: 20 tell enough, and each is run


class EdgeCheck(NamedTuple):
    """An edge's estimated effect (NaN where scores do not estimate it) and exact effect, in units of the metric."""

    name: str
    estimate: float
    exact: float

    @property
    def wrong_sign(self) -> bool:
        """The estimate says that the edge supports what it opposes, or the other way round."""
        return self.estimate * self.exact < 0


class CheckedEdge(NamedTuple):
    """A row: the same with the edge's ends and the 95% interval of the exact effect over examples."""

    edge: str
    writer: str
    reader: str
    estimate: float
    exact: float
    interval: Interval
    wrong_sign: bool


@dataclass(frozen=True, eq=False, repr=False)
class Verification(Result):
    """What verification measured; rows are the checked edges.

    Attributes:
        edges: checked edges, largest |score| first.
        intervals: of their exact effects, 95% over examples.
        correlation, rank_correlation: of their estimates and exact effects.
        slope: of exact effects on estimates (1 = unbiased, above 1 = underestimated).
        evaluation: the circuit as a whole.
        random: faithfulness of random connected circuits of the same size.
        same_nodes: of random edges among the circuit's nodes, as many.
        ranked: of as many edges of largest |score|; None where it was not run.
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
            raise ScoreError("this verification does not say its graph (an early version wrote it): verify again")
        matrix = np.full(self.graph.real.shape, np.nan, dtype=np.float32)
        for edge in self.edges:
            matrix[self.graph.edge(edge.name)] = edge.exact
        return matrix

    @property
    def sign_errors(self) -> int:
        """How many estimates have the wrong sign."""
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
        """How many of the random circuits are further from faithfulness 1 than this circuit."""
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
    """Measures the top candidates' effects, and a circuit as a whole.

    Args:
        task: preferably held-out pairs (`task.on(model).split()`).
        top: edges of largest |estimate| to patch; a given circuit's edges are patched, too.
        circuit: by default the connected circuit of the top candidates.
        random: random circuits to compare with.
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
    """`verify` of a circuit with an experiment and an evaluator of its pairs. `edges`: `[writers, readers]` bool, those
    to patch; `random`: circuits of each random kind."""
    _warn_of_overlap(scores.record, evaluator.record)
    graph, n, rng = experiment.graph, len(circuit), np.random.default_rng(evaluator.seed)
    masks = [random_circuit(graph, n, rng).mask for _ in range(random)]
    masks += [mask for mask in (same_nodes(graph, circuit.mask, rng) for _ in range(random)) if mask is not None]
    masks += [scores.top(n).mask] if random else []
    patching = 0.5 * int(edges.sum())  # of what a circuit takes
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
    if judged.n_examples == 1:  # one pair is scored and judged on itself, and has no others to leave out
        return
    overlap, pairs = made.seen(judged), f"{judged.n_examples} pairs to judge with"
    if overlap:
        warn(f"the scores were made on {overlap} of the {pairs}: leave these out, or compute scores on others")
    elif overlap is None and made.n_examples:
        warn(f"the scores do not say which pairs they were made on: some of the {pairs} may have been scored on")
