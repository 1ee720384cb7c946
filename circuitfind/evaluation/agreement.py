"""Agreement with a reference circuit: how well scores rank what is in it, and what a circuit has of it.

1. Items are all edges that the model has (`level="edge"`), all heads and MLPs ("node"; `input` is in every circuit),
   or all heads ("head"). Those of the reference are the true ones. Nothing is pruned: circuits are taken as they are.
2. Edges rank by |effect| or by effect (`by=`). A node ranks by its best edge, in or out (one into a shared key/value
   head counts for each query head of the group), or by its own score where node scores are given.
3. From the ranking, over all thresholds: ROC, its area and average precision. Each distinct score is a threshold that
   takes all items reaching it: one point (false positive rate, true positive rate), from (0, 0) to (1, 1). The area is
   the Mann-Whitney statistic: the chance that a random item of the set scores above a random other one, ties counting
   half; 0.5 for a random ranking. Average precision: the mean over the set's items of the precision at their threshold;
   about the set's share of all items for a random ranking.
4. MIB's area (Mueller et al. 2025) for edges: circuits of ten sizes, 0.1% to 100% of all edges, are grown greedily from
   the logits and pruned; trapezoids between their points, with no point at (0, 0), over the last false positive rate.
5. From a circuit: precision, recall, F1, its point in the ROC plane, and which heads of each class it has.

A circuit that holds estimates for every edge is a ranking as well.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal, NamedTuple

import numpy as np

from circuitfind.circuit import Circuit
from circuitfind.errors import ScoreError
from circuitfind.graph import Graph
from circuitfind.references.published import reference as named
from circuitfind.references.reference import Reference
from circuitfind.result import UNSAVED, Result, saved_as
from circuitfind.scores import By, NodeScores, Scores

Level = Literal["edge", "node", "head"]
LEVELS: tuple[Level, ...] = ("edge", "node", "head")
MIB_SIZES = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0)


class Counts(NamedTuple):
    """A set of items against the true set."""

    true_positives: int
    false_positives: int
    false_negatives: int
    true_negatives: int

    @classmethod
    def of(cls, found: np.ndarray, truth: np.ndarray) -> Counts:
        """From `[items]` bool each."""
        pairs = ((found, truth), (found, ~truth), (~found, truth), (~found, ~truth))
        return cls(*(int((one & other).sum()) for one, other in pairs))

    @property
    def precision(self) -> float:
        """Part of what was found that is true; NaN where nothing was found."""
        return _ratio(self.true_positives, self.true_positives + self.false_positives)

    @property
    def recall(self) -> float:
        """Part of what is true that was found: the true positive rate."""
        return _ratio(self.true_positives, self.true_positives + self.false_negatives)

    @property
    def f1(self) -> float:
        """Harmonic mean of precision and recall; 0 where nothing that is true was found."""
        return _ratio(2 * self.true_positives, 2 * self.true_positives + self.false_positives + self.false_negatives)

    @property
    def fall_out(self) -> float:
        """Part of what is not true that was found: the false positive rate."""
        return _ratio(self.false_positives, self.false_positives + self.true_negatives)


def _ratio(part: int, whole: int) -> float:
    return part / whole if whole else float("nan")


@dataclass(frozen=True, eq=False)
class Roc:
    """Points of the curve, `[thresholds + 1]` each, from (0, 0) to (1, 1); the first threshold is infinite.

    Attributes:
        fpr, tpr: false and true positive rate of the items that reach the threshold.
        precision: part of them that is true; NaN at the first point, where there are none.
    """

    thresholds: np.ndarray
    fpr: np.ndarray
    tpr: np.ndarray
    precision: np.ndarray

    @property
    def area(self) -> float:
        """AUROC: 1 for a perfect ranking, 0.5 for a random one."""
        return trapezoid(self.fpr, self.tpr)

    @property
    def average_precision(self) -> float:
        """1 for a perfect ranking, about the true items' share for a random one."""
        return float(np.sum(np.diff(self.tpr) * self.precision[1:]))


