"""Exact circuits: one forward pass in which every edge outside the circuit carries its ablated value.

With `D_u = current_u - ablated_u` for each writer u, a reader v of circuit C reads exactly

    current residual - sum of D_u over the edges u -> v outside C        (dense form)
    empty residual   + sum of D_u over the edges u -> v inside C         (sparse form)

1. The form in which fewer readers have terms is used; under zero and mean ablation the sparse form, unless every edge
   is kept. A reader without terms keeps its base value: in the dense form the model's own (so the full circuit equals
   the clean run to the bit), in the sparse form that of the run with every edge ablated. A writer without terms is
   never projected.
2. For the other ("active") readers, one matrix product of 0/1 coefficients with the stacked D gives their streams.
   These are normed and projected, and replace the projection's output (or the input of the MLP or of the final norm).
3. In the sparse form nothing depends on the running residual stream, so blocks, attentions and MLPs without an active
   reader are skipped. Under interchange a writer that no kept edge reaches has exactly its ablated value: its D is 0
   and its terms are dropped.

Several circuits run side by side as rows of one batch, circuit after circuit.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from einops import rearrange
from torch import Tensor

from circuitfind.batch import Inputs, side_by_side
from circuitfind.engine.capture import Run
from circuitfind.engine.memory_plan import in_cache
from circuitfind.engine.prepare import Prepared
from circuitfind.engine.reach import feeding
from circuitfind.graph import Graph
from circuitfind.models.adapter import Adapter
from circuitfind.models.backends import Skips, Stop, Visit, through_hooks, undisturbed
from circuitfind.models.layer import PROJECTIONS, Chosen, LayerView
from circuitfind.models.placement import sent


@dataclass(frozen=True)
class Plan:
    """What a run of circuits has to compute.

    Attributes:
        terms: `[circuits, writers, readers]` bool: which D enter a reader's stream, added (sparse) or subtracted.
        sparse: the form.
        active: `[readers]` bool: the readers whose streams are computed; from `of`, those with a term in any circuit.
    """

    graph: Graph
    terms: np.ndarray
    sparse: bool
    active: np.ndarray

    @classmethod
    def of(cls, prepared: Prepared, masks: np.ndarray, sparse: bool) -> Plan:
        graph = prepared.adapter.graph
        terms = masks.copy() if sparse else graph.real & ~masks
        if sparse and prepared.interchange:  # drop the terms of nodes that no kept edge reaches: their D is exactly 0
            feeds = feeding(graph, prepared.adapter.coupled)
            for nodes, readers in graph.steps[:-1]:
                terms[:, nodes] &= (terms[:, :, readers].any(axis=1) @ feeds[readers, nodes])[:, :, None]
        return cls(graph, terms, sparse, np.asarray(terms.any(axis=(0, 1))))

    def readers(self, layer: int, kind: str) -> np.ndarray:
        """Return the indices of a layer's active readers of this kind."""
        readers = self.graph.readers(layer, kind)
        return np.asarray(readers.start + self.active[readers].nonzero()[0])

    def runs(self, layer: int, kind: str) -> bool:
        """Whether any reader of this layer and kind is active."""
        return bool(self.active[self.graph.readers(layer, kind)].any())

    @cached_property
    def writers(self) -> np.ndarray:
        """The indices of the writers that occur in any term."""
        return np.flatnonzero(self.terms.any(axis=(0, 2)))

    @cached_property
    def slots(self) -> dict[int, int]:
        """By writer that occurs in any term, its row in the stacked D."""
        return {int(u): slot for slot, u in enumerate(self.writers)}


def prefers_sparse(prepared: Prepared, masks: np.ndarray) -> bool:
    """Whether the sparse form is used. Under interchange: if no more readers have terms in it than in the dense form.

    Under other ablations it is unless every edge is kept: subtracting nearly all of a stream would leave rounding
    noise, which a norm amplifies.
    """
    real = prepared.adapter.graph.real
    inside, outside = (edges.any(axis=(0, 1)).sum() for edges in (masks, real & ~masks))
    return bool(inside <= outside if prepared.interchange else outside > 0)


def run_circuits(prepared: Prepared, masks: np.ndarray, sparse: bool | None = None) -> Tensor:
    """Return logits `[circuits, batch, reads, vocab]` of circuits, given by `masks [circuits, writers, readers]` bool,
    on a prepared batch. `sparse`: the form to use, by default as `prefers_sparse` says."""
    sparse = prefers_sparse(prepared, masks) if sparse is None else sparse
    if not sparse and (prepared.adapter.graph.real & ~masks).any():
        return run_without(prepared, prepared.adapter.graph.real & ~masks)
    plan = Plan.of(prepared, masks, sparse)
    visitor = CircuitVisitor(prepared, plan)
    skips = skippable(prepared, plan) if plan.sparse else {}
    return run_side_by_side(prepared.adapter, prepared.inputs, len(masks), visitor, skips)


