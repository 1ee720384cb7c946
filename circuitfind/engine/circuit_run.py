"""Exact circuits: one forward pass in which every reader sees only what its circuit lets through.

With `D_u = current_u - ablated_u` for each writer, a reader v of circuit C reads, exactly,

    current residual - sum of D_u over the edges u -> v outside C        (dense form)
    empty residual   + sum of D_u over the edges u -> v inside C         (sparse form)

1. The form with fewer terms is taken (under zero and mean ablation always the sparse one). In
   either, a reader with no term keeps the baseline's value without arithmetic: in the dense form the model's own (so
   the full circuit is the clean run to the bit), in the sparse form that of the run with every edge ablated.
2. The other readers' streams are one product of coefficients with the stacked `D`, then normed, projected, and written
   over the projection's output (or the MLP's or final norm's input).
3. In the sparse form nothing depends on the running residual, so blocks, attentions and MLPs without an active reader
   are not run at all.

Several circuits are evaluated side by side as rows of one batch, circuit after circuit.
"""

from __future__ import annotations

import numpy as np
import torch
from einops import rearrange
from torch import Tensor

from circuitfind.engine.memory import in_cache
from circuitfind.engine.plan import Plan, prefers_sparse
from circuitfind.engine.prepare import Prepared
from circuitfind.engine.writers import output
from circuitfind.models.backends import Stop, through_hooks, undisturbed
from circuitfind.models.layer import PROJECTIONS


def run_circuits(prepared: Prepared, masks: np.ndarray, sparse: bool | None = None) -> Tensor:
    """Runs circuits on a prepared batch.

    Args:
        masks: `[circuits, writers, readers]` bool.
        sparse: force one form; by default the cheaper one is taken.

    Returns:
        Logits `[circuits, batch, reads, vocab]`.
    """
    adapter = prepared.adapter
    sparse = prefers_sparse(prepared, masks) if sparse is None else sparse
    plan = Plan.of(prepared, masks, sparse)
    visitor = CircuitVisitor(prepared, plan)
    inputs = prepared.batch.clean.repeat(len(masks))
    with torch.no_grad(), undisturbed(adapter.model):
        logits = through_hooks(adapter, inputs, visitor, skips=skippable(prepared, plan))
    return apart(logits, len(masks))


def run_without(prepared: Prepared, removed: np.ndarray) -> Tensor:
    """Runs a prepared batch without some edges, restarted at the first block with a reader of any of them.

    Up to there the base run holds, to the bit: its blocks are skipped, and what their writers carry is known. From
    there it is a run in the dense form.

    Args:
        removed: `[runs, writers, readers]` bool, at least one edge in all.

    Returns:
        Logits `[runs, batch, reads, vocab]`, equal to those of `run_circuits` with all other edges kept.
    """
    adapter, times = prepared.adapter, len(removed)
    plan = Plan.of(prepared, adapter.graph.real & ~removed, sparse=False)
    start = adapter.graph.reader(int(np.flatnonzero(plan.active)[0])).layer
    visitor = CircuitVisitor(prepared, plan)
    visitor.write_before(start)
    skips = {view.path: side_by_side(prepared.clean.resid[start], times) for view in adapter.layers[:start]}
    with torch.no_grad(), undisturbed(adapter.model):
        logits = through_hooks(adapter, prepared.batch.clean.repeat(times), visitor, skips)
    return apart(logits, times)


def skippable(prepared: Prepared, plan: Plan) -> dict[str, Tensor]:
    """Modules that the sparse form need not run, with values of the right shape."""
    if not plan.sparse:
        return {}
    family, empty, skips = prepared.adapter.family, prepared.empty, {}
    times = len(plan.terms)
    for layer, view in enumerate(prepared.adapter.layers):
        if not plan.runs(layer, "all"):
            skips[view.path] = side_by_side(empty.resid[layer + 1], times)
            continue
        if family.attn and not plan.runs(layer, "qkv"):
            skips[f"{view.path}.{family.attn}"] = side_by_side(empty.attn_out[layer], times)
        if family.mlp and not plan.runs(layer, "mlp"):
            skips[f"{view.path}.{family.mlp}"] = side_by_side(empty.mlp_out[layer], times)
    return skips


def side_by_side(value: Tensor, times: int) -> Tensor:
    """A batch's values `[batch, ...]`, as often as circuits run in one batch."""
    return value if times == 1 else value.repeat(times, *[1] * (value.ndim - 1))


def apart(value: Tensor, times: int) -> Tensor:
    """`[circuits, batch, ...]` from rows of circuits that ran side by side."""
    rows: Tensor = rearrange(value, "(k b) ... -> k b ...", k=times)
    return rows


