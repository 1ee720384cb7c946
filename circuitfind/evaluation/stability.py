"""Stability: how much of a circuit depends on the task, and how much on the pairs it was found on.

1. Draw samples of pairs, after removing copies. With one task, its pairs are drawn with replacement (bootstrap). With
   several tasks (templates, seeds of the generator, ...), each task is a sample.
2. Make a circuit from each sample. From scores: the edge scores of each pair are computed once and averaged over the
   sample, and the top edges are the circuit. From a search: a function from a task to a circuit is called on each
   sample.
3. Measure agreement: the Jaccard index of each two circuits, the rank correlation of each two score matrices, the
   frequency of each edge, and the edges in at least 90% of circuits.
4. Compare with a baseline. With one task: smaller samples, which show whether more pairs would help. With several: the
   same pairs divided at random; agreement lost relative to that is due to the tasks.

Bootstrap samples share pairs (each contains 63% of them on average), so they agree more than independent samples would.
A Jaccard index of 0.8 over 100 resamples has been proposed as the threshold for a stable circuit.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Any, NamedTuple, Unpack

import numpy as np

from circuitfind.attribution.attribute import ScoreKeywords
from circuitfind.attribution.by_example import check_by_example, example_effects
from circuitfind.attribution.method import Method, Request
from circuitfind.attribution.methods import method_of, request_of
from circuitfind.calls import model_call
from circuitfind.circuit import Circuit, as_circuit
from circuitfind.engine.experiment import Experiment
from circuitfind.errors import ScoreError, TaskError, check_count
from circuitfind.models.load import Model
from circuitfind.progress import track
from circuitfind.record import Record
from circuitfind.result import Result
from circuitfind.scores import By, Scores
from circuitfind.statistics import Interval, ranks
from circuitfind.tasks.task import BoundTask, Task

Search = Callable[[BoundTask], Circuit]
STABLE = 0.9
SMALLEST_SAMPLE = 4


class SizePoint(NamedTuple):
    """Samples of one size: mean Jaccard index, and the interval that contains 95% of the indices."""

    n_pairs: int
    jaccard: float
    interval: Interval


class EdgeFrequency(NamedTuple):
    """An edge, and the fraction of circuits that contain it."""

    edge: str
    frequency: float


class Sample(NamedTuple):
    """A sample's name, number of pairs, and number of edges of its circuit."""

    name: str
    pairs: int
    edges: int


@dataclass(frozen=True, eq=False, repr=False)
class Stability(Result):
    """How circuits of several samples agree; rows are the stable edges.

    Attributes:
        labels, sizes, circuits: name, number of pairs and circuit of each sample.
        jaccards: `[samples, samples]`, shared edges divided by all edges of the two circuits.
        rank_correlations: `[samples, samples]`, Spearman's rho of the ranking scores; None after a search.
        curve: by sample size, ascending; empty for several tasks.
        shuffled: mean Jaccard index if the pairs of several tasks are divided at random; None for one task.
    """

    FORMAT, ROWS = "circuitfind.stability", "stable"
    DERIVED = ("samples", "jaccard", "interval", "rank_correlation", "stable")

    labels: tuple[str, ...]
    sizes: tuple[int, ...]
    circuits: tuple[Circuit, ...]
    jaccards: np.ndarray
    rank_correlations: np.ndarray | None
    curve: tuple[SizePoint, ...]
    shuffled: float | None
    record: Record

    @property
    def jaccard(self) -> float:
        """Mean over pairs of samples."""
        return float(_between(self.jaccards).mean())

    @property
    def interval(self) -> Interval:
        """Interval that contains 95% of the Jaccard indices."""
        return _spread(self.jaccards)

    @property
    def rank_correlation(self) -> float:
        """Mean over pairs of samples; NaN without scores."""
        return float("nan") if self.rank_correlations is None else float(_between(self.rank_correlations).mean())

    @property
    def frequency(self) -> np.ndarray:
        """`[writers, readers]`: fraction of circuits that contain the edge."""
        return np.asarray(np.mean([circuit.mask for circuit in self.circuits], axis=0))

    @property
    def stable(self) -> list[EdgeFrequency]:
        """Edges in at least 90% of the circuits with their frequency, most frequent first."""
        core, frequency = self.core(), self.frequency
        rows = (EdgeFrequency(name, float(frequency[core.graph.edge(name)])) for name in core.edges)
        return sorted(rows, key=lambda row: -row.frequency)

    @property
    def samples(self) -> tuple[Sample, ...]:
        return tuple(map(Sample, self.labels, self.sizes, map(len, self.circuits)))

    def shown(self) -> dict[str, Any]:
        return {"n_circuits": len(self.circuits), **super().shown(), "n_stable": len(self.stable)}

    def core(self, share: float = STABLE) -> Circuit:
        """Edges in at least this fraction of circuits; they need not be connected."""
        graph = self.circuits[0].graph
        return Circuit(graph, (self.frequency >= share) & graph.real, record=self.record.with_settings(share=share))