class ClassHeads(NamedTuple):
    """Heads of one class of the reference: those that the circuit has, and those that it lacks."""

    recovered: tuple[str, ...]
    missed: tuple[str, ...]


@dataclass(frozen=True, eq=False, repr=False)
class Agreement(Result):
    """Scores or a circuit against a reference.

    Attributes:
        n_items, n_true: items, and how many of them are in the reference.
        auroc, average_precision: of the ranking; NaN without one (a circuit without estimates for every edge), or if
            all items are true.
        mib_auroc: by MIB's ten greedy circuits; NaN without a ranking of edges.
        found: the circuit's counts, with its point in the ROC plane (`fall_out`, `recall`); None without a circuit.
        heads: by class of the reference; empty without a circuit.
        roc: of the ranking; None without one. Files do not hold it.
    """

    FORMAT = "circuitfind.agreement"

    reference: str
    level: Level
    by: By
    n_items: int = field(metadata=saved_as("items"))
    n_true: int = field(metadata=saved_as("true"))
    auroc: float = float("nan")
    mib_auroc: float = float("nan")
    average_precision: float = float("nan")
    found: Counts | None = field(default=None, metadata=saved_as("circuit"))
    heads: dict[str, ClassHeads] = field(default_factory=dict)
    roc: Roc | None = field(default=None, metadata=UNSAVED)


def agreement(
    result: Scores | NodeScores | Circuit, reference: Reference | str, *, by: By = "absolute", level: Level = "edge"
) -> Agreement:
    """Compares scores or a circuit with a reference circuit.

    Args:
        result: what is compared. Node scores by position are summed over positions.
        reference: a `Reference`, or what `circuitfind.reference` takes.
        by: what items rank by, "absolute" or "signed" (positive = supports) effects.
        level: what is compared: "edge", "node" (heads and MLPs) or "head".

    Raises:
        ScoreError: the two belong to different graphs; node scores at the level of edges; a level where the reference
            holds nothing.
        FileError: no such reference.
    """
    target = reference if isinstance(reference, Reference) else named(reference)
    if level not in LEVELS:
        raise ScoreError(f"level='{level}' is unknown: use one of {', '.join(map(repr, LEVELS))}")
    if not isinstance(result, (Scores, NodeScores, Circuit)):
        raise ScoreError(f"scores or a circuit are compared with a reference, not a {type(result).__name__}")
    check_same_graph(result.graph, target)
    items = _items(target, level)
    truth = _truth(target, level)[items]
    if not truth.any():
        raise ScoreError(f"reference '{target.name}' holds no {level}s to agree with: compare at another level")
    circuit = result if isinstance(result, Circuit) else None
    ranking = Scores.of(result) if isinstance(result, Circuit) else result
    key = None if ranking is None else _key(ranking, target, by, level)
    curve = None if key is None or truth.all() else roc(key[items], truth)
    found = None
    if circuit is not None:
        cells = circuit.mask if level == "edge" else circuit.node_mask[:-1]
        found = Counts.of(cells[items], truth)
    return Agreement(
        target.name,
        level,
        by,
        n_items=int(items.sum()),
        n_true=int(truth.sum()),
        auroc=curve.area if curve else float("nan"),
        average_precision=curve.average_precision if curve else float("nan"),
        mib_auroc=_mib(ranking, target, by) if level == "edge" and isinstance(ranking, Scores) else float("nan"),
        found=found,
        heads=_by_class(circuit, target) if circuit is not None else {},
        roc=curve,
    )


def levels_of(target: Reference) -> list[Level]:
    """The levels at which a reference holds something to agree with."""
    return [level for level in LEVELS if _truth(target, level)[_items(target, level)].any()]


