"""The streams that readers of a soft-masked circuit see, and the backward pass to the mask and the writers.

With D `[writers, tokens, d_model]` (current minus ablated values) and a mask m, a reader's stream is

    x_v = base_v + sum over u of m_uv D_u        so        dm_uv = <D_u, S_v>    and    dD_u = sum over v of m_uv S_v

where S_v is the gradient at that stream. All this is done by a few matrix products with one buffer for D and one for
its gradient:

1. Only writers and readers that take part have rows. Writers are in the order of computation, so the readers of a layer
   see the first rows of D, and no row is copied.
2. A *panel* `[readers, tokens, d_model]` holds the streams of all readers of a few layers. Three kinds of products fill
   it: one adds the writers before the panel's first layer for all its readers; one for each layer adds the writers
   between that and the layer; one for each layer adds the layer's own heads for its MLP. So D is read a few times in
   all, not once for each layer.
3. In the backward pass the panel's streams are computed again, and each is overwritten with its gradient. The same
   three products take these gradients to those of D and of the mask.
4. q, k and v are not projected a second time for this: see `AttentionReaders.pull_back_own`.

Autograd differentiates the rest of the model. `start`, `read` and `write` connect it to the buffers. Each `read` and
`write` takes a *token*, a number without meaning, that the last `write` (or `start`) returned. These tokens make
autograd call the backward of a `write` only after those of all later reads.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from circuitfind.engine.circuit_run import Plan
from circuitfind.engine.prepare import Prepared
from circuitfind.models.placement import mapped, sent

PANEL = 64  # readers of a panel, at most, unless a single layer has more


class Panel(NamedTuple):
    """The first of a panel's layers, and the readers of all of them, as a slice of those that take part."""

    first: int
    readers: slice


