"""Runs that differ from a base run from one layer on, many side by side, restarted where they begin to differ.

1. `edges`: a reader sees other values of some writers than in the base run. Blocks before its layer are skipped; an MLP
   reader skips the layer's attention too, `logits` skips every block. The patched stream goes through the norm and the
   reader's own projection only. Of a key or value that one query head reads (`Adapter.ungrouped`), the head's whole
   group attends to the patched one, and the others' outputs are put back to the base run's.
2. `from_stream`: something is added to the residual stream that enters a block.
3. `after_mlp`: what a change of the stream that an MLP reads has become where the next block begins. An MLP works on
   each position by itself, so one run with the change at *all* positions serves every patch of some positions, and a
   sweep over positions restarts at the next block. `after_middle` is the same for a stream that is replaced there.
4. `from_projection`: a layer's queries, keys or values are replaced; the layer's attention is run again.

Changes are differences to the base run, in circuitfind's own precision; zero means unchanged.
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
    """A base run of a batch, from which patched runs start."""

    adapter: Adapter
    inputs: Inputs
    base: Run
    _latest: dict[int, AttentionReaders] = field(default_factory=dict)
    _attended: dict[int, Tensor] = field(default_factory=dict)  # by layer, the base run's heads

    @property
    def at_once(self) -> int:
        """How many patches run side by side."""
        return PATCHES.runs(self.adapter.device, self.inputs.ids.numel())

    # ---------------------------------------------------------------- one reader's input
    def edges(self, reader: int, writers: list[int], change: Writers) -> Tensor:
        """Logits `[writers, batch, reads, vocab]` of runs in which one edge `writer -> reader` is patched; `change`:
        the writers' values on a patched edge minus their values in the base run."""
        graph, times = self.adapter.graph, len(writers)
        layer, kind, head = graph.reader(reader)
        base = (self.base.middle if kind == "mlp" else self.base.resid)[layer]
        changes = torch.stack([output(self.adapter, change, writer) for writer in writers])
        streams = (base.to(self.adapter.work) + changes).flatten(0, 1)  # writers x batch, pos, d_model
        skips = self._earlier(layer, times)
        if kind == "mlp":
            skips |= self._attention(layer, times)
            return self._run(times, _shown("mlp_in", layer, self.adapter.layers[layer].mlp_reads(streams)), skips)
        if kind == "logits":
            return self._run(times, _shown("final", layer, streams), skips)
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
        """What is patched for this query head (and, in a norm of all keys together, its like in other groups) alone."""
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
        """A layer's folded weights; the latest layer's are kept, because edges come reader by reader."""
        if layer not in self._latest:
            self._latest.clear()
            self._latest[layer] = AttentionReaders(self.adapter.layers[layer])
        return self._latest[layer]

    # ---------------------------------------------------------------- the stream
    def from_stream(self, layer: int, changes: Tensor) -> Tensor:
        """Logits `[patches, batch, reads, vocab]` of runs in which `changes [patches, batch, pos, d_model]` are added
        to the base run's stream where block `layer` begins (the number of layers: at the final norm)."""
        streams = (self.base.resid[layer].to(self.adapter.work) + changes).to(self.adapter.dtype).flatten(0, 1)

        def visit(site: str, at: int, value: Tensor) -> Tensor | None:
            return streams if at == layer and site in ("resid", "final") else None

        skips = {view.path: streams for view in self.adapter.layers[:layer]}
        return self._run(len(changes), visit, skips)

    def after_mlp(self, layer: int, changes: Tensor) -> Tensor:
        """What changes `[patches, batch, pos, d_model]` after a layer's attention are where the next block begins."""
        if self.adapter.graph.parallel:  # this layer's MLP does not read them
            return changes
        middle = self.base.middle[layer].to(self.adapter.work) + changes
        return changes + self._rewritten(layer, middle) - self.base.mlps[layer]

    def after_middle(self, layer: int, changes: Tensor) -> Tensor:
        """As `after_mlp`, where the stream after attention is replaced, rather than changed: not for parallel blocks.

        The next block sees that stream and what the MLP adds to it, without the base run's rounding, which norms blow
        up where little is left of the stream (zero ablation).
        """
        middle = self.base.middle[layer].to(self.adapter.work) + changes
        after, bias = middle + self._rewritten(layer, middle), self.adapter.layers[layer].constants()[1]
        after = after if bias is None else after + bias
        moved = after - self.base.resid[layer + 1].to(self.adapter.work)
        return torch.where((changes != 0).any(-1, keepdim=True), moved, 0)

    def _rewritten(self, layer: int, middle: Tensor) -> Tensor:
        """`[patches, batch, pos, d_model]` what a layer's MLP adds when such streams are before its norm."""
        view, times = self.adapter.layers[layer], len(middle)
        show = _shown("mlp_in", layer, view.mlp_reads(middle).flatten(0, 1))
        skips = self._earlier(layer, times) | self._attention(layer, times)
        return view.mlp_written(self._until(("mlp_out", layer), show, times, skips)).view(middle.shape)

    # ---------------------------------------------------------------- queries, keys, values
    def from_projection(self, layer: int, kind: str, values: Tensor) -> Tensor:
        """Logits of runs in which a layer's q, k or v are `[patches, batch, pos, heads, d_head]`."""
        visit = self._projected(layer, kind, values.flatten(0, 1))
        return self._run(len(values), visit, self._earlier(layer, len(values)))

    def heads_from_projection(self, layer: int, kind: str, values: Tensor) -> Tensor:
        """`[patches x batch, pos, heads, d_head]` of the layer before its output projection; nothing else is run."""
        start = side_by_side(self.base.resid[layer], len(values))
        others = {view.path: start for index, view in enumerate(self.adapter.layers) if index != layer}
        z = self._until(("z", layer), self._projected(layer, kind, values.flatten(0, 1)), len(values), others)
        return z.view(*z.shape[:-1], self.adapter.graph.n_heads, -1)

    def _projected(self, layer: int, kind: str, new: Tensor, head: int | None = None) -> Visit:
        """Replaces a layer's q, k or v by `[rows, pos, heads, d_head]`; `head`: only this one, of one head."""
        layout = self.adapter.layers[layer].layout
        at = torch.arange(new.shape[-2], device=new.device) + (head or 0)

        def visit(site: str, where: int, value: Tensor) -> Tensor | None:
            if where != layer or kind not in PROJECTIONS.get(site, ""):
                return None
            return layout.replaced(site, value, {kind: (at, new)})

        return visit

    # ---------------------------------------------------------------- running
    def _earlier(self, layer: int, times: int) -> dict[str, Tensor]:
        """Blocks before a layer, which need not run."""
        start = side_by_side(self.base.resid[layer], times)
        return {view.path: start for view in self.adapter.layers[:layer]}

    def _attention(self, layer: int, times: int) -> dict[str, Tensor]:
        """A layer's attention, where the family has it in a module of its own that can be skipped."""
        view = self.adapter.layers[layer]
        if not view.family.attn:
            return {}
        path = f"{view.path}.{view.family.attn}"
        return {path: side_by_side(self.base.attn_out[layer], times)}

    def _run(self, times: int, visit: Visit, skips: Skips) -> Tensor:
        return run_side_by_side(self.adapter, self.inputs, times, visit, skips)

    def _until(self, end: tuple[str, int], visit: Visit, times: int, skips: Skips) -> Tensor:
        """What a site holds in such a run, which ends there."""
        found: list[Tensor] = []

        def visit_or_stop(site: str, layer: int, value: Tensor) -> Tensor | Stop | None:
            if (site, layer) != end:
                return visit(site, layer, value)
            found.append(value.detach())
            return STOP

        self._run(times, visit_or_stop, skips)
        return found[0]


def _shown(site: str, layer: int, new: Tensor) -> Visit:
    """Replaces what one site of a layer holds."""

    def visit(name: str, at: int, value: Tensor) -> Tensor | None:
        return new.view(value.shape).to(value.dtype) if (name, at) == (site, layer) else None

    return visit


def at_position(change: Tensor, position: int) -> Tensor:
    """A change `[batch, pos, d_model]` at one position only."""
    alone = torch.zeros_like(change)
    alone[:, position] = change[:, position]
    return alone
