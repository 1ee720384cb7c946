"""A circuit that loses edges: what a removal changes is computed, everything else is kept from the run before.

1. A `CircuitState` holds a circuit's run on a batch: every writer's current value, and the streams of the readers that
   have been looked at.
2. Removing edges changes their readers' streams by minus the writers' `D = current - ablated`. Affected are these
   readers' nodes, the readers that kept edges lead to from them, and so on down to the logits (all heads of a layer
   together where a post-norm couples them).
3. A trial runs only the modules with an affected reader, with `new - current` of the affected writers as the terms of
   the streams; blocks, attentions and MLPs without one are skipped. Several trials run side by side in one batch.
4. `commit` makes one trial of the last run the current state, without running anything.

Nothing is assumed of the order in which edges go; an order from the logits backwards only makes fewer readers affected.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, replace

import numpy as np
import torch
from einops import rearrange
from torch import Tensor

from circuitfind.engine.circuit_run import CircuitVisitor, skippable
from circuitfind.engine.plan import Plan
from circuitfind.engine.prepare import Prepared
from circuitfind.models.backends import through_hooks, undisturbed
from circuitfind.models.layout import Heads

Edge = tuple[int, int]


@dataclass(frozen=True, eq=False)
class _Trial:
    """The last run: its groups of removals, cumulative by trial, and the visitor that holds its values."""

    removals: list[list[Edge]]
    visitor: _RevisionVisitor
    readers: np.ndarray
    writers: np.ndarray


class CircuitState:
    """The full circuit's run on a batch, to be pruned edge by edge.

    Attributes:
        mask: `[writers, readers]` bool, the edges that are left.
    """

    def __init__(self, prepared: Prepared) -> None:
        self.prepared, self.adapter, self.graph = prepared, prepared.adapter, prepared.adapter.graph
        self.mask = self.graph.real.copy()
        clean = prepared.clean
        self.run = copy.copy(clean)
        for name in ("resid", "heads", "mlps", "qkv"):  # what a commit replaces; the tensors themselves are shared
            setattr(self.run, name, list(getattr(clean, name)))
        self.coupled = self.adapter.family.post_attn_norm is not None
        self.differences = self._differences()
        self._streams: dict[int, Tensor] = {}
        self._trial: _Trial | None = None

    # ---------------------------------------------------------------- the current run
    def centre(self, x: Tensor) -> Tensor:
        """As `CircuitVisitor`: means are taken off where every norm does so."""
        return x - x.mean(-1, keepdim=True) if self.adapter.centred else x

    def _differences(self) -> Tensor:
        """`[writers, batch x pos, d_model]`: current values minus ablated ones."""
        delta = self.run.writers.minus(self.prepared.ablated)
        parts = [delta.embed.unsqueeze(0)]
        for layer in range(self.graph.n_layers):
            parts += [self.adapter.head_outputs(layer, delta.heads[layer]), delta.mlps[layer].unsqueeze(0)]
        return self.centre(torch.cat(parts)).flatten(1, 2)

    def stream(self, reader: int) -> Tensor:
        """`[batch x pos, d_model]`: what a reader of the current circuit sees."""
        if reader not in self._streams:
            layer, kind, _ = self.graph.reader(reader)
            empty = self.prepared.empty
            base = (empty.middle if kind == "mlp" else empty.resid)[layer].to(self.adapter.work).flatten(0, 1)
            inside = torch.from_numpy(np.flatnonzero(self.mask[:, reader])).to(base.device)
            self._streams[reader] = self.centre(base) + self.differences[inside].sum(0)
        return self._streams[reader]

    # ---------------------------------------------------------------- trials
    def affected(self, readers: list[int]) -> tuple[np.ndarray, np.ndarray]:
        """Readers `[readers]` and writers `[writers]` (bool) that a change at these readers can reach."""
        graph, changed = self.graph, np.zeros(self.graph.n_readers, dtype=bool)
        changed[readers] = True
        writers = np.zeros(graph.n_writers, dtype=bool)
        for layer in range(graph.reader(min(readers)).layer, graph.n_layers):
            for kind, nodes in (("qkv", graph.heads(layer)), ("mlp", graph.mlp(layer))):
                mine = changed[graph.readers(layer, kind)]
                if not mine.any():
                    continue
                fed = graph.serves[graph.readers(layer, kind)][mine][:, nodes].any(axis=0)
                writers[nodes] = True if self.coupled and kind == "qkv" else fed
                changed |= self.mask[nodes][writers[nodes]].any(axis=0) if kind == "qkv" else self.mask[nodes]
        return changed, writers

    def reaches_logits(self, readers: list[int]) -> bool:
        """Whether anything at these readers can still change the logits."""
        return bool(self.affected(readers)[0][-1])

    def attempt(self, removals: list[list[Edge]]) -> Tensor:
        """Removes edges on trial: the first group, the first two groups, and so on.

        Returns:
            Logits `[trials, batch, reads, vocab]`.
        """
        graph, times = self.graph, len(removals)
        readers, writers = self.affected([reader for group in removals for _, reader in group])
        masks = np.repeat(self.mask[None], times, axis=0)
        for trial, group in enumerate(removals):
            for writer, reader in group:
                masks[trial:, writer, reader] = False
        terms = masks & writers[None, :, None] & readers[None, None, :]
        plan = Plan(graph, terms, True, np.flatnonzero(writers), readers)
        current = replace(self.prepared, ablated=self.run.writers, empty=self.run, clean=self.run)
        visitor = _RevisionVisitor(current, plan, self, masks)
        inputs = self.prepared.batch.clean.repeat(times)
        with torch.no_grad(), undisturbed(self.adapter.model):
            logits = through_hooks(self.adapter, inputs, visitor, skips=skippable(current, plan))
        self._trial = _Trial(removals, visitor, np.flatnonzero(readers), np.flatnonzero(writers))
        return logits.unflatten(0, (times, -1))

    def drop(self, edges: list[Edge]) -> None:
        """Removes edges that change nothing that reaches the logits, without a run."""
        for writer, reader in edges:
            self.mask[writer, reader] = False
            self._streams.pop(reader, None)

    def commit(self, trial: int) -> None:
        """Makes a trial of the last attempt the current state."""
        assert self._trial is not None, "commit follows an attempt"
        removals, visitor = self._trial.removals[: trial + 1], self._trial.visitor
        for writer, reader in (edge for group in removals for edge in group):
            self.mask[writer, reader] = False
        rows = slice(trial * visitor.batch, (trial + 1) * visitor.batch)
        tokens = slice(trial * visitor.batch * visitor.length, (trial + 1) * visitor.batch * visitor.length)
        for reader in self._trial.readers.tolist():
            if reader in visitor.streams:
                self._streams[reader] = visitor.streams[reader][tokens]
            else:
                self._streams.pop(reader, None)
        for writer in self._trial.writers.tolist():
            self.differences[writer] += visitor.written[visitor.plan.slots[writer], trial]
        logits = self.graph.n_readers - 1
        if logits in visitor.streams:
            final = self._streams[logits].unflatten(0, (visitor.batch, visitor.length))
            self.run.resid[-1] = final.to(self.run.resid[-1].dtype)
        for layer, heads in visitor.qkv.items():
            self.run.qkv[layer] = Heads(*(part[rows] for part in heads))
        for layer, values in visitor.heads.items():
            self.run.heads[layer] = values[rows]
        for layer, values in visitor.mlps.items():
            self.run.mlps[layer] = values[rows]
        self._trial = None


class _RevisionVisitor(CircuitVisitor):
    """A circuit run whose baseline is the current run, and whose streams start from each reader's current one."""

    def __init__(self, current: Prepared, plan: Plan, state: CircuitState, masks: np.ndarray) -> None:
        super().__init__(current, plan)
        self.state, self.masks = state, masks
        self.streams: dict[int, Tensor] = {}
        self.qkv: dict[int, Heads] = {}
        self.heads: dict[int, Tensor] = {}
        self.mlps: dict[int, Tensor] = {}

    def slice_streams(self, readers: np.ndarray, flat: Tensor, rows: tuple[int, slice]) -> Tensor:
        circuit, tokens = rows
        base = torch.stack([self.state.stream(reader)[tokens] for reader in readers.tolist()])
        removed = self.state.mask[:, readers] & ~self.masks[circuit][:, readers]
        for at, gone in enumerate(removed.T):
            if gone.any():
                base[at] -= self.state.differences[torch.from_numpy(gone).to(base.device)][:, tokens].sum(0)
        count = int(np.searchsorted(self.plan.writers, self.graph.limits[readers[0]]))
        if count:
            terms = self.plan.terms[circuit][np.ix_(self.plan.writers[:count], readers)].T
            coefficients = torch.from_numpy(terms.astype(np.float32)).to(self.written)
            written = self.written[:count, circuit, tokens].flatten(1)
            base = (base.flatten(1).addmm_(coefficients, written)).view_as(base)
        rows_in_all = self.times * self.batch * self.length
        for at, reader in enumerate(readers.tolist()):
            known = self.streams.setdefault(reader, base.new_empty(rows_in_all, base.shape[-1]))
            offset = circuit * self.batch * self.length
            known[offset + tokens.start : offset + tokens.stop] = base[at]
        return base

    def note_values(self, layer: int, kind: str, value: Tensor) -> None:
        before = self.qkv.get(layer)
        if before is None:
            before = Heads(*(part.repeat(self.times, 1, 1, 1) for part in self.prepared.empty.qkv[layer]))
        self.qkv[layer] = before._replace(**{kind: value})

    def note_written(self, layer: int, kind: str, value: Tensor) -> None:
        # a copy, because some models (Falcon) add into the MLP's output in place
        (self.heads if kind == "heads" else self.mlps)[layer] = rearrange(value, "k b ... -> (k b) ...").clone()
