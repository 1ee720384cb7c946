"""Stability: how much of a circuit is the behaviour's, and how much belongs to the pairs that it was found on.

1. Samples. Of one task: its pairs drawn with replacement (the bootstrap). Of several tasks (templates, seeds of the
   generator, anything): each task is a sample.
2. A circuit of each sample (`samples.py`): cut from its scores, or found by a search.
3. Agreement: the Jaccard index of each pair of circuits, the rank correlation of each pair of scores, how often each
   edge is in, and which edges are in at least 90%.
4. What to hold that against. Of one task, the same at smaller samples: the curve says whether more pairs would help.
   Of several, the same with all their pairs dealt out anew at random: what is lost below that is due to the tasks.

Bootstrap samples share pairs (each holds 63% of them on average), so they agree more than independent samples would;
a bar of 0.8 with 100 resamples has been proposed for a circuit to count as stable.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, NamedTuple, Unpack

import numpy as np

from circuitfind.attribution.attribute import ScoreKeywords
from circuitfind.attribution.methods import method_of, request_of
from circuitfind.circuit import Circuit
from circuitfind.engine.experiment import Experiment
from circuitfind.errors import ScoreError, TaskError, check_count
from circuitfind.evaluation.samples import Samples, Scored, Search, Searched, Source
from circuitfind.models.load import Model
from circuitfind.record import Record
from circuitfind.remote.call import remotable
from circuitfind.scores import By
from circuitfind.statistics import Interval
from circuitfind.tasks.task import BoundTask, Task

STABLE = 0.9
SMALLEST_SAMPLE = 4


class SizePoint(NamedTuple):
    """Agreement of samples of so many pairs: the mean Jaccard index, and what 95% of the values lie between."""

    n_pairs: int
    jaccard: float
    interval: Interval


@dataclass(frozen=True, eq=False)
class Stability:
    """How circuits of several samples agree.

    Attributes:
        labels, sizes, circuits: of each sample its name, its number of pairs and its circuit.
        jaccards: `[samples, samples]`, shared edges over all edges of the two.
        rank_correlations: `[samples, samples]`, Spearman's, of what edges are ranked by, over all edges; None where a
            search gave circuits without scores.
        curve: by size of the sample, ascending; empty for several tasks.
        shuffled: of several tasks, the mean Jaccard index when their pairs are dealt out anew at random; else None.
    """

    labels: tuple[str, ...]
    sizes: tuple[int, ...]
    circuits: tuple[Circuit, ...] = field(repr=False)
    jaccards: np.ndarray = field(repr=False)
    rank_correlations: np.ndarray | None = field(repr=False)
    curve: tuple[SizePoint, ...]
    shuffled: float | None
    record: Record = field(repr=False)

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
        counts = np.zeros(self.circuits[0].mask.shape, dtype=np.int64)
        for circuit in self.circuits:
            counts += circuit.mask
        return counts / len(self.circuits)

    @property
    def stable(self) -> list[tuple[str, float]]:
        """Edges in at least 90% of the circuits with their frequency, most frequent first."""
        core, frequency = self.core(), self.frequency
        return sorted(((name, float(frequency[core.graph.edge(name)])) for name in core.edges), key=lambda e: -e[1])

    def core(self, share: float = STABLE) -> Circuit:
        """The edges in at least this share of the circuits (they need not be connected)."""
        graph = self.circuits[0].graph
        return Circuit(graph, (self.frequency >= share) & graph.real, record=self.record.with_settings(share=share))

    def to_dict(self) -> dict[str, object]:
        """JSON values."""
        samples = zip(self.labels, self.sizes, map(len, self.circuits), strict=True)
        correlations = self.rank_correlations
        return {
            "samples": [dict(zip(("name", "pairs", "edges"), sample, strict=True)) for sample in samples],
            "jaccard": self.jaccard,
            "interval": list(self.interval),
            "rank_correlation": self.rank_correlation,
            "shuffled": self.shuffled,
            "jaccards": self.jaccards.tolist(),
            "rank_correlations": None if correlations is None else correlations.tolist(),
            "curve": [{**point._asdict(), "interval": list(point.interval)} for point in self.curve],
            "stable": [{"edge": name, "frequency": share} for name, share in self.stable],
            "record": asdict(self.record),
        }


@remotable
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
    """Finds a circuit on many samples of a behaviour, and says how far they agree.

    Args:
        task: one task, whose pairs are resampled; or several by name, each of them a sample
            (`circuitfind.by_template`, `circuitfind.by_seed`).
        method: "eap", "eap-ig-inputs", "clean-corrupted", "relp" or "exact".
        n_edges, by: a circuit is `scores.top(n_edges, by)`.
        resamples: bootstrap samples at each size; of several tasks, about how many circuits of shuffled pairs.
        sizes: of the samples for the curve, in pairs; by default 4, 8, 16, ... and all, or none with `search`.
        search: a function from a bound task to a circuit, run anew on each sample, in place of method, n_edges and by.
        asked: keywords of the run (seed: of the samples, too) and options of the method, as for
            `circuitfind.attribute`.

    Raises:
        ScoreError: the method cannot score this example by example, or a number makes no sense.
        TaskError: fewer than two pairs or tasks.
    """
    check_count("resamples", resamples, 2)
    several = isinstance(task, Mapping)
    named = task if isinstance(task, Mapping) else {"pairs": task}
    chosen = method_of(method)
    request, setting = request_of(chosen, "edge", None, asked)
    experiments = {str(name): Experiment.of(model, one, setting) for name, one in named.items()}
    tasks = {name: one.bound for name, one in experiments.items()}
    if several and len(tasks) < 2:
        raise TaskError(f"{len(tasks)} tasks cannot be compared: give two or more, or one alone to resample its pairs")
    bounds = list(tasks.values())
    if several and sizes is not None:
        raise ScoreError("sizes are of samples of one task's pairs: give one task, or leave sizes out")
    if not several:
        sizes = _sizes(sizes, len(bounds[0]), search is None)
    source: Source
    if search is not None:
        source = Searched(model, bounds, search)
    else:
        source = Scored(list(experiments.values()), chosen, request, n_edges, by)
    first = next(iter(experiments.values()))
    rng, n = np.random.default_rng(first.setting.seed), source.ends[-1]
    curve, shuffled = [], None
    if several:
        parts = np.split(np.arange(n), source.ends[:-1])
        samples, labels = source.draw(parts, "tasks"), tuple(tasks)
        shuffled = _shuffled(source, max(1, resamples // len(parts)), rng) if search is None else None
    else:
        parts = [rng.integers(n, size=n) for _ in range(resamples)]
        samples, labels = source.draw(parts, "samples"), tuple(f"sample {k}" for k in range(1, resamples + 1))
        curve = [_size_point(source, size, resamples, samples, rng) for size in sizes or ()]
    settings: dict[str, Any] = {**source.settings, "resamples": resamples, "tasks": list(tasks)}
    record = first.record(source.method, **settings)
    counts = tuple(map(len, parts))
    jaccards, correlations = samples.jaccards(), samples.rank_correlations()
    return Stability(labels, counts, samples.circuits, jaccards, correlations, tuple(curve), shuffled, record)


def _size_point(source: Source, size: int, resamples: int, whole: Samples, rng: np.random.Generator) -> SizePoint:
    n = source.ends[-1]
    if size < n:
        whole = source.draw([rng.integers(n, size=size) for _ in range(resamples)], f"samples of {size} pairs")
    jaccards = whole.jaccards()
    return SizePoint(size, float(_between(jaccards).mean()), _spread(jaccards))


def _shuffled(source: Source, times: int, rng: np.random.Generator) -> float:
    n, cuts = source.ends[-1], source.ends[:-1]
    deals = [source.draw(np.split(rng.permutation(n), cuts), "shuffled pairs").jaccards() for _ in range(times)]
    return float(np.mean([_between(jaccards) for jaccards in deals]))


def _between(matrix: np.ndarray) -> np.ndarray:
    """The values of each two different samples."""
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
