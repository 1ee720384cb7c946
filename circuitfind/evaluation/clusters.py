"""Clusters: whether a task's pairs share one circuit or use several.

1. Each pair has its own vector of edge scores, divided by its norm, so that only the relative strength of edges counts.
   (Data-driven circuits, arXiv:2605.09129, cluster EAP-IG's scores of single examples.)
2. Ward's tree over the pairs is cut into 2, 3, ... clusters. The cut with the largest mean silhouette (pairs near to
   their own cluster and far from the next one) is the candidate. Clusters of fewer than 4 pairs are dissolved: their
   pairs go to the nearest cluster.
3. Any set of points can be cut. So the candidate's silhouette is compared with those of samples from one normal
   distribution, with as many pairs and the same variance along the same directions (SigClust, Liu et al. 2008), cut in
   the same way. Unless at most 5% of these have as large a silhouette, there is one cluster.
4. A cluster's scores are the means over its pairs; its circuit is the top edges by these scores.
5. Scores that vary continuously (with the year of a date) are not normal either, and are cut at an arbitrary point. So
   every circuit is run on every cluster's pairs. Clusters are merged if their circuits are as faithful on each other's
   pairs as the pairs' own circuits, within the tolerance of `find`.

Templates that use different paths are clusters, too: the labels say which pairs belong together, not why.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple, Unpack

import numpy as np
from scipy.cluster.hierarchy import fcluster, ward
from scipy.sparse.csgraph import connected_components
from scipy.spatial.distance import pdist, squareform

from circuitfind.attribution.attribute import ScoreKeywords
from circuitfind.attribution.by_example import check_by_example, example_effects
from circuitfind.attribution.methods import method_of, request_of
from circuitfind.calls import model_call
from circuitfind.circuit import Circuit
from circuitfind.engine.experiment import Experiment
from circuitfind.errors import ScoreError, TaskError, check_count
from circuitfind.evaluation.faithfulness import Evaluator
from circuitfind.graph import Graph
from circuitfind.models.load import Model
from circuitfind.progress import track
from circuitfind.record import Record
from circuitfind.result import UNSAVED, By, Result
from circuitfind.scores import Scores
from circuitfind.tasks.task import BoundTask, Task

LEVEL = 0.05
SMALLEST = 4  # pairs of a cluster: fewer are outliers
AS_WELL = 0.15  # how much larger |1 - faithfulness| may be on other pairs than that of the pairs' own circuit


class Cut(NamedTuple):
    """A number of clusters, and the mean silhouette (-1 to 1) of the pairs in that many clusters."""

    clusters: int
    silhouette: float


class Cluster(NamedTuple):
    """A cluster: its number, its number of pairs, the number of edges in its circuit, and how many of these are in no
    other cluster's circuit."""

    cluster: int
    pairs: int
    edges: int
    own_edges: int


@dataclass(frozen=True, eq=False, repr=False)
class Clusters(Result):
    """Clusters of a task's pairs, each with a circuit. There is one, unless the scores are divided more clearly than
    those of one normal distribution and the circuits fail on each other's pairs.

    Attributes:
        labels: `[pairs]`, the cluster of each pair, from 0; larger clusters have smaller numbers.
        cuts: silhouettes by number of clusters; the cut with the largest one is the candidate.
        p_value: fraction of samples from one normal distribution that look as divided as the candidate.
        circuits: one for each cluster.
        served: `[parts, parts + 1]`, faithfulness on the pairs of each part of the candidate (row) of the circuit of
            each part and, in the last column, of the circuit of all pairs; larger parts first. Empty if the scores are
            not divided (p_value above 0.05).
        joined: cluster of each part: parts whose circuits are faithful on each other's pairs are one cluster.
        index: adjusted Rand index with the given labels (1 = the same division, 0 = chance); None without labels.
        scores: mean scores of each cluster's pairs; not saved.
    """

    FORMAT, ROWS = "circuitfind.clusters", "clusters"
    DERIVED = ("clusters",)

    labels: tuple[int, ...]
    cuts: tuple[Cut, ...]
    p_value: float
    circuits: tuple[Circuit, ...]
    index: float | None
    served: tuple[tuple[float, ...], ...]
    joined: tuple[int, ...]
    record: Record
    scores: tuple[Scores, ...] = field(default=(), metadata=UNSAVED)

    def __len__(self) -> int:
        return len(self.circuits)

    @property
    def clusters(self) -> tuple[Cluster, ...]:
        masks, counts = np.stack([one.mask for one in self.circuits]), np.bincount(self.labels)
        own = (masks & (masks.sum(0) == 1)).sum((1, 2))
        return tuple(
            Cluster(k, int(counts[k]), len(one), int(own[k]) if len(self) > 1 else len(one))
            for k, one in enumerate(self.circuits)
        )

    def shown(self) -> dict[str, Any]:
        return {"n_clusters": len(self), **super().shown()}

    def rows_of(self, cluster: int) -> list[int]:
        """Return the row numbers of a cluster's pairs, for `task.on(model).subset(rows)`."""
        return np.flatnonzero(np.array(self.labels) == cluster).tolist()