class CircuitVisitor:
    """Fills `D` as writers are computed and overwrites the active readers."""

    def __init__(self, prepared: Prepared, plan: Plan) -> None:
        self.prepared, self.plan, self.adapter = prepared, plan, prepared.adapter
        self.graph, self.times = self.adapter.graph, len(plan.terms)
        embed = prepared.ablated.embed
        self.batch, self.length, width = embed.shape
        self.written = embed.new_empty(len(plan.writers), self.times, self.batch * self.length, width)
        self.sign = 1.0 if plan.sparse else -1.0
        self._resid: Tensor  # what the readers of the current layer read, before their terms
        self._z: Tensor
        self._values: dict[str, Tensor] = {}  # by kind, of the layer `_values_of`
        self._values_of = -1
        if plan.sparse:
            # skipped modules never reach the sites at which D is written: what is known beforehand is written now
            self._write(0, prepared.clean.resid[0].to(embed) - embed)
            if not prepared.interchange:
                self._write_unreached()

    def __call__(self, site: str, layer: int, value: Tensor) -> Tensor | Stop | None:
        plan, empty = self.plan, self.prepared.empty
        if site == "resid":
            self._resid = side_by_side(empty.resid[layer], self.times) if plan.sparse else value
            if not layer and not plan.sparse:
                self._write(0, self._as_circuits(value) - self.prepared.ablated.embed)
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
            # in the sparse form the running stream means nothing: skipped blocks have put anything there
            base = side_by_side(empty.resid[-1], self.times) if plan.sparse else value
            streams = self._streams(np.array([self.graph.n_readers - 1]), base)
            return base if streams is None else streams[0].view(value.shape).to(value.dtype)
        return None

    # ---------------------------------------------------------------- for runs that remember (engine/revision.py)
    def note_values(self, layer: int, kind: str, value: Tensor) -> None:
        """Is told a layer's new q, k or v, `[rows, pos, heads, d_head]`."""

    def note_written(self, layer: int, kind: str, value: Tensor) -> None:
        """Is told what a layer's "heads" or "mlp" wrote, `[circuits, batch, pos, ...]`."""

    # ---------------------------------------------------------------- writers
    def _write(self, writer: int, difference: Tensor) -> None:
        """Stores D of a writer, `[(circuits,) batch, pos, d_model]`."""
        if writer in self.plan.slots:
            flat = difference.reshape(-1, self.batch * self.length, difference.shape[-1])
            self.written[self.plan.slots[writer]] = self._centre(flat)

    def write_before(self, layer: int) -> None:
        """D of the heads and MLPs before a block, from the clean run (the input comes by itself)."""
        clean, ablated = self.prepared.clean.writers, self.prepared.ablated
        for writer in self.plan.writers.tolist():
            if 0 < writer < self.graph.head(layer):
                self._write(writer, output(self.adapter, clean, writer, less=ablated))

    def _write_unreached(self) -> None:
        """D of the nodes that nothing reaches: under zero or mean ablation they too differ from their ablated value."""
        empty, values = self.prepared.empty, self.prepared.ablated
        for layer in range(self.graph.n_layers):
            outputs = self.adapter.head_outputs(layer, empty.heads[layer] - values.heads[layer])
            for head, written in enumerate(outputs):
                self._write(self.graph.head(layer, head), written)
            self._write(self.graph.mlp(layer), empty.mlps[layer] - values.mlps[layer])

    def _attention(self, layer: int, attn_out: Tensor) -> None:
        view, plan = self.adapter.layers[layer], self.plan
        heads = [h for h in range(self.graph.n_heads) if self.graph.head(layer, h) in plan.slots]
        if heads:
            values = self._as_circuits(view.scaled_heads(self._z, attn_out))
            self.note_written(layer, "heads", values)
            scaled = values - self.prepared.ablated.heads[layer]
            weight = self._centre(view.output_weight())  # then the products are centred, too
            for head in heads:
                slot = plan.slots[self.graph.head(layer, head)]
                flat = scaled[..., head, :].flatten(1, 2)
                torch.matmul(flat, weight[head], out=self.written[slot])
        if not (self.graph.parallel or plan.sparse):  # in a sequential block the MLP reads what attention has added
            self._resid = self._resid + view.attn_written(attn_out).to(self._resid.dtype)

    def _as_circuits(self, value: Tensor) -> Tensor:
        return apart(value.to(self.adapter.work), self.times)

    def _centre(self, x: Tensor) -> Tensor:
        """Takes the mean off where every norm of the model does so anyway: then no stream's variance needs its mean."""
        return x - x.mean(-1, keepdim=True) if self.adapter.centred else x

    # ---------------------------------------------------------------- readers
    def _streams(self, readers: np.ndarray, base: Tensor) -> Tensor | None:
        """`[readers, circuits x batch x pos, d_model]` that the readers see; None if the baseline is all they see."""
        if not self.plan.active[readers].any():
            return None
        flat = self._centre(base.to(self.adapter.work)).flatten(0, 1)
        return torch.cat([self.slice_streams(readers, flat, rows) for rows in self._slices(len(readers))], dim=1)

    def slice_streams(self, readers: np.ndarray, flat: Tensor, rows: tuple[int, slice]) -> Tensor:
        """Streams of one slice of one circuit's tokens."""
        circuit, tokens = rows
        # writers are numbered in order of computation: those that these readers can see are a prefix of the rows of D
        count = int(np.searchsorted(self.plan.writers, self.graph.limits[readers[0]]))
        terms = self.plan.terms[circuit][np.ix_(self.plan.writers[:count], readers)].T
        coefficients = self.sign * torch.from_numpy(terms.astype(np.float32)).to(self.written)
        written = self.written[:count, circuit, tokens].flatten(1)
        offset = circuit * self.batch * self.length
        stream = flat[offset + tokens.start : offset + tokens.stop].flatten()
        return torch.addmm(stream, coefficients, written).view(len(readers), -1, flat.shape[-1])

    def _slices(self, n_readers: int) -> list[tuple[int, slice]]:
        """(circuit, tokens) slices small enough to stay in cache."""
        n_tokens, width = self.batch * self.length, self.written.shape[-1]
        size = max(1, in_cache(self.written.device) // (n_readers * width * self.written.element_size()))
        starts = range(0, n_tokens, size)
        return [(k, slice(start, min(start + size, n_tokens))) for k in range(self.times) for start in starts]

    def _projection(self, site: str, layer: int, value: Tensor) -> Tensor | None:
        """Overwrites the active heads in a projection's output; all three kinds are computed at the first of them."""
        if self._values_of != layer:  # the first of the layer's projections, whichever comes first in this family
            self._values, self._values_of = self._attention_values(layer), layer
        layout, empty = self.adapter.layers[layer].layout, self.prepared.empty.qkv[layer]._asdict()
        if self._values.keys().isdisjoint(site):  # a projection's name spells its kinds: "q" or "qkv"
            return side_by_side(layout.whole(site, empty), self.times) if self.plan.sparse else None
        if self.plan.sparse:
            own = {kind: side_by_side(empty[kind], self.times) for kind in site}
        else:
            own = layout.parts(site, value)
        return layout.whole(site, {kind: self._overwritten(kind, layer, heads) for kind, heads in own.items()})

    def _overwritten(self, kind: str, layer: int, own: Tensor) -> Tensor:
        if kind not in self._values:
            return own
        readers = self.plan.readers(layer, kind) - self.graph.readers(layer, kind).start
        new = own.clone()
        new[..., torch.from_numpy(readers).to(own.device), :] = self._values[kind].to(own.dtype)
        self.note_values(layer, kind, new)
        return new

    def _attention_values(self, layer: int) -> dict[str, Tensor]:
        """By kind, `[rows, pos, active readers, d_head]`."""
        readers = self.plan.readers(layer, "qkv")
        if not len(readers):
            return {}
        folded = self.prepared.readers(layer)
        local = torch.from_numpy(readers - self.graph.readers(layer, "qkv").start).to(self.written.device)
        flat = self._centre(self._resid.to(self.adapter.work)).flatten(0, 1)
        parts = [
            folded.values(self.slice_streams(readers, flat, rows), local, self.adapter.centred)
            for rows in self._slices(len(readers))
        ]
        values = torch.cat(parts, dim=1).transpose(0, 1).unflatten(0, (self.times * self.batch, self.length))
        counts = {kind: len(self.plan.readers(layer, kind)) for kind in "qkv"}
        pieces = zip(counts, values.split(list(counts.values()), dim=2), strict=True)
        return {kind: piece for kind, piece in pieces if counts[kind]}

    def _mlp(self, layer: int, value: Tensor) -> Tensor | None:
        # not self._resid in the sparse form: a skipped attention never reaches the site that moves it on
        base = side_by_side(self.prepared.empty.middle[layer], self.times) if self.plan.sparse else self._resid
        streams = self._streams(self.plan.readers(layer, "mlp"), base)
        if streams is None:
            return side_by_side(self.prepared.empty.mlp_in[layer], self.times) if self.plan.sparse else None
        norm = self.adapter.layers[layer].mlp_norm
        return (streams[0] if norm is None else norm(streams[0])).view(value.shape).to(value.dtype)
