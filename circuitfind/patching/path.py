"""Path patching: replace a sender's output in the inputs of some receivers, and nowhere else.

1. In the base run, only the edges from the sender to the receivers carry the sender's ablated value. All other readers
   read the sender's value in the base run.
2. The receivers and everything after them are computed anew, so the effect is that of all paths that begin with sender
   -> receiver. With `logits` as the receiver it is the direct effect on the logits.
3. Runs restart at the first receiver (`engine/circuit_run.py`), side by side for receivers of one layer.

`SIGNS` defines the effects in both directions; positive = these paths support the task. This is the path patching of
Goldowsky-Dill et al. 2023 for the set of all paths that begin with one of these edges. Wang et al. 2023 differ in two
ways. They compute each receiver's new value with all other heads frozen, so that a receiver does not see the change of
an earlier one (here it does, as in any circuit without these edges). And they compute the MLPs between sender and
receivers anew, so that their paths may also lead through these MLPs.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from itertools import product
from typing import Any, NamedTuple, Unpack

import numpy as np
from torch import Tensor

from circuitfind.batch import Batch
from circuitfind.calls import model_call
from circuitfind.engine.circuit_run import run_without
from circuitfind.engine.experiment import Experiment
from circuitfind.engine.measure import Group, Started, measure
from circuitfind.engine.memory_plan import PATCHES, budget, row_bytes
from circuitfind.engine.prepare import Prepared
from circuitfind.errors import ScoreError
from circuitfind.export import html
from circuitfind.graph import Graph
from circuitfind.models.adapter import Adapter
from circuitfind.models.load import Model
from circuitfind.patching.patch import runs_of
from circuitfind.patching.sweep import PatchedEffects
from circuitfind.record import Record
from circuitfind.setting import Keywords
from circuitfind.tasks.bound import BoundTask
from circuitfind.tasks.task import Task

SIGNS = {
    "noising": "metric(clean) - metric(clean with the edges sender -> receivers carrying ablated values)",
    "denoising": "metric(corrupted with the edges sender -> receivers carrying clean values) - metric(corrupted)",
}


class PathEffect(NamedTuple):
    """The effect of the paths from a sender to its receivers, with its 95% interval over examples."""

    sender: str
    receiver: str
    effect: float
    low: float
    high: float


@dataclass(frozen=True, eq=False, repr=False)
class PathEffects(PatchedEffects):
    """Effects of paths.

    Attributes:
        senders, receivers: names of the rows and columns; receivers that were patched together share a column.
        per_example: `[senders, receivers, examples]` float64 in units of the metric, positive = supports; NaN where the
            receiver is computed before the sender.
        full, empty: `[examples]` the metric with nothing and with everything ablated.
    """

    FORMAT = "circuitfind.paths"
    DERIVED = ("effects", "metric_full", "metric_empty")
    SHOWN = ("paths", "metric_full", "metric_empty")

    senders: tuple[str, ...]
    receivers: tuple[str, ...]
    per_example: np.ndarray
    full: np.ndarray
    empty: np.ndarray
    record: Record

    def __post_init__(self) -> None:
        self._check(len(self.senders), len(self.receivers))

    @property
    def paths(self) -> int:
        """The number of measured effects."""
        return int(np.isfinite(self.effects).sum())

    def _row(self, at: int, effect: float, low: float, high: float) -> PathEffect:
        row, column = divmod(at, len(self.receivers))
        return PathEffect(self.senders[row], self.receivers[column], effect, low, high)

    def to_dict(self) -> dict[str, Any]:
        """Return the result as JSON values, with None where there is no path."""
        cells = [[None if np.isnan(cell).all() else cell.tolist() for cell in row] for row in self.per_example]
        effects = [[None if np.isnan(value) else value for value in row] for row in self.effects.tolist()]
        return {**super().to_dict(), "effects": effects, "per_example": cells}

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> PathEffects:
        nothing = [None] * len(content["full"])
        cells = [[nothing if cell is None else cell for cell in row] for row in content["per_example"]]
        return super().from_dict({**content, "per_example": cells})

    def _repr_html_(self) -> str:
        heat = html.heat(self.effects, self.senders, self.receivers, "effects (sender, receiver)")
        return html.block(repr(self), heat, html.table(PathEffect._fields, self.top(10), "strongest paths"))


class _PathCell(NamedTuple):
    """One entry of the result, and the edges from its sender to its receivers, in graph order."""

    row: int
    column: int
    writer: int
    readers: list[int]


@model_call
def path_patch(
    model: Model,
    task: Task | BoundTask,
    senders: str | Iterable[str] | None = None,
    receivers: str | Iterable[str] | None = "logits",
    *,
    separate: bool = False,
    **asked: Unpack[Keywords],
) -> PathEffects:
    """Patch the paths from each sender to some receivers, and measure the effect on the metric.

    Args:
        senders: names of writers ("input", "a5.h5", "m3"), each patched separately. None: all writers that some
            receiver reads.
        receivers: names of readers ("a8.h6<v>", "a1.kv0<k>", "m9", "logits"). A head's name means its q, k and v
            inputs (with grouped-query attention, k and v of its group). All are patched together. None: every reader
            of the model; needs separate=True.
        separate: patch each receiver separately, one column each.
        asked: metric, ablation, direction, batch_size, seed; see `circuitfind.setting.Keywords`.

    Returns:
        `PathEffects`, one row per sender, in units of the metric; NaN if the receivers are computed before the sender.

    Raises:
        ScoreError: a sender, a receiver or the direction is unknown; no receiver reads a sender; or the metric is NaN
            or infinite.
        TaskError: the task does not fit the model or the ablation.
    """
    experiment, graph = Experiment.of(model, task, asked), model.graph
    if receivers is None and not separate:
        raise ScoreError(
            "receivers=None means every reader: give separate=True for one column each (to patch all readers together,"
            " which is the whole node, use attribute(level='node', method='exact'))"
        )
    names, columns = _columns(graph, receivers, separate)
    rows = _senders(graph, senders, columns)
    cells = _cells(graph, rows, columns)

    def name(place: int) -> str:
        return f"a path from {graph.writer_names[cells[place].writer]}"

    start = partial(_started, experiment, cells)
    measured, full, empty = measure(experiment, start, len(cells), name, "paths")
    assert full is not None and empty is not None, "both ends are run"
    effects = np.full((len(rows), len(columns), len(experiment)), np.nan)
    for cell, values in zip(cells, measured, strict=True):
        effects[cell.row, cell.column] = values
    sign = f"effect: {SIGNS[experiment.setting.direction]}; positive = the paths support the behaviour"
    record = replace(experiment.record("path patching", separate=separate), sign=sign)
    return PathEffects(tuple(graph.writer_names[row] for row in rows), names, effects, full, empty, record)


def _columns(
    graph: Graph, receivers: str | Iterable[str] | None, separate: bool
) -> tuple[tuple[str, ...], list[list[int]]]:
    """Return the columns' labels, and the indices of the readers that each column patches together."""
    given = graph.reader_names if receivers is None else _listed(receivers, "receivers")
    if not given:
        raise ScoreError("no receivers: name readers such as 'a1.h0<v>', 'm2' or 'logits'")
    indices = [_readers(graph, name) for name in given]
    if separate:
        return tuple(given), indices
    return (" + ".join(given),), [sorted({reader for group in indices for reader in group})]