def check_same_graph(graph: Graph, target: Reference) -> None:
    """Refuses a reference circuit of another graph.

    Raises:
        ScoreError: naming both.
    """
    if graph == target.graph:
        return
    mine, other = (f"{one} (d_model {one.d_model})" for one in (graph, target.graph))
    hint = ""
    if graph.ungrouped() == target.graph:
        hint = "; open the reference's file with graph=model.graph, which groups its keys and values"
    raise ScoreError(f"these belong to {mine}, the reference '{target.name}' to {other}{hint}")


def _items(target: Reference, level: Level) -> np.ndarray:
    """`[writers, readers]` or `[writers]` bool: what is compared."""
    graph = target.graph
    if level == "edge":
        return target.possible
    items = np.zeros(graph.n_writers, dtype=bool)
    for layer in range(graph.n_layers):
        items[graph.heads(layer)] = True
        items[graph.mlp(layer)] = level == "node" and not target.attention_only
    return items


def _truth(target: Reference, level: Level) -> np.ndarray:
    """`[writers, readers]` or `[writers]` bool: what is in the reference."""
    if level == "edge":
        return target.mask
    return target.head_mask | (target.circuit.node_mask[:-1] & (level == "node"))


def _key(ranking: Scores | NodeScores, target: Reference, by: By, level: Level) -> np.ndarray:
    """`[writers, readers]` or `[writers]`: what items rank by."""
    if isinstance(ranking, NodeScores):
        if level == "edge":
            raise ScoreError("node scores rank no edges: compare them at level='node' or 'head'")
        return ranking.key(by)
    key = np.where(target.possible, ranking.key(by), -np.inf)
    return key if level == "edge" else best_edge(target.graph, key)


def best_edge(graph: Graph, key: np.ndarray) -> np.ndarray:
    """`[writers]`: the highest key, `[writers, readers]`, of the edges out of a node and into it."""
    into = np.where(graph.serves, key.max(axis=0)[:, None], -np.inf).max(axis=0)
    return np.asarray(np.maximum(key.max(axis=1), into[:-1]))


def _mib(scores: Scores, target: Reference, by: By) -> float:
    """MIB's area under the ROC."""
    items = target.possible
    counts = [
        Counts.of(scores.greedy(int(part * scores.graph.n_edges), by).mask[items], target.mask[items])
        for part in MIB_SIZES
    ]
    fpr, tpr = (np.array([getattr(count, rate) for count in counts]) for rate in ("fall_out", "recall"))
    return trapezoid(fpr / fpr[-1], tpr)


def _by_class(circuit: Circuit, target: Reference) -> dict[str, ClassHeads]:
    """Which heads of each class the circuit has."""
    inside = set(circuit.nodes)
    classes = target.heads or {"heads": tuple(np.array(target.graph.writer_names)[target.head_mask].tolist())}
    return {
        kind: ClassHeads(tuple(h for h in names if h in inside), tuple(h for h in names if h not in inside))
        for kind, names in classes.items()
    }


# -------------------------------------------------------------------- rankings
def roc(scores: np.ndarray, truth: np.ndarray) -> Roc:
    """The curve of a ranking.

    Args:
        scores: `[items]`, highest first.
        truth: `[items]` bool.

    Raises:
        ScoreError: all items are true, or none: no curve.
    """
    positives = int(truth.sum())
    if not 0 < positives < len(truth):
        raise ScoreError(
            f"no ROC: {positives} of {len(truth)} items are in the reference, some in and some out are needed"
        )
    order = np.argsort(-scores, kind="stable")
    ranked = scores[order]
    last = np.append(np.flatnonzero(np.diff(ranked)), len(ranked) - 1)  # of each run of equal scores
    correct, found = np.cumsum(truth[order])[last], last + 1
    start = np.zeros(1)
    return Roc(
        np.append(np.inf, ranked[last]),
        np.append(start, (found - correct) / (len(truth) - positives)),
        np.append(start, correct / positives),
        np.append(np.nan, correct / found),
    )


def trapezoid(x: np.ndarray, y: np.ndarray) -> float:
    """Area under the straight lines between points."""
    return float(np.sum(np.diff(x) * (y[1:] + y[:-1]) / 2))
