"""A circuit that loses edges: only the nodes that a removal affects are run again.

1. A `CircuitState` holds a circuit's run on a batch: every writer's current value (heads before their output
   projection), and the streams of the most recently used readers, as many as a memory budget allows. A reader that no
   removal has affected yet sees the clean run's stream.
2. Removing an edge subtracts its writer's `D = current - ablated` from its reader's stream. This affects the reader's
   node (with a post-norm on attention, all heads of the layer), the readers of kept edges from it, and so on to the
   logits. Readers from which no path leads to the logits any more are left out.
3. A trial is a circuit run whose base is the current run: a reader's stream is its current one, minus D of the removed
   edges, plus `new - current` of the affected writers with an edge into it. Modules without an affected reader are
   skipped, and so are projections whose outputs are overwritten. Several trials run side by side in one batch.
4. `commit` makes one trial of the last run the current state, without a run.
5. The state of any mask can be computed from scratch in one run. So a stopped search can be resumed, and a long one can
   get rid of accumulated rounding errors.

Edges may be removed in any order; going backwards from the logits affects the fewest readers.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import NamedTuple

import numpy as np
import torch
from einops import rearrange
from torch import Tensor

from circuitfind.batch import side_by_side
from circuitfind.engine.capture import Run
from circuitfind.engine.circuit_run import CircuitVisitor, Plan, run_side_by_side, skippable
from circuitfind.engine.memory_plan import STREAMS, row_bytes, run_bytes
from circuitfind.engine.prepare import Prepared
from circuitfind.engine.reach import Reach
from circuitfind.engine.writers import Writers, total
from circuitfind.models.adapter import Adapter
from circuitfind.models.layer import Chosen, Heads

Edge = tuple[int, int]
FEW = 16  # edges: see `_RevisedRun._from_few`


def held_bytes(adapter: Adapter, n_tokens: int) -> int:
    """Return the bytes that states of `n_tokens` tokens hold besides streams: the clean, the empty and the current
    run."""
    return run_bytes(adapter, n_tokens, runs=3)


def trial_bytes(adapter: Adapter, n_tokens: int) -> int:
    """Return the bytes that one trial of `n_tokens` tokens takes at most: every writer's change, and as much for
    streams and logits."""
    return 2 * n_tokens * adapter.graph.n_writers * row_bytes(adapter)


class _Trial(NamedTuple):
    """The last run. `removals`: its groups of edges, of which trial k removes the first k + 1; `visitor`: holds its
    values; `readers`: those that it affected."""

    removals: list[list[Edge]]
    visitor: _RevisedRun
    readers: list[int]


class CircuitState:
    """A circuit's run on a batch, to be pruned edge by edge.

    Args:
        mask: `[writers, readers]` bool, the circuit to start from; default: all edges.
        stream_bytes: a budget for the streams that are kept between trials; those of one layer's readers always are.

    Attributes:
        mask: the edges that are left.
        reach: the connectivity of these edges.
    """

    def __init__(self, prepared: Prepared, mask: np.ndarray | None = None, stream_bytes: int = STREAMS) -> None:
        self.prepared, self.adapter, self.graph = prepared, prepared.adapter, prepared.adapter.graph
        self.mask = self.graph.real.copy() if mask is None else mask.copy()
        clean = prepared.clean
        self.run = clean.map(lambda value: value)  # a copy with its own lists, whose entries commits replace
        self.reach = Reach(self.graph, self.mask, self.adapter.coupled)
        one = clean.resid[0].numel() * self.adapter.work.itemsize
        self._most_streams = max(self.graph.readers_per_layer, stream_bytes // one)
        self._streams: dict[int, Tensor] = {}  # by reader, the least recently used first
        self._trial: _Trial | None = None
        missing = (self.graph.real & ~self.mask).any(axis=0)
        ablated = ~self.reach.reached[:-1] if prepared.interchange else np.zeros(self.graph.n_writers, dtype=bool)
        # `[readers]` bool: readers whose stream is still that of the clean run
        self._clean = ~missing & ~(self.mask & ablated[:, None]).any(axis=0)
        if missing.any():
            self._run(self.mask[None], np.flatnonzero(missing).tolist(), [[]])
            self.commit(0)

    # ---------------------------------------------------------------- the current run
    def difference(self, writers: np.ndarray, tokens: slice, current: Writers | None = None) -> Tensor:
        """Return D = value - ablated value, summed over some `writers` (`[writers]` bool): `[tokens, d_model]`.

        Under interchange, writers that are not reached have their ablated value: they are left out, so that they add no
        rounding noise. `current`: the writers' values; by default those of the current run.
        """
        if self.prepared.interchange:
            writers = writers & self.reach.reached[:-1]
        current = current or self.run.writers
        return self.adapter.centre(total(self.adapter, current, self.prepared.ablated, writers, tokens))

    def base(self, reader: int) -> Tensor:
        """Return the stream `[batch x pos, d_model]` that a reader without kept edges sees."""
        return self._stream_of(self.prepared.empty, reader)

    def _stream_of(self, run: Run, reader: int) -> Tensor:
        """Return the stream `[batch x pos, d_model]` that a reader sees in a recorded run of the model."""
        layer, kind, _ = self.graph.reader(reader)
        stream = (run.middle if kind == "mlp" else run.resid)[layer]
        return self.adapter.centre(stream.to(self.adapter.work).flatten(0, 1))

    def stream(self, reader: int) -> Tensor:
        """Return the stream `[batch x pos, d_model]` that a reader of the current circuit sees."""
        stream = self._streams.get(reader)
        if stream is None and self._clean[reader]:
            stream = self._stream_of(self.prepared.clean, reader)
        elif stream is None:
            stream = self.base(reader) + self.difference(self.mask[:, reader], slice(None))
        self._keep(reader, stream)
        return stream

    def _keep(self, reader: int, stream: Tensor) -> None:
        self._streams.pop(reader, None)
        self._streams[reader] = stream
        if len(self._streams) > self._most_streams:
            del self._streams[next(iter(self._streams))]

    # ---------------------------------------------------------------- trials
    def affected(self, readers: list[int]) -> tuple[np.ndarray, np.ndarray]:
        """Return the readers `[readers]` and writers `[writers]` (bool) that a change at these readers affects."""
        graph, changed = self.graph, np.zeros(self.graph.n_readers, dtype=bool)
        changed[readers] = True
        changed &= self.reach.useful
        writers = np.zeros(graph.n_writers, dtype=bool)
        for layer in range(graph.reader(min(readers)).layer, graph.n_layers):
            for kind, nodes in (("qkv", graph.heads(layer)), ("mlp", graph.mlp(layer))):
                mine = changed[graph.readers(layer, kind)]
                if not mine.any():
                    continue
                writers[nodes] = self.reach.feeds[graph.readers(layer, kind)][mine][:, nodes].any(axis=0)
                led = self.mask[nodes][writers[nodes]].any(axis=0) if kind == "qkv" else self.mask[nodes]
                changed |= led & self.reach.useful
        return changed, writers

    def attempt(self, removals: list[list[Edge]]) -> Tensor:
        """Return logits `[trials, batch, reads, vocab]` without the first group of edges, without the first two groups,
        and so on; the state stays as it is until `commit`."""
        masks = np.repeat(self.mask[None], len(removals), axis=0)
        for trial, group in enumerate(removals):
            for writer, reader in group:
                masks[trial:, writer, reader] = False
        return self._run(masks, [reader for group in removals for _, reader in group], removals)

    def _run(self, masks: np.ndarray, changed: list[int], removals: list[list[Edge]]) -> Tensor:
        """Run circuits that differ from the current one only in edges into the readers `changed`."""
        readers, writers = self.affected(changed)
        if self.prepared.interchange:  # as in `difference`
            writers &= self.reach.reached[:-1]
        terms = masks & writers[None, :, None] & readers[None, None, :]
        plan = Plan(self.graph, terms, True, readers)
        run = self.run  # the base: unaffected writers keep exactly their current values, whatever the ablation
        current = replace(self.prepared, ablated=run.writers, empty=run, clean=run, interchange=True)
        visitor = _RevisedRun(current, plan, self, masks)
        skips = skippable(current, plan)
        logits = run_side_by_side(self.adapter, self.prepared.inputs, len(masks), visitor, skips)
        self._trial = _Trial(removals, visitor, np.flatnonzero(readers).tolist())
        return logits

    def drop(self, edge: Edge) -> list[int]:
        """Remove an edge whose effect is 0, without a run; returns the nodes that lose their last input by this."""
        left = self.reach.remove(*edge)
        self._clean[edge[1]] = False
        if not self.reach.useful[edge[1]]:
            self._streams.pop(edge[1], None)
        return left

    def commit(self, trial: int) -> list[int]:
        """Make a trial of the last `attempt` the current state; returns the nodes that lose their last input."""
        assert self._trial is not None, "commit follows an attempt"
        removals, visitor = self._trial.removals[: trial + 1], self._trial.visitor
        left = [node for group in removals for edge in group for node in self.reach.remove(*edge)]
        rows = slice(trial * visitor.batch, (trial + 1) * visitor.batch)
        tokens = slice(rows.start * visitor.length, rows.stop * visitor.length)

        def own(values: Tensor, part: slice) -> Tensor:
            """Return one trial's values, copied so that the others' are freed."""
            return values if visitor.times == 1 else values[part].clone()

        self._clean[self._trial.readers] = False
        for reader in self._trial.readers:
            self._streams.pop(reader, None)
            if reader in visitor.streams:
                self._keep(reader, own(visitor.streams[reader], tokens))
        run, logits = self.run, self.graph.n_readers - 1
        if logits in visitor.streams:
            final = self._streams[logits].unflatten(0, (visitor.batch, visitor.length))
            run.resid[-1] = final.to(run.resid[-1].dtype)
        for layer, heads in visitor.qkv.items():
            run.qkv[layer] = Heads(*(own(part, rows) for part in heads))
        for kept, new in ((run.heads, visitor.heads), (run.mlps, visitor.mlps)):
            for layer, values in new.items():
                kept[layer] = own(values, rows)
        self._trial = None
        return left


class _RevisedRun(CircuitVisitor):
    """The visitor of trials; it keeps streams, q, k, v and outputs of heads and MLPs, for `CircuitState.commit`."""

    def __init__(self, current: Prepared, plan: Plan, state: CircuitState, masks: np.ndarray) -> None:
        super().__init__(current, plan)
        self.state, self.masks = state, masks
        self.streams: dict[int, Tensor] = {}  # by reader
        self.qkv: dict[int, Heads] = {}  # by layer, like the next two
        self.heads: dict[int, Tensor] = {}
        self.mlps: dict[int, Tensor] = {}

    def slice_streams(self, readers: np.ndarray, flat: Tensor, rows: tuple[int, slice]) -> Tensor:
        circuit, tokens = rows
        base = torch.stack([self.state.stream(reader)[tokens] for reader in readers.tolist()])
        removed = self.state.mask[:, readers] & ~self.masks[circuit][:, readers]
        for at in removed.any(axis=0).nonzero()[0].tolist():
            base[at] -= self.state.difference(removed[:, at], tokens)
        coefficients, written = self.terms_of(readers, rows)
        if len(written):
            base = (base.flatten(1).addmm_(coefficients, written)).view_as(base)
        if not self.state.prepared.interchange:
            self._from_few(readers, base, rows)
        size = self.batch * self.length
        for at, reader in enumerate(readers.tolist()):
            known = self.streams.setdefault(reader, base.new_empty(self.times * size, base.shape[-1]))
            known[circuit * size + tokens.start : circuit * size + tokens.stop] = base[at]
        return base

    def _from_few(self, readers: np.ndarray, streams: Tensor, rows: tuple[int, slice]) -> None:
        """Compute the streams of readers with at most `FEW` edges as a sum over these edges.

        Under ablations other than interchange (zero, mean) almost nothing may be left of a stream. As a difference
        between what was there and what was removed it would be rounding noise, which a norm amplifies.
        """
        circuit, tokens = rows
        examples = slice(circuit * self.batch, (circuit + 1) * self.batch)
        run = self.state.run
        heads = [self.heads[at][examples] if at in self.heads else value for at, value in enumerate(run.heads)]
        mlps = [self.mlps[at][examples] if at in self.mlps else value for at, value in enumerate(run.mlps)]
        current = Writers(run.writers.embed, heads, mlps)
        for at, reader in enumerate(readers.tolist()):
            inside = self.masks[circuit][:, reader]
            if inside.sum() <= FEW:
                streams[at] = self.state.base(reader)[tokens] + self.state.difference(inside, tokens, current)

    def note_values(self, layer: int, new: Mapping[str, Chosen]) -> None:
        own = Heads(*(side_by_side(part, self.times) for part in self.prepared.empty.qkv[layer]))
        self.qkv[layer] = own.with_chosen({kind: (at, heads.to(own.q.dtype)) for kind, (at, heads) in new.items()})

    def note_written(self, layer: int, kind: str, value: Tensor) -> None:
        # a copy, because some models (Falcon) add into the MLP's output in place
        (self.heads if kind == "heads" else self.mlps)[layer] = rearrange(value, "k b ... -> (k b) ...").clone()