def _listed(names: str | Iterable[str], side: str) -> list[str]:
    listed = [names] if isinstance(names, str) else list(names) if isinstance(names, Iterable) else [names]
    for name in listed:
        if not isinstance(name, str):
            raise ScoreError(f"{side}={names!r}: give names, such as 'a0.h1' or 'm1', not a {type(name).__name__}")
    return listed


def _readers(graph: Graph, name: str) -> list[int]:
    """Return the index of a reader, given its name; given a node's name, of all readers that feed the node."""
    if name in graph.reader_names:
        return [graph.reader_names.index(name)]
    nodes = graph.node_names[1:]
    if name in nodes:
        return [int(reader) for reader in np.flatnonzero(graph.serves[:, 1 + nodes.index(name)])]
    examples = ", ".join(graph.reader_names[slot] for slot in (0, graph.counts(0)[0], -2))
    said = graph.not_named("receiver", name, (*nodes, *graph.reader_names))
    raise ScoreError(f"{said} Its readers are {examples}, logits, ...")


def _senders(graph: Graph, senders: str | Iterable[str] | None, columns: list[list[int]]) -> list[int]:
    """Return the senders' writer indices. ScoreError if a sender is not in the graph, or no receiver reads it."""
    last = max(int(graph.limits[reader]) for readers in columns for reader in readers)
    if senders is None:
        return list(range(last))
    names = _listed(senders, "senders")
    for name in names:
        if name not in graph.writer_names:
            said = graph.not_named("sender", name, graph.writer_names)
            raise ScoreError(f"{said} Its writers are input, a0.h0 to {graph.writer_names[-1]}")
    rows = [graph.writer(name) for name in names]
    if not rows:
        raise ScoreError("no senders: name writers such as 'input', 'a0.h1' or 'm2', or leave them out for all")
    for row in rows:
        if row >= last:
            sender = graph.writer_names[row]
            raise ScoreError(f"sender '{sender}' is computed after all of these receivers, so there is no path to them")
    return rows


