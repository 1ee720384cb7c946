"""First-order effects of all edges from the gradients of backward passes, without splitting the residual stream.

    effect(u -> v) = sum over points and tokens of (out_u(clean) - out_u(ablated)) . J_norm^T W_v gradient_v

The points are those at which gradients are taken: one, or several of integrated gradients. Other tools give every
reader its own copy of the residual stream to get the gradient at its input. Here the gradients at the projections'
outputs (`d_head` wide) are pulled back to the stream analytically. The difference of a writer is the same at all
points, so gradients are summed over points first, and contracted with the differences once:

1. Only tokens at which a writer differs between the two runs and some gradient is not zero are used: none before the
   first difference, none after the last position that is read.
2. At each point, with the norm's weight and centring folded into W (giving W') and its scale r multiplied into the
   gradient g, a reader's gradient at the stream is `G_v = W' (r g_v) - y c_v`, where y is the normed stream and
   `c_v = y . W' (r g_v) / d_model = W'^T y . r g_v / d_model`. Kept are the sum of `r g_v` over points, and y and c of
   each point. Gradients at MLP inputs are pulled back through the norm alone, that at `logits` is at the stream
   already: their sums over points are kept.
3. The writers' differences `D_u` are stacked once for all layers, heads projected by W_O.
4. `scores[:U, layer's readers] += D[:U] G^T`, one matrix product for each layer and kind of reader: the readers of a
   layer see the first U writers.

Tokens are processed in blocks whose G fits in the CPU's cache, and in slices of several blocks whose D `[writers,
tokens, d_model]` fits a memory budget. D is one buffer that is reused, because newly mapped memory is slow.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from einops import rearrange
from torch import Tensor

from circuitfind.engine.capture import Run
from circuitfind.engine.memory_plan import HELD, in_cache, points_at_once, token_slices
from circuitfind.engine.reader_gradients import ReaderGradients
from circuitfind.engine.writers import Writers, emptying
from circuitfind.models.adapter import Adapter
from circuitfind.models.layer import Heads


def edge_effects(adapter: Adapter, delta: Writers, run: Run, gradients: ReaderGradients) -> Tensor:
    """Return first-order effects of all edges, `[writers, readers]`, from the gradients of one pass, summed over
    examples and positions; zero where there is no edge.

    `delta`: writers' clean values minus ablated values; `run`: the pass in which the gradients were taken.
    """
    effects = EdgeSum(adapter, delta)
    own = gradients._replace(qkv=[*gradients.qkv], mlp=[*gradients.mlp])
    effects.add(1.0, Run(resid=[*run.resid], middle=[*run.middle]), own)
    return effects.value()[0]


class _Layer(NamedTuple):
    """One layer's sums over points, at the tokens that are used.

    Attributes:
        values: `[tokens, readers, d_read]`, the gradients at the projected streams of attention's readers, times the
            norm's scale: `r g_v`.
        along: y `[tokens, d_model]` and c `[tokens, readers]` of each point.
        mlp: `[tokens, d_model]`, the gradients at the stream that the MLP reads.
    """

    values: Tensor
    along: list[tuple[Tensor, Tensor]]
    mlp: Tensor


class EdgeSum:
    """Effects of all edges summed over points: `add` each point, then read `value()`.

    Args:
        adapter: its weights and norms pull the gradients back.
        delta: writers' clean values minus ablated values, the same for all points.
        groups: `[batch, pos]`, the number of the group whose sum a token belongs to, -1 for none; by default all tokens
            are in one group.
        n_groups: the number of groups.
    """

    def __init__(self, adapter: Adapter, delta: Writers, groups: Tensor | None = None, n_groups: int = 1) -> None:
        self._adapter, self._delta, graph = adapter, delta, adapter.graph
        changed = torch.stack([part.flatten(2).any(-1) for part in delta.parts]).any(0)
        groups = torch.zeros_like(changed, dtype=torch.long) if groups is None else groups
        tokens = (changed & (groups >= 0)).flatten().nonzero().squeeze(-1)
        self._groups, order = groups.flatten()[tokens].sort(stable=True)
        self._tokens = tokens[order]  # grouped
        self._effects = delta.embed.new_zeros(n_groups, graph.n_writers, graph.n_readers, dtype=adapter.work)
        self._clear()

    def _clear(self) -> None:
        """Start the sums over points anew."""
        self._points, self._final = 0, self._effects.new_zeros(len(self._tokens), self._adapter.graph.d_model)
        self._layers: list[_Layer] = []

    def _at(self, value: Tensor) -> Tensor:
        """Return a value `[batch, pos, ...]` at the tokens that are used, `[tokens, ...]`."""
        return value.flatten(0, 1)[self._tokens].to(self._adapter.work)

    def add(self, weight: float, run: Run, gradients: ReaderGradients) -> None:
        """Add a point: gradients taken in a run, times `weight`. Both are emptied layer by layer, to free memory."""
        if self._points == points_at_once(self._adapter, len(self._tokens)):
            self._contract()
        self._points += 1
        layers, streams = zip(self._adapter.layers, emptying(gradients.qkv), strict=True), emptying(run.resid)
        middles, at_mlps = emptying(run.middle), emptying(gradients.mlp)
        for layer, (view, at_qkv) in enumerate(layers):
            stream, at_values = self._at(next(streams)), Heads(*map(self._at, at_qkv))
            along = []
            values = weight * view.at_read(stream, at_values).together()
            if (norm := view.attn_norm) is not None:
                y, r = norm.normed(stream)
                values *= r.unsqueeze(-1)
                if not norm.fixed_scale:
                    read = view.projected(y * norm.weight).together()
                    along = [(y, torch.linalg.vecdot(values, read) / y.shape[-1])]
            pulled = view.mlp_pull_back(self._at(next(middles)), weight * self._at(next(at_mlps)))
            if self._points == 1:
                self._layers.append(_Layer(values, along, pulled))
                continue
            sums = self._layers[layer]
            sums.values.add_(values)
            sums.along.extend(along)
            sums.mlp.add_(pulled)
        self._final.add_(weight * self._at(gradients.final))

    def value(self) -> Tensor:
        """Return effects `[groups, writers, readers]`, summed over each group's tokens; zero where there is no edge."""
        self._contract()
        return self._effects

    # ---------------------------------------------------------------- one contraction for many points
    def _contract(self) -> None:
        n_writers, d_model = self._adapter.graph.n_writers, self._adapter.graph.d_model
        reached = [self._final.any(-1)]
        for sums in self._layers:
            reached += [sums.values.flatten(1).any(-1), sums.mlp.any(-1), *(c.any(-1) for _, c in sums.along)]
        kept = torch.stack(reached).any(0).nonzero().squeeze(-1)
        buffer = self._final.new_empty(0)
        for tokens in token_slices(len(kept), n_writers, self._adapter, HELD):
            size = n_writers * (tokens.stop - tokens.start) * d_model
            buffer = buffer if len(buffer) else buffer.new_empty(size)  # the first slice is the largest
            self._add_effects(kept[tokens], buffer)
        self._clear()

    def _blocks(self, kept: Tensor, buffer: Tensor) -> Iterator[tuple[slice, Tensor, Tensor]]:
        """Yield blocks of some tokens: (tokens, the part of the buffer for D `[writers, tokens, d_model]`, the effects
        `[writers, readers]` of their group)."""
        graph, start = self._adapter.graph, 0
        runs = torch.stack(torch.unique_consecutive(self._groups[kept], return_counts=True), dim=1)
        for group, count in runs.tolist():
            for part in token_slices(count, graph.readers_per_layer, self._adapter, in_cache(kept.device)):
                tokens, size = slice(start + part.start, start + part.stop), part.stop - part.start
                written, buffer = buffer.tensor_split([graph.n_writers * size * graph.d_model])
                yield tokens, written.view(graph.n_writers, size, graph.d_model), self._effects[group]
            start += count

    def _add_effects(self, kept: Tensor, buffer: Tensor) -> None:
        """Add the effects of some tokens, given by their indices among the tokens that are used."""
        adapter, graph, delta, tokens_of_all = self._adapter, self._adapter.graph, self._delta, self._tokens[kept]
        blocks = list(self._blocks(kept, buffer))

        def part(value: Tensor) -> Tensor:
            return value.flatten(0, 1)[tokens_of_all].to(adapter.work)

        def add(layer: int, kind: str, written: Tensor, pulled: Tensor, into: Tensor) -> None:
            seen = written[: graph.reads(layer, kind)].flatten(1)
            into[: len(seen), graph.readers(layer, kind)] += seen @ pulled.flatten(1).T

        embed, final = part(delta.embed), self._final[kept]
        for tokens, written, _ in blocks:
            written[0] = embed[tokens]
        for layer, (view, sums) in enumerate(zip(adapter.layers, self._layers, strict=True)):
            projections, output = view.qkv_weight(), view.output_weight()
            values, at_mlp = rearrange(sums.values[kept], "n r e -> r n e"), sums.mlp[kept]
            along = [(y[kept], c[kept].T.unsqueeze(-1)) for y, c in sums.along]
            heads, mlp = rearrange(part(delta.heads[layer]), "n h e -> h n e"), part(delta.mlps[layer])
            for tokens, written, into in blocks:
                pulled = view.pull_back(values[:, tokens], projections)
                for y, c in along:
                    pulled.addcmul_(y[tokens], c[:, tokens], value=-1)
                add(layer, "qkv", written, pulled, into)
                torch.bmm(heads[:, tokens], output, out=written[graph.heads(layer)])
                add(layer, "mlp", written, at_mlp[None, tokens], into)
                written[graph.mlp(layer)] = mlp[tokens]
        for tokens, written, into in blocks:
            add(graph.n_layers, "logits", written, final[None, tokens], into)
