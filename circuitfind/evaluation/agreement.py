"""Agreement with a reference circuit: how well scores rank its items, and how many of them a circuit contains.

1. Items are all edges (`level="edge"`), all heads and MLPs ("node"), or all heads ("head") of the model; those in the
   reference are true. Nothing is pruned.
2. Edges rank by |effect| or by effect (`by=`). A node ranks by its own score, or by its best edge in or out (one into a
   shared key/value head counts for each query head of the group).
3. A ranking gives an ROC whose thresholds are the distinct scores. Its area is the Mann-Whitney statistic: the chance
   that a random true item scores above a random other one, ties counting half. Average precision is the mean over true
   items of the precision at their threshold.
4. MIB's area (Mueller et al. 2025) for edges: circuits of ten sizes, 0.1% to 100% of all edges, are grown greedily from
   the logits and pruned; trapezoids between their points, without (0, 0), divided by the last false positive rate.
5. A circuit gives precision, recall, F1, its point in the ROC plane, and the heads of each class that it has. One that
   holds estimates for every edge is a ranking as well.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

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
PERCENTAGES = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0)  # MIB's fractions of all edges


def area_under(x: np.ndarray | Sequence[float], y: np.ndarray | Sequence[float]) -> np.ndarray:
    """Area under y `[..., points]` over `x [points]` by trapezoids, not divided by the range (MIB's CPR)."""
    y = np.asarray(y, dtype=np.float64)
    return np.asarray(((y[..., 1:] + y[..., :-1]) / 2 * np.diff(np.asarray(x, dtype=np.float64))).sum(-1))


def _ratio(part: int, whole: int) -> float:
    return part / whole if whole else float("nan")


class Counts(NamedTuple):
    """Confusion counts of the items found against the items of the reference."""

    true_positives: int
    false_positives: int
    false_negatives: int
    true_negatives: int

    @classmethod
    def of(cls, found: np.ndarray, truth: np.ndarray) -> Counts:
        pairs = ((found, truth), (found, ~truth), (~found, truth), (~found, ~truth))
        return cls(*(int((one & other).sum()) for one, other in pairs))

    @property
    def precision(self) -> float:
        """Fraction of the items found that are true; NaN if none were found."""
        return _ratio(self.true_positives, self.true_positives + self.false_positives)

    @property
    def recall(self) -> float:
        """True positive rate: fraction of the true items that were found."""
        return _ratio(self.true_positives, self.true_positives + self.false_negatives)

    @property
    def f1(self) -> float:
        """Harmonic mean of precision and recall; 0 if no true item was found."""
        return _ratio(2 * self.true_positives, 2 * self.true_positives + self.false_positives + self.false_negatives)

    @property
    def fall_out(self) -> float:
        """False positive rate: fraction of the other items that were found."""
        return _ratio(self.false_positives, self.false_positives + self.true_negatives)


@dataclass(frozen=True, eq=False)
class Roc:
    """ROC curve from (0, 0) to (1, 1): false and true positive rates and precision of the items that reach each
    threshold, `[thresholds + 1]`. The first threshold is infinite: no item reaches it, and its precision is NaN."""

    thresholds: np.ndarray
    fpr: np.ndarray
    tpr: np.ndarray
    precision: np.ndarray

    @property
    def area(self) -> float:
        """AUROC: 1 for a perfect ranking, 0.5 for a random one."""
        return float(area_under(self.fpr, self.tpr))

    @property
    def average_precision(self) -> float:
        """Average precision: 1 for a perfect ranking, about the fraction of true items for a random one."""
        return float(np.sum(np.diff(self.tpr) * self.precision[1:]))


class ClassHeads(NamedTuple):
    """Heads of one class of the reference: those in the circuit, and those missing from it."""

    recovered: tuple[str, ...]
    missed: tuple[str, ...]


@dataclass(frozen=True, eq=False, repr=False)
class Agreement(Result):
    """How well scores or a circuit agree with a reference circuit.

    Attributes:
        n_items, n_true: items, and how many of them are in the reference.
        auroc, average_precision: of the ranking; NaN without one, or if all items are true.
        mib_auroc: by MIB's ten greedy circuits; NaN without a ranking of edges.
        found: the circuit's counts, with its point in the ROC plane (`fall_out`, `recall`); None without a circuit.
        heads: by class of the reference; empty without a circuit.
        roc: of the ranking; None without one. Not saved.
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
    """Compare scores or a circuit with a reference circuit.

    Args:
        result: node scores by position are summed over positions.
        reference: a `Reference`, or what `circuitfind.reference` takes.
        by: what items rank by, "absolute" or "signed" (positive = supports) effects.
        level: "edge", "node" (heads and MLPs) or "head".

    Raises:
        ScoreError: another graph; node scores at the level of edges; a level where the reference holds nothing.
        FileError: no such reference.
    """
    target = reference if isinstance(reference, Reference) else named(reference)
    if level not in LEVELS:
        raise ScoreError(f"level='{level}' is unknown: use one of {', '.join(map(repr, LEVELS))}")
    if not isinstance(result, (Scores, NodeScores, Circuit)):
        raise ScoreError(f"scores or a circuit are compared with a reference, not a {type(result).__name__}")
    check_same_graph(result.graph, target)
    items, truth = _items(target, level)
    if not truth.any():
        raise ScoreError(f"reference '{target.name}' holds no {level}s to agree with: compare at another level")
    ranking = Scores.of(result) if isinstance(result, Circuit) else result
    key = None if ranking is None else _key(ranking, target, by, level)
    known: dict[str, Any] = {}
    if key is not None and not truth.all():
        curve = roc(key[items], truth)
        known = {"auroc": curve.area, "average_precision": curve.average_precision, "roc": curve}
    if level == "edge" and isinstance(ranking, Scores):
        known["mib_auroc"] = _mib(ranking, target, by)
    if isinstance(result, Circuit):
        cells = result.mask if level == "edge" else result.node_mask[:-1]
        known |= {"found": Counts.of(cells[items], truth), "heads": _by_class(result, target)}
    return Agreement(target.name, level, by, int(items.sum()), int(truth.sum()), **known)


def levels_of(target: Reference) -> list[Level]:
    """Return the levels at which a reference has items."""
    return [level for level in LEVELS if _items(target, level)[1].any()]


def check_same_graph(graph: Graph, target: Reference) -> None:
    """Raise a `ScoreError` if the reference circuit belongs to another graph."""
    if graph == target.graph:
        return
    mine, other = (f"{one} (d_model {one.d_model})" for one in (graph, target.graph))
    grouped = "; open the reference's file with graph=model.graph, which groups its keys and values"
    hint = grouped if graph.ungrouped() == target.graph else ""
    raise ScoreError(f"these belong to {mine}, the reference '{target.name}' to {other}{hint}")


def _items(target: Reference, level: Level) -> tuple[np.ndarray, np.ndarray]:
    """Return which edges `[writers, readers]` or nodes `[writers]` are compared, and `[items]` bool, which of these are
    in the reference."""
    graph = target.graph
    if level == "edge":
        return target.possible, target.mask[target.possible]
    items = np.zeros(graph.n_writers, dtype=bool)
    for layer in range(graph.n_layers):
        items[graph.heads(layer)] = True
        items[graph.mlp(layer)] = level == "node" and not target.attention_only
    return items, (target.head_mask | (target.circuit.node_mask[:-1] & (level == "node")))[items]


def _key(ranking: Scores | NodeScores, target: Reference, by: By, level: Level) -> np.ndarray:
    """Return the values that items are ranked by, `[writers, readers]` or `[writers]`."""
    if isinstance(ranking, NodeScores):
        if level == "edge":
            raise ScoreError("node scores rank no edges: compare them at level='node' or 'head'")
        return ranking.key(by)
    key = np.where(target.possible, ranking.key(by), -np.inf)
    if level == "edge":
        return key
    into = np.where(target.graph.serves, key.max(axis=0)[:, None], -np.inf).max(axis=0)
    return np.asarray(np.maximum(key.max(axis=1), into[:-1]))  # a node's best edge, out or in


def _mib(scores: Scores, target: Reference, by: By) -> float:
    """Return MIB's area under the ROC."""
    items, sizes = target.possible, [int(part * scores.graph.n_edges) for part in PERCENTAGES]
    counts = [Counts.of(scores.greedy(size, by).mask[items], target.mask[items]) for size in sizes]
    fpr, tpr = (np.array([getattr(count, rate) for count in counts]) for rate in ("fall_out", "recall"))
    return float(area_under(fpr / fpr[-1], tpr))


def _by_class(circuit: Circuit, target: Reference) -> dict[str, ClassHeads]:
    """Return which heads of each class are in the circuit, and which are not."""
    inside = set(circuit.nodes)
    classes = target.heads or {"heads": tuple(np.array(target.graph.writer_names)[target.head_mask].tolist())}
    return {
        kind: ClassHeads(tuple(h for h in names if h in inside), tuple(h for h in names if h not in inside))
        for kind, names in classes.items()
    }


def roc(scores: np.ndarray, truth: np.ndarray) -> Roc:
    """Return the ROC curve of scores `[items]` (higher = more likely in the reference) against `truth`, `[items]` bool.
    Raises a `ScoreError` if all items are true, or none."""
    positives = int(truth.sum())
    if not 0 < positives < len(truth):
        raise ScoreError(
            f"no ROC: {positives} of {len(truth)} items are in the reference, some in and some out are needed"
        )
    order = np.argsort(-scores, kind="stable")
    ranked = scores[order]
    last = np.append(np.flatnonzero(np.diff(ranked)), len(ranked) - 1)  # of each run of equal scores
    correct, found = np.cumsum(truth[order])[last], last + 1
    fpr, tpr = (found - correct) / (len(truth) - positives), correct / positives
    return Roc(
        np.append(np.inf, ranked[last]), np.append(0.0, fpr), np.append(0.0, tpr), np.append(np.nan, correct / found)
    )