class Streams:
    """The buffers of D, of readers' streams and of gradients.

    Args:
        plan: one circuit in the sparse form, whose terms are the edges that take part.
        mask: `[writers, readers]`.
        groups: 1, or the number of pairs, for a gradient of each pair.

    Attributes:
        written: D, `[writers, tokens, d_model]`, of the writers that take part.
        gradient: `[groups, writers, readers]` of those that take part, complete after `finish`.
    """

    def __init__(self, prepared: Prepared, plan: Plan, mask: Tensor, groups: int = 1) -> None:
        self.prepared, self.plan, self.graph, self.groups = prepared, plan, plan.graph, groups
        self.adapter, embed = prepared.adapter, prepared.ablated.embed
        self.readers, self.width, self.length = np.flatnonzero(plan.active), embed.shape[2], embed.shape[1]
        self.amounts = mask.detach()[np.ix_(plan.writers, self.readers)].to(embed)
        self.written = embed.new_empty(len(plan.writers), embed.shape[:2].numel(), self.width)
        self.gradient = embed.new_zeros(groups, *self.amounts.shape)
        self._at_written: Tensor  # the gradient of D
        self._panels = self._divide()
        most = max((panel.readers.stop - panel.readers.start for panel in self._panels), default=0)
        read = torch.zeros_like(prepared.inputs.mask).scatter_(1, prepared.inputs.read, True)
        self._read = read.flatten().nonzero().squeeze(1)
        self._streams = embed.new_empty(most, *self.written.shape[1:])
        self._begin()

    def _divide(self) -> list[Panel]:
        """Return the panel of each layer."""
        panels: list[Panel] = []
        first = 0
        for layer in range(self.graph.n_layers):
            if self._readers(first, layer + 1).stop - self._readers(first).start > PANEL:
                first = layer
            panel = Panel(first, self._readers(first, layer + 1))
            panels[first:] = [panel] * (layer + 1 - first)
        return panels

    def _begin(self) -> None:
        """Empty the panel, before the forward and before the backward pass."""
        self._open: Panel | None = None
        self._layer: int | None = None  # the open panel's layer whose streams are complete but for its own heads
        self._has_gradient = np.zeros(len(self.readers), dtype=bool)  # readers whose gradient is in the panel

    # ---------------------------------------------------------------- rows
    def _readers(self, layer: int, end: int | None = None, kind: str = "all") -> slice:
        """Return the readers of a layer, or of all layers from it to `end` (exclusive), as a slice of those that take
        part."""
        start, stop = self.graph.readers(layer, kind).start, self.graph.readers((end or layer + 1) - 1, kind).stop
        return slice(*np.searchsorted(self.readers, [start, stop]).tolist())

    def _seen(self, layer: int, kind: str = "qkv", since: int | None = None) -> slice:
        """Return the rows of D that a layer's readers of this kind see; with `since`, only those of that layer and
        later ones."""
        bounds = [0 if since is None else self.graph.head(since), self.graph.reads(layer, kind)]
        return slice(*np.searchsorted(self.plan.writers, bounds).tolist())

    def _of(self, readers: slice) -> Tensor:
        """Return these readers' rows of the open panel."""
        assert self._open is not None, "readers are in an open panel"
        offset = self._open.readers.start
        return self._streams[readers.start - offset : readers.stop - offset]

    # ---------------------------------------------------------------- writers
    def write(self, layer: int, kind: str, difference: Tensor) -> None:
        """Store D of the "input", of a layer's "mlp" (`[batch, pos, d_model]`) or of its "heads" (`[batch, pos, heads,
        d_head]`, before their output projection), of the writers that take part."""
        rows = self._rows(layer, kind)
        if kind != "heads":
            self.written[rows] = self.adapter.centre(difference.reshape(1, -1, self.width))
        elif rows.start < rows.stop:
            heads, weight = self._heads(layer, rows)
            torch.bmm(difference.flatten(0, 1).transpose(0, 1)[heads], weight, out=self.written[rows])

    def pull_writers(self, layer: int, kind: str) -> Tensor:
        """Return the gradient at the difference that `write` got."""
        self._settle(layer)
        rows = self._rows(layer, kind)
        back = self._at_written[rows]
        if kind != "heads":
            return self.adapter.centre(back).view(-1, self.length, self.width)
        heads, weight = self._heads(layer, rows)
        gradient = weight.new_zeros(back.shape[1], self.graph.heads_in(layer), weight.shape[1])
        gradient.transpose(0, 1)[heads] = torch.bmm(back, weight.mT)
        return gradient.view(-1, self.length, *gradient.shape[1:])

    def _rows(self, layer: int, kind: str) -> slice:
        """Return the rows of D of a layer's writers of this kind."""
        first = {"input": 0, "heads": self.graph.head(layer), "mlp": self.graph.mlp(layer)}[kind]
        bounds = [first, first + (self.graph.heads_in(layer) if kind == "heads" else 1)]
        return slice(*np.searchsorted(self.plan.writers, bounds).tolist())

    def _heads(self, layer: int, rows: slice) -> tuple[Tensor, Tensor]:
        """Return the index of each row's head, and the heads' output projection `[heads, d_head, d_model]`."""
        heads = sent(self.plan.writers[rows] - self.graph.head(layer), self.written.device)
        return heads, self.adapter.centre(self.adapter.layers[layer].output_weight()[heads])

    # ---------------------------------------------------------------- readers, forward
    def see(self, layer: int, kind: str) -> tuple[Tensor, Tensor | None]:
        """Return the input of a layer's readers, and for `pull_readers` the norm's scale (qkv) or None.

        qkv: projected values `[readers, tokens, d_read]`; mlp: the MLP's input `[tokens, d_model]`; logits: the final
        norm's input at the read positions, `[read tokens, d_model]`.
        """
        if kind == "logits":
            at, written = self.read_tokens()
            base = self._base(self.prepared.empty.resid[-1])[at]
            return torch.addmm(base.flatten(), self.amounts[:, -1:].T, written.flatten(1)).view_as(base), None
        streams = self._stream(layer, kind)
        if kind == "mlp":
            return self.adapter.layers[layer].mlp_reads(streams[0]).clone(), None
        return self.prepared.readers(layer).scaled_values(streams, self._qkv(layer), self.adapter.centred)

    def read_tokens(self) -> tuple[Tensor, Tensor]:
        """Return the indices, within `batch x pos`, of the tokens whose logits are read, and D there."""
        return self._read, self.written[:, self._read]

    def _base(self, value: Tensor) -> Tensor:
        """Return a stream of the empty run as `[tokens, d_model]`: the base of a reader's stream."""
        return self.adapter.centre(value.reshape(-1, self.width).to(self.adapter.work))

    def _qkv(self, layer: int) -> Tensor:
        """Return the q, k and v readers of a layer that take part, by their index within the layer."""
        return sent(self.plan.readers(layer, "qkv") - self.graph.readers(layer, "qkv").start, self.written.device)

    def _stream(self, layer: int, kind: str) -> Tensor:
        """Return the streams of a layer's readers of this kind, as rows of the panel."""
        panel, of_layer = self._panels[layer], self._readers(layer)
        if self._open != panel:
            self._open, self._layer = panel, None
            self._streams[: panel.readers.stop - panel.readers.start].zero_()
            self._add(self._seen(panel.first), panel.readers)
        if self._layer != layer:
            self._layer = layer
            self._add(self._seen(layer, since=panel.first), of_layer)
            for each, base in (("qkv", self.prepared.empty.resid), ("mlp", self.prepared.empty.middle)):
                if self.plan.runs(layer, each):
                    self._of(self._readers(layer, kind=each)).add_(self._base(base[layer]))
        readers = self._readers(layer, kind=kind)
        if kind == "mlp":
            self._add(self._own(layer), readers)
        return self._of(readers)

    def _own(self, layer: int) -> slice:
        """D's rows that a layer's MLP sees and its q, k and v do not."""
        return slice(self._seen(layer).stop, self._seen(layer, "mlp").stop)

    def _add(self, seen: slice, readers: slice) -> None:
        """Adds to the streams of some readers what they see of some of D's rows."""
        if seen.start < seen.stop and readers.start < readers.stop:
            self._of(readers).flatten(1).addmm_(self.amounts[seen, readers].T, self.written[seen].flatten(1))

    # ---------------------------------------------------------------- readers, backward
    def pull_readers(self, layer: int, kind: str, gradient: Tensor, value: Tensor, scale: Tensor | None) -> None:
        """Take the gradient at the value that `see` returned; `value` (for qkv) and `scale`: what it returned."""
        if kind == "logits":
            self._pull_logits(gradient)
            return
        self._settle(layer)
        readers = self._readers(layer, kind=kind)
        streams = self._stream(layer, kind)
        self._has_gradient[readers] = True
        if kind == "mlp":
            streams[0] = self.adapter.layers[layer].mlp_pull_back(streams[0], gradient)
            self._send(self._own(layer), readers)
        else:
            folded = self.prepared.readers(layer)
            folded.pull_back_own(streams, gradient, value, scale, self._qkv(layer), self.adapter.centred)

    def _pull_logits(self, gradient: Tensor) -> None:
        """Take the gradient at the final norm's input: the first step of the backward pass."""
        self._begin()
        at, written = self.read_tokens()
        self._at_written = torch.zeros_like(self.written)
        self._at_written[:, at] = self.amounts[:, -1, None, None] * gradient
        found = torch.linalg.vecdot(written, gradient)
        group = at * self.groups // self.written.shape[1]
        self.gradient.zero_()[:, :, -1].T.index_add_(1, group, found)

    def _settle(self, layer: int) -> None:
        """Send the gradients of later layers' readers to the writers within their panel's layers, and once a panel is
        complete, to the writers before it."""
        panel = self._open
        if panel and self._layer is not None and self._layer > layer:
            self._send(self._seen(self._layer, since=panel.first), self._readers(self._layer))
            self._layer = None
        if panel and panel.first > layer:
            self._send(self._seen(panel.first), panel.readers)
            self._open = None

    def _send(self, seen: slice, readers: slice) -> None:
        """Take the gradients at these readers' streams to the gradients of these rows of D, and of the mask."""
        count, at = seen.stop - seen.start, self._of(readers)
        if not count or not len(at):
            return
        for idle in np.flatnonzero(~self._has_gradient[readers]):  # the metric does not depend on these readers
            at[int(idle)] = 0
        self._at_written[seen].flatten(1).addmm_(self.amounts[seen, readers], at.flatten(1))
        written = self.written[seen].view(count, self.groups, -1).transpose(0, 1)
        self.gradient[:, seen, readers] = torch.bmm(written, at.view(len(at), self.groups, -1).permute(1, 2, 0))

    def finish(self) -> None:
        """Send the remaining gradients; `gradient` is then complete."""
        self._settle(-1)

    def at_mask(self) -> Tensor:
        """Return the gradient `[writers, readers]` summed over groups; 0 for edges that take no part."""
        whole = self.gradient.new_zeros(self.graph.real.shape)
        whole[np.ix_(self.plan.writers, self.readers)] = self.gradient.sum(0)
        return whole

    def at_edges(self, writers: np.ndarray, readers: np.ndarray) -> Tensor:
        """Return the gradient `[edges, groups]` of some edges; 0 for those that take no part."""
        found = self.gradient.new_zeros(len(writers), self.groups)
        known = np.isin(writers, self.plan.writers) & self.plan.active[readers]
        rows = np.searchsorted(self.plan.writers, writers[known])
        columns = np.searchsorted(self.readers, readers[known])
        found[np.flatnonzero(known)] = self.gradient[:, rows, columns].T
        return found