@model_call
def clusters(
    model: Model,
    task: Task | BoundTask,
    *,
    method: str = "eap-ig-inputs",
    n_edges: int = 200,
    by: By = "absolute",
    most: int = 6,
    draws: int = 200,
    labels: Sequence[Any] | None = None,
    **asked: Unpack[ScoreKeywords],
) -> Clusters:
    """Divide a task's pairs into clusters that use different circuits, if there is evidence for more than one.

    Args:
        method: one that scores pair by pair: "eap", "eap-ig-inputs", "clean-corrupted", "relp", "exact".
        n_edges, by: a circuit is `scores.top(n_edges, by)`.
        most: the largest number of clusters that is tried.
        draws: number of normal samples that the division is compared with.
        labels: one label a pair (template, task), to compare the clusters with.
        asked: keywords (seed: of the normal samples, too) and options of the method, as for `circuitfind.attribute`.

    Raises:
        ScoreError: the method cannot score pair by pair, or a number makes no sense.
        TaskError: fewer than 8 different pairs, or not one label a pair.
    """
    check_count("most", most, 2)
    check_count("draws", draws, 20)
    chosen = method_of(method)
    check_by_example(chosen)
    request, setting = request_of(chosen, "edge", None, asked)
    experiment = Experiment.of(model, task, setting)
    whole, bound = experiment.bound, experiment.bound.distinct()
    if labels is not None and len(labels) != len(whole):
        raise TaskError(f"{len(labels)} labels for {len(whole)} pairs: give one a pair")
    if len(bound) < 2 * SMALLEST:
        raise TaskError(f"{len(bound)} different pairs cannot be divided: give at least {2 * SMALLEST}, better 30")
    graph, effects = experiment.graph, example_effects(experiment.on(bound), chosen, request)
    lengths = np.linalg.norm(effects, axis=1, keepdims=True)
    if not lengths.all():
        raise ScoreError(f"pair {whole.first[np.argmin(lengths)]} has no score at any edge: leave it out")
    points = _in_few_axes((effects / lengths).astype(np.float64))
    cuts = _cuts(points, most)
    best, found = max(cuts, key=lambda cut: cut[0].silhouette, default=(Cut(1, 0.0), np.zeros(len(points), int)))
    rng, spread = np.random.default_rng(experiment.setting.seed), points.std(0)
    clouds = (rng.normal(size=points.shape) * spread for _ in track(range(draws), "single clouds"))
    apart = sum(max((cut.silhouette for cut, _ in _cuts(one, most)), default=0.0) >= best.silhouette for one in clouds)
    p_value = (1 + apart) / (1 + draws)
    record = experiment.record(chosen.name, n_edges=n_edges, by=by, most=most, draws=draws)
    found = _ranks(np.bincount(found))[found] if p_value <= LEVEL else np.zeros_like(found)
    served, joined = np.ones((0, 0)), np.zeros(1, int)
    if found.any():
        parts = (*_means(graph, effects, found, record), *_means(graph, effects, np.zeros_like(found), record))
        masks = np.stack([one.top(n_edges, by).mask for one in parts])
        served = _served(Evaluator(experiment.on(bound)), masks, found)
        joined = _joined(served)
        joined = _ranks(np.bincount(joined[found]))[joined]
        found = joined[found]
    scores = _means(graph, effects, found, record)
    by_pair = found[whole.copies]
    index = None if labels is None else adjusted_rand(by_pair.tolist(), labels)
    return Clusters(
        tuple(by_pair.tolist()),
        tuple(cut for cut, _ in cuts),
        p_value,
        tuple(one.top(n_edges, by) for one in scores),
        index,
        tuple(map(tuple, served.tolist())),
        tuple(joined.tolist()),
        record,
        scores,
    )


def _ranks(counts: np.ndarray) -> np.ndarray:
    """Return the rank of each count, 0 = the largest."""
    return np.argsort(np.argsort(-counts, kind="stable"))


