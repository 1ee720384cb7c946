"""Path patching: a sender's output is replaced where some receivers read it, and nowhere else.

1. Of the base run, only the edges from the sender into the receivers carry the sender's other value; whatever the
   sender does for anyone else stays as it was.
2. The receivers are computed anew, and the run goes on from there by itself: so the effect is that of all paths that
   begin sender -> receiver. With `logits` as the receiver it is the direct effect on the logits.
3. Runs restart at the first receiver (`engine/path_run.py`), those of one layer's receivers side by side.

Noising: metric(clean) - metric(clean with these edges carrying ablated values). Denoising: metric(corrupted with these
edges carrying clean values) - metric(corrupted). Positive = these paths support the behaviour.

This is the path patching of Goldowsky-Dill et al. 2023 for the set of all paths that begin with one of these edges.
Wang et al. 2023 differ twice: they set each receiver to what it is with all other heads frozen, which hides one
receiver's change from another downstream of it (here it is seen, as in any run of a circuit that lacks these edges);
and they let the MLPs between sender and receivers be computed anew, so that their paths lead through these, too.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import replace
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from circuitfind.batch import Batch
from circuitfind.engine.ablation import check_ablation, check_direction, resampled, writer_means
from circuitfind.engine.capture import Writers
from circuitfind.engine.memory import PATCHES, budget, in_batches
from circuitfind.engine.path_run import run_without
from circuitfind.engine.prepare import Prepared, prepare
from circuitfind.errors import ScoreError
from circuitfind.graph import Graph
from circuitfind.loading import bind
from circuitfind.metrics import Function, Metric
from circuitfind.models.adapter import Adapter
from circuitfind.models.load import Model
from circuitfind.patching.measure import as_numpy
from circuitfind.patching.path_effects import PathEffects
from circuitfind.progress import track
from circuitfind.remote.call import remotable
from circuitfind.score_checks import check_effects
from circuitfind.tasks.bound import BoundTask, check_seed
from circuitfind.tasks.task import Task

SIGNS = {
    "noising": "metric(clean) - metric(clean with the edges sender -> receivers carrying ablated values)",
    "denoising": "metric(corrupted with the edges sender -> receivers carrying clean values) - metric(corrupted)",
}


class Cell(NamedTuple):
    """One entry of the result: its place, and the edges from its sender to its receivers, in the graph's order."""

    row: int
    column: int
    writer: int
    readers: list[int]


@remotable
def path_patch(
    model: Model,
    task: Task | BoundTask,
    senders: str | Iterable[str] | None = None,
    receivers: str | Iterable[str] | None = "logits",
    *,
    separate: bool = False,
    metric: str | Metric | Function | None = None,
    ablation: str = "corrupted",
    direction: str = "noising",
    batch_size: int | None = None,
    seed: int = 0,
) -> PathEffects:
    """Patches the paths from each sender into some receivers.

    Args:
        senders: names of writers ("input", "a5.h5", "m3"), each patched in runs of its own. None: all that some
            receiver reads.
        receivers: names of readers ("a8.h6<v>", "a1.kv0<k>", "m9", "logits"), or of a head for its queries, keys and
            values (where key/value heads are grouped, those of its group). Patched together. None: every reader of the
            model, with separate=True.
        separate: each receiver in runs of its own, one column each.
        metric: overrides the task's.
        ablation: what a patched edge carries in noising: as for `circuitfind.attribute`.
        direction: "noising" or "denoising".
        batch_size: pairs at a time; by default as many as a memory budget allows.
        seed: of the "resample" ablation.

    Returns:
        `PathEffects`, one row a sender, in units of the metric; NaN where a receiver is computed before the sender.

    Raises:
        ScoreError: an unknown sender, receiver or direction, a sender that no receiver reads, NaN or infinity.
        TaskError: the task does not fit the model or the ablation.
    """
    bound, graph = bind(model, task).with_metric(metric), model.graph
    check_seed(seed)
    check_direction(direction, ablation, bound.batch)
    if receivers is None and not separate:
        raise ScoreError(
            "receivers=None means every reader: give separate=True for a column each (all of them together are the"
            " sender's whole output, which attribute(level='node', method='exact') measures)"
        )
    check_ablation(ablation, bound.batch)
    names, columns = _columns(graph, receivers, separate)
    rows = _senders(graph, senders, columns)
    batch = resampled(bound.batch, seed) if ablation == "resample" else bound.batch
    means = writer_means(model.adapter, batch, ablation, batch_size)
    cells = _cells(graph, rows, columns)

    def one(part: Batch, _: slice) -> list[np.ndarray]:
        return _measure(model.adapter, part, bound.metric, cells, ablation, direction, means)

    parts = [part for _, part in in_batches(model.adapter, batch, one, batch_size, "pairs")]
    measured, full, empty = (np.concatenate(values, axis=-1) for values in zip(*parts, strict=True))
    effects = np.full((len(rows), len(columns), len(full)), np.nan)
    for cell, values in zip(cells, measured, strict=True):
        effects[cell.row, cell.column] = values
    made = bound.record("path patching", ablation, direction, seed, separate=separate)
    record = replace(made, sign=f"effect: {SIGNS[direction]}; positive = the paths support the behaviour")
    return PathEffects(tuple(graph.writer_names[row] for row in rows), names, effects, full, empty, record)