def run_without(prepared: Prepared, removed: np.ndarray) -> Tensor:
    """Return logits `[runs, batch, reads, vocab]` of runs in which all edges but `removed` are kept.

    `removed`: `[runs, writers, readers]` bool, not all False. The run is in the dense form and starts at the first
    block with a reader of a removed edge. Earlier blocks equal the clean run to the bit, so they are skipped.
    """
    adapter, times = prepared.adapter, len(removed)
    plan = Plan.of(prepared, adapter.graph.real & ~removed, sparse=False)
    start = adapter.graph.reader(int(np.flatnonzero(plan.active)[0])).layer
    visitor = CircuitVisitor(prepared, plan)
    for layer in range(start):
        visitor.write_known(prepared.clean, layer)
    skips = {view.path: side_by_side(prepared.clean.resid[start], times) for view in adapter.layers[:start]}
    return run_side_by_side(adapter, prepared.inputs, times, visitor, skips)


def run_side_by_side(adapter: Adapter, inputs: Inputs, times: int, visit: Visit, skips: Skips) -> Tensor:
    """Run a batch `times` times side by side; returns logits `[times, batch, reads, vocab]`, empty if the visitor
    stopped the pass."""
    with torch.no_grad(), undisturbed(adapter.model):
        logits = through_hooks(adapter, inputs.repeat(times), visit, skips)
    return apart(logits, times) if logits.numel() else logits


def skippable(prepared: Prepared, plan: Plan) -> dict[str, Tensor]:
    """Return the modules that the sparse form need not run, by path, each with an output of the right shape.

    Of an attention that does run, the projections of q, k and v are skipped, because their outputs are overwritten. So
    is the output projection, of which only the input is used, unless a post-norm's scale depends on its output.
    """
    skips: dict[str, Tensor] = {}
    empty, times = prepared.empty, len(plan.terms)
    for layer, view in enumerate(prepared.adapter.layers):
        family = view.family
        if not plan.runs(layer, "all"):
            skips[view.path] = side_by_side(empty.resid[layer + 1], times)
            continue
        if family.attn and not plan.runs(layer, "qkv"):
            skips[f"{view.path}.{family.attn}"] = side_by_side(empty.attn_out[layer], times)
        else:
            for site in () if family.mixer else family.projections:
                whole = view.layout.output(site, empty.qkv[layer])
                skips[f"{view.path}.{getattr(family, site)}"] = side_by_side(whole, times)
            if view.post_attn_norm is None:
                skips[f"{view.path}.{family.o}"] = side_by_side(empty.attn_out[layer], times)
        if family.mlp and not plan.runs(layer, "mlp"):
            skips[f"{view.path}.{family.mlp}"] = side_by_side(empty.mlp_out[layer], times)
    return skips


def apart(value: Tensor, times: int) -> Tensor:
    """Split the rows of runs side by side: `[times x batch, ...]` -> `[times, batch, ...]`."""
    rows: Tensor = rearrange(value, "(k b) ... -> k b ...", k=times)
    return rows


def values_by_kind(view: LayerView, plan: Plan, layer: int, read: Tensor) -> dict[str, Chosen]:
    """Return q, k and v of a layer's active readers by kind; `read [rows, pos, readers, d_read]`: their projected
    streams."""
    found: dict[str, Chosen] = {}
    counts = [len(plan.readers(layer, kind)) for kind in "qkv"]
    for kind, part in zip("qkv", read.split(counts, dim=2), strict=True):
        if part.shape[2]:
            at = sent(plan.readers(layer, kind) - plan.graph.readers(layer, kind).start, part.device)
            found[kind] = at, view.values_of(kind, part, at)
    return found