# -------------------------------------------------------------------- what autograd sees
def start(mask: Tensor, streams: Streams) -> Tensor:
    """Return the first token; its backward completes the gradient and hands it to the mask."""

    def back(_: Tensor) -> Tensor:
        streams.finish()
        return streams.at_mask()

    return mapped(mask, lambda given: given.new_zeros(()), back)


class _Write(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, token: Tensor, difference: Tensor, streams: Streams, layer: int, kind: str) -> Tensor:
        ctx.streams, ctx.place = streams, (layer, kind)
        streams.write(layer, kind, difference)
        return token.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, token: Tensor) -> tuple[Tensor, Tensor, None, None, None]:
        return token, ctx.streams.pull_writers(*ctx.place), None, None, None


class _Read(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, token: Tensor, streams: Streams, layer: int, kind: str) -> Tensor:
        ctx.streams, ctx.place = streams, (layer, kind)
        value, scale = streams.see(layer, kind)
        ctx.token, ctx.scale = token.detach(), scale
        ctx.save_for_backward(value if kind == "qkv" else None)
        return value

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:
        (value,) = ctx.saved_tensors
        ctx.streams.pull_readers(*ctx.place, gradient, value, ctx.scale)
        return ctx.token, None, None, None


write: Callable[[Tensor, Tensor, Streams, int, str], Tensor] = _Write.apply
"""(token, difference, streams, layer, kind) -> the next token; `Streams.write`."""
read: Callable[[Tensor, Streams, int, str], Tensor] = _Read.apply
"""(token, streams, layer, kind) -> the value of `Streams.see`."""