@model_call
def stability(
    model: Model,
    task: Task | BoundTask | Mapping[str, Task | BoundTask],
    *,
    method: str = "eap-ig-inputs",
    n_edges: int = 200,
    by: By = "absolute",
    resamples: int = 100,
    sizes: Sequence[int] | None = None,
    search: Search | None = None,
    **asked: Unpack[ScoreKeywords],
) -> Stability:
    """Find a circuit on many samples of a task, and measure how far the circuits agree.

    Args:
        task: one task, whose pairs are resampled, or several tasks by name, each of which is a sample
            (`circuitfind.by_template`, `circuitfind.by_seed`).
        method: "eap", "eap-ig-inputs", "clean-corrupted", "relp", "gim" or "exact".
        n_edges, by: each circuit is `scores.top(n_edges, by)`.
        resamples: number of bootstrap samples of each size; with several tasks, about the number of shuffled circuits.
        sizes: sample sizes of the curve, in pairs. Default: 4, 8, 16, ... and all; none with `search`.
        search: a function from a bound task to a circuit, used instead of method, n_edges and by.
        asked: keywords (the seed also draws the samples) and options of the method, as for `circuitfind.attribute`.

    Raises:
        ScoreError: the method cannot score examples separately, or a number is out of range.
        TaskError: fewer than two pairs or tasks.
    """
    check_count("resamples", resamples, 2)
    several, chosen = isinstance(task, Mapping), method_of(method)
    named = task if isinstance(task, Mapping) else {"pairs": task}
    request, setting = request_of(chosen, "edge", None, asked)
    tasks, each = list(map(str, named)), [Experiment.of(model, one, setting) for one in named.values()]
    each = [one.on(one.bound.distinct()) for one in each]
    if several and len(tasks) < 2:
        raise TaskError(
            f"{len(tasks)} tasks cannot be compared: give two or more, or a single task to resample its pairs"
        )
    if several and sizes is not None:
        raise ScoreError("sizes apply to samples of a single task: give one task, or leave out sizes")
    if not several:
        sizes = _sizes(sizes, len(each[0]), search is None)
    source: FromScores | _FromSearch
    if search is None:
        source = FromScores(each, chosen, request, n_edges, by)
    else:
        source = _FromSearch(model, [one.bound for one in each], search)
    rng, n, cuts = np.random.default_rng(each[0].setting.seed), source.ends[-1], source.ends[:-1]
    curve, shuffled = [], None
    if several:
        parts = np.split(np.arange(n), cuts)
        samples, labels = source.draw(parts, "tasks"), tuple(tasks)
        if search is None:
            deals = (np.split(rng.permutation(n), cuts) for _ in range(max(1, resamples // len(parts))))
            shuffled = float(np.mean([_between(source.draw(deal, "shuffled pairs").jaccards()) for deal in deals]))
    else:
        parts = [rng.integers(n, size=n) for _ in range(resamples)]
        samples, labels = source.draw(parts, "samples"), tuple(f"sample {k}" for k in range(1, resamples + 1))
        for size in sizes or ():
            drawn = samples
            if size < n:
                smaller = [rng.integers(n, size=size) for _ in range(resamples)]
                drawn = source.draw(smaller, f"samples of {size} pairs")
            jaccards = drawn.jaccards()
            curve.append(SizePoint(size, float(_between(jaccards).mean()), _spread(jaccards)))
    settings: dict[str, Any] = {**source.settings, "resamples": resamples, "tasks": tasks}
    agreement = samples.jaccards(), samples.rank_correlations()
    record = each[0].record(source.method, **settings)
    return Stability(labels, tuple(map(len, parts)), samples.circuits, *agreement, tuple(curve), shuffled, record)


def _between(matrix: np.ndarray) -> np.ndarray:
    """Values of each two different samples."""
    return matrix[np.triu_indices(len(matrix), k=1)]


def _spread(matrix: np.ndarray) -> Interval:
    return Interval(*map(float, np.quantile(_between(matrix), [0.025, 0.975])))


def _sizes(given: Sequence[int] | None, n: int, by_default: bool) -> list[int]:
    if n < 2:
        raise TaskError("a single pair cannot be resampled: give at least 2, better 30")
    if given is None:
        doubling = [SMALLEST_SAMPLE * 2**k for k in range(n.bit_length()) if SMALLEST_SAMPLE * 2**k < n]
        return [*doubling, n] if by_default else []
    for size in given:
        check_count("sizes", size, 1, n)
    return sorted(set(given))


class _Drawn(NamedTuple):
    """Circuits of the samples, and their ranking scores `[samples, edges]`; None after a search."""

    circuits: tuple[Circuit, ...]
    keys: np.ndarray | None = None

    def jaccards(self) -> np.ndarray:
        """`[samples, samples]`: shared edges divided by all edges of the two; 1 for two empty circuits."""
        masks = np.stack([circuit.mask[circuit.graph.real] for circuit in self.circuits]).astype(np.float32)
        shared, size = (masks @ masks.T).astype(np.float64), masks.sum(axis=1, dtype=np.float64)
        union = np.add.outer(size, size) - shared
        return np.asarray(np.divide(shared, union, out=np.ones_like(shared), where=union > 0))

    def rank_correlations(self) -> np.ndarray | None:
        """`[samples, samples]`: Spearman's rho over all edges."""
        return None if self.keys is None else np.corrcoef(np.stack([ranks(key) for key in self.keys]))


class FromScores:
    """Circuits made from scores averaged over samples of pairs."""

    def __init__(
        self, experiments: Sequence[Experiment], method: Method, request: Request, n_edges: int, by: By
    ) -> None:
        self.graph, self.n_edges, self.by, self.method = experiments[0].graph, n_edges, by, method.name
        check_by_example(method)
        self.settings: dict[str, Any] = {"n_edges": n_edges, "by": by}
        self.cut(np.zeros(self.graph.n_edges))  # raises for an invalid n_edges or by before anything runs
        self.ends = list(accumulate(map(len, experiments)))
        self.effects = np.concatenate([example_effects(one, method, request) for one in experiments])

    def draw(self, samples: Sequence[np.ndarray], label: str) -> _Drawn:
        circuits, keys = [], []
        for rows in track(samples, label):
            scores = self.scores(rows)
            circuits.append(self.cut(scores))
            keys.append(np.abs(scores) if self.by == "absolute" else scores)
        return _Drawn(tuple(circuits), np.stack(keys))

    def scores(self, rows: np.ndarray) -> np.ndarray:
        """`[edges]`: mean scores over these pairs."""
        weights = np.bincount(rows, minlength=len(self.effects)) / len(rows)
        return np.asarray(weights.astype(np.float32) @ self.effects)

    def cut(self, scores: np.ndarray) -> Circuit:
        values = np.zeros(self.graph.real.shape, dtype=np.float32)
        values.T[self.graph.real.T] = scores
        cut = Scores(self.graph, values, Record(method=self.method)).top(self.n_edges, self.by)
        return replace(cut, estimates=None)  # to save memory in thousands of circuits


class _FromSearch:
    """Circuits found by a search on each sample."""

    def __init__(self, model: Model, tasks: Sequence[BoundTask], search: Search) -> None:
        self.graph, self.tasks, self.search = model.graph, tasks, search
        self.method = getattr(search, "__name__", type(search).__name__)
        self.settings: dict[str, Any] = {"search": self.method}
        self.ends = list(accumulate(map(len, tasks)))

    def draw(self, samples: Sequence[np.ndarray], label: str) -> _Drawn:
        return _Drawn(tuple(self._found(rows) for rows in track(samples, label)))

    def _found(self, rows: np.ndarray) -> Circuit:
        which = int(np.searchsorted(self.ends, rows[0], side="right"))
        start = self.ends[which] - len(self.tasks[which])
        return as_circuit(self.graph, self.search(self.tasks[which].subset((rows - start).tolist())))
