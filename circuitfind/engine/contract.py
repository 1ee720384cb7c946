"""The kernel of edge attribution: all edges' scores from one backward pass, without splitting the residual stream.

    effect(u -> v) = sum over tokens of (out_u(clean) - out_u(ablated)) . J_norm^T W_v gradient_v

Peers give every reader its own copy of the residual stream to get `gradient at v's input`; here only the gradients at
the projections' outputs are taken (`d_head` wide), and pulled back analytically:

1. For a layer, `G_v = J_norm^T W_v g_v` for all its q, k, v readers: with the norm's weight and centring folded into W
   and its scale r multiplied into g, `G_v = W' (r g_v) - y c_v`, where y is the normed stream and
   `c_v = y . W' (r g_v) / d_model`. MLP inputs are pulled back by the norm alone; `logits` is at the stream already.
2. The writers' differences `D_u` are laid out once for all layers: heads are projected by W_O as they come.
3. `scores[:U, layer's readers] += D[:U] G^T`, one matrix product a layer: a reader sees a prefix of the writers.

Everything is a sum over tokens, so it is done for a slice of tokens at a time: an outer slice bounds what is held,
`[writers, tokens, d_model]`, whatever the batch; an inner one keeps `G` in a processor's cache. Scores accumulate in
float32 (float64 for a float64 model).
"""

from __future__ import annotations

from operator import itemgetter

import torch
from einops import rearrange
from torch import Tensor

from circuitfind.engine.capture import ReaderGradients, Run
from circuitfind.engine.memory import HELD, in_cache, token_slices
from circuitfind.engine.writers import Writers
from circuitfind.models.adapter import Adapter
from circuitfind.models.layer import AttentionReaders, Heads

Parts = list[Tensor]


def edge_effects(adapter: Adapter, delta: Writers, run: Run, gradients: ReaderGradients) -> Tensor:
    """First-order effects of all edges, summed over examples and positions.

    Args:
        delta: writers' clean values minus ablated values.
        run: the pass at which the gradients were taken.

    Returns:
        `[writers, readers]`, zero where there is no edge.
    """
    work, graph = adapter.work, adapter.graph
    effects = delta.embed.new_zeros(graph.n_writers, graph.n_readers)
    delta = delta.map(lambda part: part.flatten(0, 1))
    resid = [x.flatten(0, 1).to(work) for x in run.resid]
    middle = [x.flatten(0, 1).to(work) for x in run.middle]
    qkv = [_by_reader(heads, work) for heads in gradients.qkv]
    mlp = [g.flatten(0, 1).to(work) for g in gradients.mlp]
    final = gradients.final.flatten(0, 1).to(work)
    for tokens in token_slices(len(delta.embed), graph.n_writers, adapter, HELD):
        at = _Slice(resid, middle, qkv, mlp, final, tokens)
        _accumulate(adapter, delta.map(itemgetter(tokens)), at, effects)
    return effects


def _by_reader(heads: Heads, work: torch.dtype) -> Tensor:
    """`[readers, batch x pos, d_head]` from gradients by kind."""
    return rearrange(torch.cat(heads, dim=-2).to(work), "b t r e -> r (b t) e")


class _Slice:
    """What the contraction needs of a slice of tokens."""

    def __init__(self, resid: Parts, middle: Parts, qkv: Parts, mlp: Parts, final: Tensor, tokens: slice) -> None:
        self.resid, self.middle, self.mlp = ([x[tokens] for x in part] for part in (resid, middle, mlp))
        self.qkv, self.final = [g[:, tokens] for g in qkv], final[tokens]


def _accumulate(adapter: Adapter, delta: Writers, at: _Slice, into: Tensor) -> None:
    graph = adapter.graph
    n_tokens, width = delta.embed.shape
    written = delta.embed.new_empty(graph.n_writers, n_tokens, width)
    written[0] = delta.embed

    def add(layer: int, kind: str, pulled: Tensor, tokens: slice) -> None:
        seen = written[: graph.reads(layer, kind), tokens].flatten(1)
        into[: len(seen), graph.readers(layer, kind)] += seen @ pulled.flatten(1).T

    for layer, view in enumerate(adapter.layers):
        readers, heads, mlp = AttentionReaders(view, with_bias=False), graph.heads(layer), graph.mlp(layer)
        for tokens in token_slices(n_tokens, len(readers.weight), adapter, in_cache(written.device)):
            add(layer, "qkv", readers.pull_back(at.resid[layer][tokens], at.qkv[layer][:, tokens]), tokens)
        torch.bmm(rearrange(delta.heads[layer], "n h e -> h n e"), view.output_weight(), out=written[heads])
        pulled = at.mlp[layer]
        if view.mlp_norm is not None:
            pulled = view.mlp_norm.pull_back(at.middle[layer], pulled)
        add(layer, "mlp", pulled[None], slice(None))
        written[mlp] = delta.mlps[layer]
    add(graph.n_layers, "logits", at.final[None], slice(None))