# -------------------------------------------------------------------- names
def _columns(
    graph: Graph, receivers: str | Iterable[str] | None, separate: bool
) -> tuple[tuple[str, ...], list[list[int]]]:
    """Labels of the columns, and the reader indices that each of them patches together."""
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
    """A reader by its name; by a node's name all that feed it."""
    if name in graph.reader_names:
        return [graph.reader_names.index(name)]
    if name in graph.node_names[1:]:
        return np.flatnonzero(graph.serves[:, graph.node_names.index(name)]).tolist()
    examples = ", ".join(graph.reader_names[slot] for slot in (0, graph.n_heads, -2))
    raise ScoreError(f"receiver '{name}' is no reader of this graph ({graph}): its readers are {examples}, logits, ...")


def _senders(graph: Graph, senders: str | Iterable[str] | None, columns: list[list[int]]) -> list[int]:
    """Writer indices.

    Raises:
        ScoreError: one that this graph does not have, or that no receiver reads.
    """
    last = max(int(graph.limits[reader]) for readers in columns for reader in readers)
    if senders is None:
        return list(range(last))
    names = _listed(senders, "senders")
    for name in names:
        if name not in graph.writer_names:
            raise ScoreError(
                f"sender '{name}' is no writer of this graph ({graph}): its writers are input, a0.h0 to"
                f" {graph.writer_names[-1]}"
            )
    rows = [graph.writer(name) for name in names]
    if not rows:
        raise ScoreError("no senders: name writers such as 'input', 'a0.h1' or 'm2', or leave them out for all")
    for row in rows:
        if row >= last:
            raise ScoreError(
                f"sender '{graph.writer_names[row]}' is computed after all of these receivers: it has no path into them"
            )
    return rows


def _cells(graph: Graph, rows: list[int], columns: list[list[int]]) -> list[Cell]:
    """What there is to measure, by the first receiver's layer: like restarts follow each other."""
    cells = []
    for row, writer in enumerate(rows):
        for column, readers in enumerate(columns):
            after = [reader for reader in readers if writer < graph.limits[reader]]
            if after:
                cells.append(Cell(row, column, writer, after))
    return sorted(cells, key=lambda cell: graph.reader(cell.readers[0]).layer)


# -------------------------------------------------------------------- measuring
def _measure(
    adapter: Adapter,
    batch: Batch,
    metric: Metric,
    cells: list[Cell],
    ablation: str,
    direction: str,
    means: Writers | None,
) -> list[np.ndarray]:
    """`[cells, examples]` effects; the metric of the full and the empty run, `[examples]` each."""
    if direction == "noising":
        sign, prepared = 1, prepare(adapter, batch, ablation, means)
        full, empty = prepared.clean, prepared.empty
    else:
        sign, prepared = -1, prepare(adapter, replace(batch, clean=batch.corrupted, corrupted=batch.clean))
        full, empty = prepared.empty, prepared.clean
    batch = batch.with_reference(full.logits)
    ends = [metric(run.logits, batch) for run in (full, empty)]
    before = ends[0] if direction == "noising" else ends[1]
    effects = []
    for group in track(_groups(adapter.graph, cells, _at_once(adapter, batch, cells)), "paths"):
        values = torch.stack([metric(one, batch) for one in _logits(prepared, group)])
        effects.append(as_numpy(sign * (before - values)))
        names = adapter.graph.writer_names
        check_effects(effects[-1], [f"the effect of a path from {names[cell.writer]}" for cell in group])
    return [np.concatenate(effects), *map(as_numpy, ends)]


def _at_once(adapter: Adapter, batch: Batch, cells: list[Cell]) -> int:
    """How many cells run side by side: no more than is worth it, and than memory has room for, because what each of
    their senders writes is held in each of their runs."""
    tokens, senders = batch.clean.ids.numel(), len({cell.writer for cell in cells})
    worth = PATCHES.runs(adapter.device, tokens)
    room = budget(adapter.device) // (tokens * adapter.graph.d_model * adapter.work.itemsize)  # senders x runs
    return max(1, min(worth, max(room // senders, math.isqrt(room))))


def _groups(graph: Graph, cells: list[Cell], at_once: int) -> list[list[Cell]]:
    """A few cells at a time, whose first receivers are in one layer."""
    layers = np.array([graph.reader(cell.readers[0]).layer for cell in cells])
    groups = []
    for layer in np.unique(layers).tolist():
        first, last = np.searchsorted(layers, [layer, layer + 1]).tolist()
        groups += [cells[start : min(start + at_once, last)] for start in range(first, last, at_once)]
    return groups


def _logits(prepared: Prepared, group: list[Cell]) -> Tensor:
    """`[cells, batch, reads, vocab]`."""
    graph = prepared.adapter.graph
    removed = np.zeros((len(group), graph.n_writers, graph.n_readers), dtype=bool)
    for run, cell in enumerate(group):
        removed[run, cell.writer, cell.readers] = True
    return run_without(prepared, removed)