def _means(graph: Graph, effects: np.ndarray, labels: np.ndarray, record: Record) -> tuple[Scores, ...]:
    """Return the mean scores of the pairs with each label."""
    found = []
    for rows in np.eye(labels.max() + 1, dtype=bool)[labels].T:
        values = np.zeros(graph.real.shape, dtype=np.float32)
        values.T[graph.real.T] = effects[rows].mean(0)
        found.append(Scores(graph, values, replace(record, n_examples=int(rows.sum()), pairs="")))
    return tuple(found)


def _served(evaluator: Evaluator, masks: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Return the faithfulness of each circuit on each cluster's pairs, `[clusters, circuits]`."""
    inside = np.eye(labels.max() + 1)[labels]  # pairs clusters
    with np.errstate(divide="ignore", invalid="ignore"):  # NaN without contrast on a cluster's pairs: joins none
        found = (evaluator.run(masks).metric - evaluator.empty) @ inside / ((evaluator.full - evaluator.empty) @ inside)
    return np.asarray(found.T)


def _joined(served: np.ndarray) -> np.ndarray:
    """Return each cluster's number after merging those whose circuits are as faithful on each other's pairs.

    >>> _joined(np.array([[0.98, 0.93, 0.4], [1.02, 1.0, 0.9], [0.9, 0.6, 0.99]])).tolist()
    [0, 0, 1]
    """
    off = np.abs(1 - served[:, : len(served)])
    serves = off <= np.diag(off)[:, None] + AS_WELL  # clusters circuits
    return np.asarray(connected_components(serves & serves.T, directed=False)[1])


def _in_few_axes(points: np.ndarray) -> np.ndarray:
    """Return the points about their mean in the coordinates of their principal axes, `[pairs, axes]`."""
    left, sizes, _ = np.linalg.svd(points - points.mean(0), full_matrices=False)
    return np.asarray(left * sizes)


def _cuts(points: np.ndarray, most: int) -> list[tuple[Cut, np.ndarray]]:
    """Return, for each number of clusters, the silhouette and each pair's cluster; pairs of clusters that are too small
    go to the nearest."""
    distances, tree = squareform(pdist(points)), ward(points)
    found: dict[int, tuple[Cut, np.ndarray]] = {}
    for n in range(2, len(points) // SMALLEST + most):
        labels = fcluster(tree, n, "maxclust")
        kept = np.flatnonzero(np.bincount(labels) >= SMALLEST)
        if not 2 <= len(kept) <= most or len(kept) in found:
            continue
        inside = labels[:, None] == kept  # pairs clusters
        labels = np.where(inside.any(1), inside.argmax(1), (distances @ inside / inside.sum(0)).argmin(1))
        found[len(kept)] = Cut(len(kept), silhouette(distances, labels)), labels
    return [found[n] for n in sorted(found)]


def silhouette(distances: np.ndarray, labels: np.ndarray) -> float:
    """Return the mean over points of (b - a) / max(a, b): a = mean distance within the cluster, b = mean distance to
    the nearest other cluster (Rousseeuw 1987).

    >>> silhouette(np.abs(np.subtract.outer([0.0, 1, 9, 10], [0.0, 1, 9, 10])), np.array([0, 0, 1, 1])).__round__(3)
    0.889
    """
    rows, inside = np.arange(len(labels)), np.eye(labels.max() + 1)[labels]  # points clusters
    sizes, sums = inside.sum(0), distances @ inside
    own = sums[rows, labels] / np.maximum(sizes[labels] - 1, 1)
    others = sums / sizes
    others[rows, labels] = np.inf
    nearest = others.min(1)
    return float(((nearest - own) / np.maximum(np.maximum(nearest, own), 1e-30)).mean())


def adjusted_rand(one: Sequence[Any], other: Sequence[Any]) -> float:
    """Return how well two divisions of the same items agree: 1 = the same, 0 = chance (Hubert & Arabie 1985).

    >>> adjusted_rand([0, 0, 1, 1], ["b", "b", "a", "a"]), adjusted_rand([0, 0, 0, 0], [0, 0, 1, 1])
    (1.0, 0.0)
    """
    first, second = (np.unique(list(map(str, labels)), return_inverse=True)[1] for labels in (one, other))
    table = np.zeros((first.max() + 1, second.max() + 1))
    np.add.at(table, (first, second), 1)
    together, rows, columns, pairs = (
        float((counts * (counts - 1) / 2).sum())
        for counts in (table, table.sum(1), table.sum(0), np.array([len(first)]))
    )
    chance, largest = rows * columns / pairs, (rows + columns) / 2
    return (together - chance) / (largest - chance) if largest > chance else 1.0