def _cells(graph: Graph, rows: list[int], columns: list[list[int]]) -> list[_PathCell]:
    """Return the entries to measure, sorted by the layer at which their runs restart."""
    cells = []
    for (row, writer), (column, readers) in product(enumerate(rows), enumerate(columns)):
        if after := [reader for reader in readers if writer < graph.limits[reader]]:
            cells.append(_PathCell(row, column, writer, after))
    return sorted(cells, key=lambda cell: graph.reader(cell.readers[0]).layer)


def _started(experiment: Experiment, cells: list[_PathCell], batch: Batch, _: slice) -> Started:
    """Return a batch's patched runs, yet to be made. Denoising is noising with clean and corrupted exchanged."""
    noising = experiment.setting.noising
    turned = batch if noising else replace(batch, clean=batch.corrupted, corrupted=batch.clean)
    prepared = experiment.prepare(turned)
    ends = prepared.clean.logits, prepared.empty.logits
    full, empty = ends if noising else ends[::-1]
    layers = np.array([experiment.graph.reader(cell.readers[0]).layer for cell in cells])
    runs = runs_of(layers, _at_once(experiment.adapter, batch, cells))
    groups = [Group(rows, int(layers[rows.start]), cells[rows]) for rows in runs]
    return Started(batch.with_reference(full), full, empty, groups, lambda group: _logits(prepared, group))


def _at_once(adapter: Adapter, batch: Batch, cells: list[_PathCell]) -> int:
    """Return how many cells run side by side. Each run holds the outputs of the senders of all its batch's cells."""
    tokens, senders = batch.clean.ids.numel(), len({cell.writer for cell in cells})
    worth = PATCHES.runs(adapter.device, tokens)
    room = budget(adapter.device) // (tokens * row_bytes(adapter))  # senders x runs
    return max(1, min(worth, max(room // senders, math.isqrt(room))))


def _logits(prepared: Prepared, group: list[_PathCell]) -> Tensor:
    """Return logits `[cells, batch, reads, vocab]`."""
    graph = prepared.adapter.graph
    removed = np.zeros((len(group), graph.n_writers, graph.n_readers), dtype=bool)
    for run, cell in enumerate(group):
        removed[run, cell.writer, cell.readers] = True
    return run_without(prepared, removed)
