"""Circuits of many samples of the same pairs.

A sample is a list of row numbers, with repeats, into the pairs of one or several tasks put one after the other.

* `Scored`: each pair's edge scores are computed once; a sample's scores are their mean over its rows, its circuit the
  top of them.
* `Searched`: a function from a task to a circuit is run on each sample; a sample's rows lie in one task.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import accumulate
from typing import Any, NamedTuple, Protocol

import numpy as np

from circuitfind.attribution.by_example import check_by_example, example_effects
from circuitfind.attribution.method import Method, Request
from circuitfind.circuit import Circuit, as_circuit
from circuitfind.engine.experiment import Experiment
from circuitfind.models.load import Model
from circuitfind.progress import track
from circuitfind.record import Record
from circuitfind.scores import By, Scores
from circuitfind.statistics import ranks
from circuitfind.tasks.bound import BoundTask

Search = Callable[[BoundTask], Circuit]


class Samples(NamedTuple):
    """By sample, its circuit, and what edges were ranked by, `[samples, edges]`; None after a search."""

    circuits: tuple[Circuit, ...]
    keys: np.ndarray | None = None

    def jaccards(self) -> np.ndarray:
        """`[samples, samples]`: shared edges over all edges of the two; 1 for two empty circuits."""
        masks = np.stack([circuit.mask[circuit.graph.real] for circuit in self.circuits]).astype(np.float32)
        shared, size = (masks @ masks.T).astype(np.float64), masks.sum(axis=1, dtype=np.float64)
        union = size[:, None] + size[None, :] - shared
        return np.divide(shared, union, out=np.ones_like(shared), where=union > 0)

    def rank_correlations(self) -> np.ndarray | None:
        """`[samples, samples]`: Spearman's, over all edges."""
        return None if self.keys is None else np.corrcoef(np.stack([ranks(key) for key in self.keys]))


class Source(Protocol):
    """Where circuits of samples come from. `ends`: how many pairs the tasks hold up to each one's end."""

    ends: list[int]
    method: str
    settings: dict[str, Any]

    def draw(self, samples: Sequence[np.ndarray], label: str) -> Samples: ...


class Scored:
    """Circuits cut from scores that are means over pairs."""

    def __init__(
        self, experiments: Sequence[Experiment], method: Method, request: Request, n_edges: int, by: By
    ) -> None:
        self.graph, self.n_edges, self.by, self.method = experiments[0].graph, n_edges, by, method.name
        check_by_example(method)
        self.settings = {"n_edges": n_edges, "by": by}
        self._record = Record(method=method.name)
        self._cut(np.zeros(self.graph.n_edges))  # refuses an n_edges or by that makes no sense, before anything runs
        self.ends = list(accumulate(map(len, experiments)))
        self.effects = np.concatenate([example_effects(one, method, request) for one in experiments])

    def draw(self, samples: Sequence[np.ndarray], label: str) -> Samples:
        circuits, keys = [], []
        for rows in track(samples, label):
            weights = np.bincount(rows, minlength=len(self.effects)) / len(rows)
            scores = weights.astype(np.float32) @ self.effects
            circuits.append(self._cut(scores))
            keys.append(np.abs(scores) if self.by == "absolute" else scores)
        return Samples(tuple(circuits), np.stack(keys))

    def _cut(self, scores: np.ndarray) -> Circuit:
        values = np.zeros(self.graph.real.shape, dtype=np.float32)
        values.T[self.graph.real.T] = scores
        cut = Scores(self.graph, values, self._record).top(self.n_edges, self.by)
        return replace(cut, estimates=None)  # thousands of circuits need not carry their scores


class Searched:
    """Circuits found by a search on each sample."""

    def __init__(self, model: Model, tasks: Sequence[BoundTask], search: Search) -> None:
        self.graph, self.tasks, self.search = model.graph, tasks, search
        self.method = getattr(search, "__name__", type(search).__name__)
        self.settings: dict[str, Any] = {"search": self.method}
        self.ends = list(accumulate(map(len, tasks)))

    def draw(self, samples: Sequence[np.ndarray], label: str) -> Samples:
        return Samples(tuple(self._found(rows) for rows in track(samples, label)))

    def _found(self, rows: np.ndarray) -> Circuit:
        which = int(np.searchsorted(self.ends, rows[0], side="right"))
        start = self.ends[which] - len(self.tasks[which])
        return as_circuit(self.graph, self.search(self.tasks[which].subset((rows - start).tolist())))
