"""Stability: how much of a circuit belongs to the task, and how much to the pairs that it was found on.

1. A sample is a list of row numbers, with repeats, into the pairs of all tasks, copies left out. One task's pairs are
   drawn with replacement (the bootstrap); of several tasks (templates, seeds of the generator, ...), each is a sample.
2. Each sample gives a circuit. From scores: each pair's edge scores are computed once, a sample's scores are their mean
   over its rows, its circuit the top of them. From a search: a function from a task to a circuit runs on each sample.
3. Agreement: the Jaccard index of each two circuits, the rank correlation of each two score matrices, how often each
   edge is in, and which edges are in at least 90%.
4. Baselines: of one task, the same at smaller samples, which says whether more pairs would help; of several, the same
   with their pairs dealt out anew at random: what is lost below that is due to the tasks.

Bootstrap samples share pairs (each holds 63% of them on average), so they agree more than independent samples would; a
bar of 0.8 with 100 resamples has been proposed for a circuit to count as stable.
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
    """Samples of one size: their mean Jaccard index, and what 95% of the values lie between."""

    n_pairs: int
    jaccard: float
    interval: Interval


class EdgeFrequency(NamedTuple):
    """The share of the circuits that an edge is in."""

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
        labels, sizes, circuits: of each sample its name, number of pairs and circuit.
        jaccards: `[samples, samples]`, shared edges over all edges of the two.
        rank_correlations: `[samples, samples]`, Spearman's, of what edges are ranked by; None after a search.
        curve: by size of the sample, ascending; empty for several tasks.
        shuffled: of several tasks, the mean Jaccard index when their pairs are dealt out anew at random; else None.
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
        """What 95% of the pairs' Jaccard indices lie between."""
        return _spread(self.jaccards)

    @property
    def rank_correlation(self) -> float:
        """Mean over pairs of samples; NaN without scores."""
        return float("nan") if self.rank_correlations is None else float(_between(self.rank_correlations).mean())

    @property
    def frequency(self) -> np.ndarray:
        """`[writers, readers]`: the share of the circuits that an edge is in."""
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
        """The edges in at least this share of the circuits (they need not be connected)."""
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
    """Finds a circuit on many samples of a task, and says how far they agree.

    Args:
        task: one task, whose pairs are resampled; or several by name, each of them a sample
            (`circuitfind.by_template`, `circuitfind.by_seed`).
        method: "eap", "eap-ig-inputs", "clean-corrupted", "relp", "gim" or "exact".
        n_edges, by: a circuit is `scores.top(n_edges, by)`.
        resamples: bootstrap samples at each size; of several tasks, about how many circuits of shuffled pairs.
        sizes: of the samples for the curve, in pairs; by default 4, 8, 16, ... and all, or none with `search`.
        search: a function from a bound task to a circuit, run on each sample in place of method, n_edges and by.
        asked: keywords (seed: of the samples, too) and options of the method, as for `circuitfind.attribute`.

    Raises:
        ScoreError: the method cannot score this example by example, or a number makes no sense.
        TaskError: fewer than two pairs or tasks.
    """
    check_count("resamples", resamples, 2)
    several, chosen = isinstance(task, Mapping), method_of(method)
    named = task if isinstance(task, Mapping) else {"pairs": task}
    request, setting = request_of(chosen, "edge", None, asked)
    tasks, each = list(map(str, named)), [Experiment.of(model, one, setting) for one in named.values()]
    each = [one.on(one.bound.distinct()) for one in each]
    if several and len(tasks) < 2:
        raise TaskError(f"{len(tasks)} tasks cannot be compared: give two or more, or one alone to resample its pairs")
    if several and sizes is not None:
        raise ScoreError("sizes are of samples of one task's pairs: give one task, or leave sizes out")
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
    """The values of each two samples."""
    return matrix[np.triu_indices(len(matrix), k=1)]


def _spread(matrix: np.ndarray) -> Interval:
    return Interval(*map(float, np.quantile(_between(matrix), [0.025, 0.975])))


def _sizes(given: Sequence[int] | None, n: int, by_default: bool) -> list[int]:
    if n < 2:
        raise TaskError("one pair cannot be resampled: give at least two, better thirty")
    if given is None:
        doubling = [SMALLEST_SAMPLE * 2**k for k in range(n.bit_length()) if SMALLEST_SAMPLE * 2**k < n]
        return [*doubling, n] if by_default else []
    for size in given:
        check_count("sizes", size, 1, n)
    return sorted(set(given))


class _Drawn(NamedTuple):
    """The samples' circuits, and what edges were ranked by, `[samples, edges]`; None after a search."""

    circuits: tuple[Circuit, ...]
    keys: np.ndarray | None = None

    def jaccards(self) -> np.ndarray:
        """`[samples, samples]`: shared edges over all edges of the two; 1 for two empty circuits."""
        masks = np.stack([circuit.mask[circuit.graph.real] for circuit in self.circuits]).astype(np.float32)
        shared, size = (masks @ masks.T).astype(np.float64), masks.sum(axis=1, dtype=np.float64)
        union = np.add.outer(size, size) - shared
        return np.asarray(np.divide(shared, union, out=np.ones_like(shared), where=union > 0))

    def rank_correlations(self) -> np.ndarray | None:
        """`[samples, samples]`: Spearman's, over all edges."""
        return None if self.keys is None else np.corrcoef(np.stack([ranks(key) for key in self.keys]))


class FromScores:
    """Circuits cut from scores that are means over pairs."""

    def __init__(
        self, experiments: Sequence[Experiment], method: Method, request: Request, n_edges: int, by: By
    ) -> None:
        self.graph, self.n_edges, self.by, self.method = experiments[0].graph, n_edges, by, method.name
        check_by_example(method)
        self.settings: dict[str, Any] = {"n_edges": n_edges, "by": by}
        self.cut(np.zeros(self.graph.n_edges))  # refuses an n_edges or by that makes no sense, before anything runs
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
        """`[edges]`, the mean over these pairs."""
        weights = np.bincount(rows, minlength=len(self.effects)) / len(rows)
        return np.asarray(weights.astype(np.float32) @ self.effects)

    def cut(self, scores: np.ndarray) -> Circuit:
        values = np.zeros(self.graph.real.shape, dtype=np.float32)
        values.T[self.graph.real.T] = scores
        cut = Scores(self.graph, values, Record(method=self.method)).top(self.n_edges, self.by)
        return replace(cut, estimates=None)  # thousands of circuits need not carry their scores


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
