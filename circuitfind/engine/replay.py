"""Exact effects of single edges: one reader is shown another writer's value, and the model is replayed from there.

1. Patching a reader of layer L leaves all earlier layers as they were: blocks before L are skipped and L starts from
   the cached residual. An edge into an MLP skips the layer's attention too, one into `logits` skips every block.
2. Edges of one reader share that prefix, so several of them are rows of one batch.
3. The patched stream `residual + other_u - base_u` goes through the norm and the reader's own projection only.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from circuitfind.batch import Inputs
from circuitfind.engine.capture import Run, Writers
from circuitfind.engine.folded import AttentionReaders
from circuitfind.models.adapter import Adapter
from circuitfind.models.backends import through_hooks, undisturbed
from circuitfind.models.layout import Heads


@dataclass(frozen=True, eq=False)
class Replay:
    """A base run of a batch, and what the writers carry instead on a patched edge.

    Attributes:
        change: writers' values on a patched edge minus their values in the base run.
    """

    adapter: Adapter
    inputs: Inputs
    base: Run
    change: Writers
    _latest: dict[int, AttentionReaders] = field(default_factory=dict)

    def patch_edges(self, reader: int, writers: list[int]) -> Tensor:
        """Patches edges `writer -> reader`, one at a time, side by side.

        Returns:
            Logits `[writers, batch, reads, vocab]`.
        """
        graph, times = self.adapter.graph, len(writers)
        layer, kind, head = graph.reader(reader)
        base = (self.base.middle if kind == "mlp" else self.base.resid)[layer]
        streams = base.to(self.adapter.work) + torch.stack([self._change_of(writer) for writer in writers])
        streams = streams.flatten(0, 1)  # writers x batch, pos, d_model
        if kind in ("q", "k", "v"):
            folded = self._readers(layer)
            local = torch.tensor([reader - graph.readers(layer, "qkv").start], device=streams.device)
            values = folded.values(streams.flatten(0, 1)[None], local, centred=False)[0]
            new = values.unflatten(0, streams.shape[:2])
        elif kind == "mlp":
            norm = self.adapter.layers[layer].mlp_norm
            new = streams if norm is None else norm(streams)
        else:
            new = streams

        def visit(site: str, at: int, value: Tensor) -> Tensor | None:
            if at != layer or site not in (kind, "qkv", "mlp_in", "final"):
                return None
            if site in ("mlp_in", "final"):
                wanted = {"mlp_in": "mlp", "final": "logits"}[site]
                return new.view(value.shape).to(value.dtype) if kind == wanted else None
            if kind not in site:
                return None
            return self._with_head(site, kind, head, value, new)

        with torch.no_grad(), undisturbed(self.adapter.model):
            logits = through_hooks(
                self.adapter, self.inputs.repeat(times), visit, skips=self._skips(layer, kind, times)
            )
        return logits.unflatten(0, (times, -1))

    def _readers(self, layer: int) -> AttentionReaders:
        """A layer's folded weights; the latest layer's are kept, because edges come reader by reader."""
        if layer not in self._latest:
            self._latest.clear()
            self._latest[layer] = AttentionReaders(self.adapter.layers[layer])
        return self._latest[layer]

    def _change_of(self, writer: int) -> Tensor:
        """`[batch, pos, d_model]`."""
        graph = self.adapter.graph
        if writer == 0:
            return self.change.embed
        layer = graph.layer_of(writer)
        if writer == graph.mlp(layer):
            return self.change.mlps[layer]
        head = writer - graph.head(layer)
        return self.change.heads[layer][..., head, :] @ self.adapter.layers[layer].output_weight()[head]

    def _with_head(self, site: str, kind: str, head: int, value: Tensor, new: Tensor) -> Tensor:
        layout = self.adapter.layers[0].layout
        parts = layout.split(value)._asdict() if site == "qkv" else {kind: value.unflatten(-1, (-1, layout.d_head))}
        heads = parts[kind].clone()
        heads[..., head, :] = new.to(heads.dtype)
        parts[kind] = heads
        return layout.join(Heads(**parts)) if site == "qkv" else heads.flatten(-2)

    def _skips(self, layer: int, kind: str, times: int) -> dict[str, Tensor]:
        views = self.adapter.layers
        skips = {}
        if layer:
            start = self.base.resid[layer].repeat(times, 1, 1)
            skips = {view.path: start for view in views[:layer]}
        if kind == "mlp" and self.adapter.family.attn:
            path = f"{views[layer].path}.{self.adapter.family.attn}"
            skips[path] = self.base.attn_out[layer].repeat(times, 1, 1)
        return skips