class CircuitVisitor:
    """The visitor that fills D as writers are computed, and overwrites the inputs of active readers.

    Sites are visited in the order of computation, so a writer's D is complete before any reader needs it. In the sparse
    form skipped modules leave D as it was initialised, and the running residual stream has no meaning: readers without
    terms get the empty run's values.
    """

    def __init__(self, prepared: Prepared, plan: Plan) -> None:
        self.prepared, self.plan, self.adapter = prepared, plan, prepared.adapter
        self.graph, self.times = self.adapter.graph, len(plan.terms)
        embed = prepared.ablated.embed
        self.batch, self.length, width = embed.shape
        self.written = embed.new_empty(len(plan.writers), self.times, self.batch * self.length, width)
        self._resid: Tensor  # base of the current layer's streams, to which their terms are added
        self._z: Tensor  # the current layer's heads, before the output projection
        self._values: dict[str, Chosen] = {}  # new q, k and v by kind, of the layer `_values_of`
        self._values_of = -1
        if plan.sparse:
            # skipped modules do not come to the sites that write D, so D of their writers is written in advance
            self._write(0, prepared.clean.resid[0].to(embed) - embed)
            if not prepared.interchange:  # then nodes that no kept edge reaches differ from their ablated values, too
                for layer in range(self.graph.n_layers):
                    self.write_known(prepared.empty, layer, [k for k in ("qkv", "mlp") if not plan.runs(layer, k)])

    def __call__(self, site: str, layer: int, value: Tensor) -> Tensor | Stop | None:
        plan, empty = self.plan, self.prepared.empty
        if site == "resid":
            self._resid = self._base(empty.resid[layer], value)
            if not layer and not plan.sparse:
                self._write(0, apart(value.to(self.adapter.work), self.times) - self.prepared.ablated.embed)
        elif site in PROJECTIONS:
            return self._projection(site, layer, value)
        elif site == "z":
            self._z = value
        elif site == "attn_out":
            self._attention(layer, value)
        elif site == "mlp_in":
            return self._mlp(layer, value)
        elif site == "mlp_out" and self.graph.mlp(layer) in plan.slots:
            written = self.adapter.layers[layer].mlp_written(value).view(self.times, self.batch, self.length, -1)
            self.note_written(layer, "mlp", written)
            self._write(self.graph.mlp(layer), written - self.prepared.ablated.mlps[layer])
        elif site == "final":
            base = self._base(empty.resid[-1], value)
            streams = self._streams(np.array([self.graph.n_readers - 1]), base)
            return base if streams is None else streams[0].view(value.shape).to(value.dtype)
        return None

    # ---------------------------------------------------------------- hooks for subclasses (engine/revision.py)
    def note_values(self, layer: int, new: Mapping[str, Chosen]) -> None:
        """Called with a layer's new q, k and v by kind, `[rows, pos, heads, d_head]` of the heads that change."""

    def note_written(self, layer: int, kind: str, value: Tensor) -> None:
        """Called with the output of a layer's "heads" or "mlp", `[circuits, batch, pos, ...]`."""

    # ---------------------------------------------------------------- writers
    def write_known(self, run: Run, layer: int, kinds: Sequence[str] = ("qkv", "mlp")) -> None:
        """Write D of a layer's heads ("qkv") and MLP ("mlp") from the values of a recorded run."""
        if "qkv" in kinds:
            self._write_heads(layer, run.heads[layer] - self.prepared.ablated.heads[layer])
        if "mlp" in kinds:
            self._write(self.graph.mlp(layer), run.mlps[layer] - self.prepared.ablated.mlps[layer])

    def _write(self, writer: int, difference: Tensor) -> None:
        """Store D of a writer, `[(circuits,) batch, pos, d_model]`, if it occurs in a term."""
        if writer in self.plan.slots:
            flat = difference.reshape(-1, self.batch * self.length, difference.shape[-1])
            self.written[self.plan.slots[writer]] = self.adapter.centre(flat)

    def _write_heads(self, layer: int, difference: Tensor) -> None:
        """Project and store D of a layer's heads, `[(circuits,) batch, pos, heads, d_head]`, of those in a term."""
        heads = self.graph.heads(layer)
        start, stop = np.searchsorted(self.plan.writers, [heads.start, heads.stop]).tolist()
        if start == stop:
            return
        weight = self.adapter.centre(self.adapter.layers[layer].output_weight())  # so the products are centred, too
        by_head = rearrange(difference.expand(self.times, *difference.shape[-4:]), "k b t h e -> h (k b t) e")
        if stop - start < len(weight):
            inside = sent(self.plan.writers[start:stop] - heads.start, weight.device)
            by_head, weight = by_head[inside], weight[inside]
        torch.bmm(by_head, weight, out=self.written[start:stop].flatten(1, 2))

    def _attention(self, layer: int, attn_out: Tensor) -> None:
        view = self.adapter.layers[layer]
        if not self.plan.slots.keys().isdisjoint(range(self.graph.head(layer), self.graph.mlp(layer))):
            values = apart(view.scaled_heads(self._z, attn_out), self.times)
            self.note_written(layer, "heads", values)
            self._write_heads(layer, values - self.prepared.ablated.heads[layer])
        if not (self.graph.parallel or self.plan.sparse):  # a sequential block's MLP reads what attention has added
            self._resid = self._resid + view.attn_written(attn_out).to(self._resid.dtype)

    # ---------------------------------------------------------------- readers
    def _base(self, empty: Tensor, own: Tensor) -> Tensor:
        """Return the value without any terms: the empty run's in the sparse form, the model's own in the dense form."""
        return side_by_side(empty, self.times) if self.plan.sparse else own

    def _streams(self, readers: np.ndarray, base: Tensor) -> Tensor | None:
        """Return the readers' streams `[readers, circuits x batch x pos, d_model]`; None if none of them is active."""
        if not self.plan.active[readers].any():
            return None
        flat = self.adapter.centre(base.to(self.adapter.work)).flatten(0, 1)
        return torch.cat([self.slice_streams(readers, flat, rows) for rows in self._slices(len(readers))], dim=1)

    def slice_streams(self, readers: np.ndarray, flat: Tensor, rows: tuple[int, slice]) -> Tensor:
        """Return streams `[readers, tokens, d_model]` at `rows = (circuit, tokens)`; `flat`: the base of all rows."""
        circuit, tokens = rows
        coefficients, written = self.terms_of(readers, rows)
        offset = circuit * self.batch * self.length
        stream = flat[offset + tokens.start : offset + tokens.stop].flatten()
        sign = 1.0 if self.plan.sparse else -1.0
        return torch.addmm(stream, sign * coefficients, written).view(len(readers), -1, flat.shape[-1])

    def terms_of(self, readers: np.ndarray, rows: tuple[int, slice]) -> tuple[Tensor, Tensor]:
        """Return one circuit's coefficients `[readers, writers]` (0 or 1) and D `[writers, tokens x d_model]`.

        Writers are numbered in the order of computation, so those that readers of one layer and kind can see are the
        first rows of D: no row is copied, and none is read before it is written.
        """
        circuit, tokens = rows
        count = int(np.searchsorted(self.plan.writers, self.graph.limits[readers[0]]))
        terms = self.plan.terms[circuit][self.plan.writers[:count, None], readers].T
        coefficients = sent(terms.astype(np.float32), self.written.device).to(self.written)
        return coefficients, self.written[:count, circuit, tokens].flatten(1)

    def _slices(self, n_readers: int) -> list[tuple[int, slice]]:
        """Return (circuit, tokens) slices whose streams fit in cache."""
        n_tokens, width = self.batch * self.length, self.written.shape[-1]
        size = max(1, in_cache(self.written.device) // (n_readers * width * self.written.element_size()))
        starts = range(0, n_tokens, size)
        return [(k, slice(start, min(start + size, n_tokens))) for k in range(self.times) for start in starts]

    def _projection(self, site: str, layer: int, value: Tensor) -> Tensor:
        """Overwrite the active heads in a projection's output; q, k and v are all computed at the first projection."""
        if self._values_of != layer:  # the layer's first projection, which differs by family
            self._values, self._values_of = self._attention_values(layer), layer
            self.note_values(layer, self._values)
        layout = self.adapter.layers[layer].layout
        base = self._base(layout.output(site, self.prepared.empty.qkv[layer]), value)
        return base if self._values.keys().isdisjoint(PROJECTIONS[site]) else layout.replaced(site, base, self._values)

    def _attention_values(self, layer: int) -> dict[str, Chosen]:
        """Return the layer's new q, k and v by kind, of the active readers."""
        readers = self.plan.readers(layer, "qkv")
        if not len(readers):
            return {}
        folded = self.prepared.readers(layer)
        local = sent(readers - self.graph.readers(layer, "qkv").start, self.written.device)
        flat = self.adapter.centre(self._resid.to(self.adapter.work)).flatten(0, 1)
        parts = [  # in slices, because streams of all readers at all tokens would not fit in cache
            folded.values(self.slice_streams(readers, flat, rows), local, self.adapter.centred)
            for rows in self._slices(len(readers))
        ]
        read = torch.cat(parts, dim=1).transpose(0, 1).unflatten(0, (self.times * self.batch, self.length))
        return values_by_kind(self.adapter.layers[layer], self.plan, layer, read)

    def _mlp(self, layer: int, value: Tensor) -> Tensor:
        # in the sparse form self._resid is not up to date, because a skipped attention does not come to its site
        base = self._base(self.prepared.empty.middle[layer], self._resid)
        streams = self._streams(self.plan.readers(layer, "mlp"), base)
        if streams is None:
            return self._base(self.prepared.empty.mlp_in[layer], value)
        return self.adapter.layers[layer].mlp_reads(streams[0]).view(value.shape).to(value.dtype)
