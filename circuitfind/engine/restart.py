"""Patched runs that start at the layer where they begin to differ from a base run; many run side by side.

1. `edges`: a reader sees a patched value of one writer. Blocks before its layer are skipped; an MLP reader also skips
   the layer's attention, and `logits` every block. The patched stream goes through the norm and the reader's own
   projection only. If the reader is one query head's copy of a key or value (`Adapter.ungrouped`), all heads of the
   group attend to the patched key or value, and the outputs of the others are set back to the base run's.
2. `from_stream`: a change is added to the residual stream where a block begins.
3. `after_mlp`: a change of the stream after a layer's attention is taken through the MLP to where the next block
   begins. An MLP computes each position separately, so one run with the change at *all* positions serves patches of
   single positions, too, and a sweep over positions restarts at the next block. `after_middle` does the same where the
   stream is replaced, rather than changed a little.
4. `from_projection`: a layer's queries, keys or values are replaced, and its attention is run again.

Changes are differences from the base run, in the adapter's `work` precision; zero means unchanged.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from circuitfind.batch import Inputs, side_by_side
from circuitfind.engine.capture import Run
from circuitfind.engine.circuit_run import run_side_by_side
from circuitfind.engine.memory_plan import PATCHES
from circuitfind.engine.writers import Writers, output
from circuitfind.models.adapter import Adapter
from circuitfind.models.backends import STOP, Skips, Stop, Visit
from circuitfind.models.layer import PROJECTIONS, AttentionReaders


@dataclass(frozen=True, eq=False)
class Restart:
    """A base run of a batch, and the patched runs that start from it."""

    adapter: Adapter
    inputs: Inputs
    base: Run
    _latest: dict[int, AttentionReaders] = field(default_factory=dict)
    _attended: dict[int, Tensor] = field(default_factory=dict)  # by layer, head outputs of the base run

    @property
    def at_once(self) -> int:
        """How many patches to run side by side."""
        return PATCHES.runs(self.adapter.device, self.inputs.ids.numel())

    # ---------------------------------------------------------------- one reader's input
    def edges(self, reader: int, writers: list[int], change: Writers) -> Tensor:
        """Return logits `[writers, batch, reads, vocab]` of runs in each of which one edge `writer -> reader` is
        patched. `change`: the values on a patched edge minus those in the base run, of all writers."""
        graph, times = self.adapter.graph, len(writers)
        layer, kind, head = graph.reader(reader)
        base = (self.base.middle if kind == "mlp" else self.base.resid)[layer]
        changes = torch.stack([output(self.adapter, change, writer) for writer in writers])
        streams = (base.to(self.adapter.work) + changes).flatten(0, 1)  # writers x batch, pos, d_model
        skips = self._skipped_blocks(layer, times)
        if kind == "mlp":
            skips |= self._skipped_attention(layer, times)
            return self._run(times, _replacing("mlp_in", layer, self.adapter.layers[layer].mlp_reads(streams)), skips)
        if kind == "logits":
            return self._run(times, _replacing("final", layer, streams), skips)
        kind = "q" if kind == "mixer" else kind
        local = torch.tensor([reader - graph.readers(layer, "qkv").start], device=streams.device)
        read = self._readers(layer).values(streams.flatten(0, 1)[None], local, centred=False)[0]
        read = read.unflatten(0, streams.shape[:2]).unsqueeze(-2)
        view = self.adapter.layers[layer]
        copies = view.copies if kind in "kv" else 1
        values = view.values_of(kind, read, torch.tensor([head // copies], device=streams.device))
        visit = self._projected(layer, kind, values, head // copies)
        return self._run(times, self._for_one_copy(layer, head, visit) if copies > 1 else visit, skips)

    def _for_one_copy(self, layer: int, head: int, patched: Visit) -> Visit:
        """Restrict a patch of a shared key or value to this query head: other heads get the base run's outputs.

        Heads with the same place in other groups are not set back, because a norm of all keys may change them, too.
        """
        if layer not in self._attended:
            self._attended.clear()
            self._attended[layer] = self.heads_from_projection(layer, "k", self.base.qkv[layer].k[None])
        base, copies = self._attended[layer], self.adapter.layers[layer].copies
        others = torch.arange(base.shape[2], device=base.device) % copies != head % copies

        def visit(site: str, at: int, value: Tensor) -> Tensor | Stop | None:
            if (site, at) != ("z", layer):
                return patched(site, at, value)
            heads = value.unflatten(-1, base.shape[2:]).unflatten(0, (-1, len(base)))
            return torch.where(others[:, None], base, heads).view(value.shape)

        return visit

    def _readers(self, layer: int) -> AttentionReaders:
        """Return a layer's folded weights; the latest layer's are kept, because edges come reader by reader."""
        if layer not in self._latest:
            self._latest.clear()
            self._latest[layer] = AttentionReaders(self.adapter.layers[layer])
        return self._latest[layer]

    # ---------------------------------------------------------------- the stream
    def from_stream(self, layer: int, changes: Tensor) -> Tensor:
        """Return logits `[patches, batch, reads, vocab]` of runs in which `changes [patches, batch, pos, d_model]` are
        added to the base run's stream where block `layer` begins (`layer = n_layers`: at the final norm)."""
        streams = (self.base.resid[layer].to(self.adapter.work) + changes).to(self.adapter.dtype).flatten(0, 1)

        def visit(site: str, at: int, value: Tensor) -> Tensor | None:
            return streams if at == layer and site in ("resid", "final") else None

        skips = {view.path: streams for view in self.adapter.layers[:layer]}
        return self._run(len(changes), visit, skips)

    def after_mlp(self, layer: int, changes: Tensor) -> Tensor:
        """Return the changes of the stream where the next block begins, given `changes [patches, batch, pos, d_model]`
        after a layer's attention."""
        if self.adapter.graph.parallel:  # this layer's MLP does not read them
            return changes
        middle = self.base.middle[layer].to(self.adapter.work) + changes
        return changes + self._rewritten(layer, middle) - self.base.mlps[layer]

    def after_middle(self, layer: int, changes: Tensor) -> Tensor:
        """Do what `after_mlp` does, where the stream after attention is replaced; not for parallel blocks.

        The new stream is computed without the base run's values, whose rounding errors a norm would amplify where
        little is left of the stream (zero ablation).
        """
        middle = self.base.middle[layer].to(self.adapter.work) + changes
        after, bias = middle + self._rewritten(layer, middle), self.adapter.layers[layer].constants()[1]
        after = after if bias is None else after + bias
        moved = after - self.base.resid[layer + 1].to(self.adapter.work)
        return torch.where((changes != 0).any(-1, keepdim=True), moved, 0)

    def _rewritten(self, layer: int, middle: Tensor) -> Tensor:
        """Return a layer's MLP outputs `[patches, batch, pos, d_model]`, as added to the stream, for the streams
        `middle` before its norm."""
        view, times = self.adapter.layers[layer], len(middle)
        show = _replacing("mlp_in", layer, view.mlp_reads(middle).flatten(0, 1))
        skips = self._skipped_blocks(layer, times) | self._skipped_attention(layer, times)
        return view.mlp_written(self._value_at(("mlp_out", layer), show, times, skips)).view(middle.shape)

    # ---------------------------------------------------------------- queries, keys, values
    def from_projection(self, layer: int, kind: str, values: Tensor) -> Tensor:
        """Return logits `[patches, batch, reads, vocab]` of runs in which a layer's q, k or v are replaced by `values
        [patches, batch, pos, heads, d_head]`."""
        visit = self._projected(layer, kind, values.flatten(0, 1))
        return self._run(len(values), visit, self._skipped_blocks(layer, len(values)))

    def heads_from_projection(self, layer: int, kind: str, values: Tensor) -> Tensor:
        """Return the layer's heads before its output projection, `[patches x batch, pos, heads, d_head]`, in runs of
        its attention only with q, k or v replaced by `values`."""
        start = side_by_side(self.base.resid[layer], len(values))
        others = {view.path: start for index, view in enumerate(self.adapter.layers) if index != layer}
        z = self._value_at(("z", layer), self._projected(layer, kind, values.flatten(0, 1)), len(values), others)
        return z.view(*z.shape[:-1], self.adapter.graph.n_heads, -1)

    def _projected(self, layer: int, kind: str, new: Tensor, head: int | None = None) -> Visit:
        """Return a visitor that replaces a layer's q, k or v by `new [rows, pos, heads, d_head]`; with `head`, only
        that head's, by a `new` of one head."""
        layout = self.adapter.layers[layer].layout
        at = torch.arange(new.shape[-2], device=new.device) + (head or 0)

        def visit(site: str, where: int, value: Tensor) -> Tensor | None:
            if where != layer or kind not in PROJECTIONS.get(site, ""):
                return None
            return layout.replaced(site, value, {kind: (at, new)})

        return visit

    # ---------------------------------------------------------------- running
    def _skipped_blocks(self, layer: int, times: int) -> dict[str, Tensor]:
        """Return the blocks before a layer, to be skipped, each with the base run's stream at the layer as output."""
        start = side_by_side(self.base.resid[layer], times)
        return {view.path: start for view in self.adapter.layers[:layer]}

    def _skipped_attention(self, layer: int, times: int) -> dict[str, Tensor]:
        """Return a layer's attention, to be skipped, with the base run's output; none if it is no module of its own."""
        view = self.adapter.layers[layer]
        if not view.family.attn:
            return {}
        path = f"{view.path}.{view.family.attn}"
        return {path: side_by_side(self.base.attn_out[layer], times)}

    def _run(self, times: int, visit: Visit, skips: Skips) -> Tensor:
        return run_side_by_side(self.adapter, self.inputs, times, visit, skips)

    def _value_at(self, end: tuple[str, int], visit: Visit, times: int, skips: Skips) -> Tensor:
        """Run until a site (name, layer) is reached, and return its value."""
        found: list[Tensor] = []

        def visit_or_stop(site: str, layer: int, value: Tensor) -> Tensor | Stop | None:
            if (site, layer) != end:
                return visit(site, layer, value)
            found.append(value.detach())
            return STOP

        self._run(times, visit_or_stop, skips)
        return found[0]


def _replacing(site: str, layer: int, new: Tensor) -> Visit:
    """Return a visitor that replaces the value of one site."""

    def visit(name: str, at: int, value: Tensor) -> Tensor | None:
        return new.view(value.shape).to(value.dtype) if (name, at) == (site, layer) else None

    return visit


def at_position(change: Tensor, position: int) -> Tensor:
    """Return a change `[batch, pos, d_model]` that is zero except at one position."""
    alone = torch.zeros_like(change)
    alone[:, position] = change[:, position]
    return alone
