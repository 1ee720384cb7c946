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
`work` precision.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from einops import rearrange
from torch import Tensor

from circuitfind.engine.capture import ReaderGradients, Run
from circuitfind.engine.memory import HELD, in_cache, token_slices
from circuitfind.engine.writers import Writers
from circuitfind.models.adapter import Adapter
from circuitfind.models.layer import AttentionReaders

Part = Callable[[Tensor], Tensor]


def edge_effects(adapter: Adapter, delta: Writers, run: Run, gradients: ReaderGradients) -> Tensor:
    """First-order effects of all edges, summed over examples and positions.

    Args:
        delta: writers' clean values minus ablated values.
        run: the pass at which the gradients were taken.

    Returns:
        `[writers, readers]`, zero where there is no edge.
    """
    effects = delta.embed.new_zeros(adapter.graph.n_writers, adapter.graph.n_readers)
    n_tokens = delta.embed.shape[:2].numel()
    for tokens in token_slices(n_tokens, adapter.graph.n_writers, adapter, HELD):

        def part(value: Tensor, tokens: slice = tokens) -> Tensor:
            return value.flatten(0, 1)[tokens].to(adapter.work)

        _accumulate(adapter, delta, run, gradients, part, effects)
    return effects


def _accumulate(
    adapter: Adapter, delta: Writers, run: Run, gradients: ReaderGradients, part: Part, into: Tensor
) -> None:
    """Adds the effects of the tokens that `part` picks."""
    graph, embed = adapter.graph, part(delta.embed)
    written = embed.new_empty(graph.n_writers, *embed.shape)
    written[0] = embed

    def add(layer: int, kind: str, pulled: Tensor, tokens: slice) -> None:
        seen = written[: graph.reads(layer, kind), tokens].flatten(1)
        into[: len(seen), graph.readers(layer, kind)] += seen @ pulled.flatten(1).T

    for layer, view in enumerate(adapter.layers):
        readers = AttentionReaders(view, with_bias=False)
        stream, at_values = part(run.resid[layer]), part(torch.cat(gradients.qkv[layer], dim=-2)).transpose(0, 1)
        for tokens in token_slices(len(embed), len(readers.weight), adapter, in_cache(written.device)):
            add(layer, "qkv", readers.pull_back(stream[tokens], at_values[:, tokens]), tokens)
        heads = rearrange(part(delta.heads[layer]), "n h e -> h n e")
        torch.bmm(heads, view.output_weight(), out=written[graph.heads(layer)])
        pulled = view.mlp_pull_back(part(run.middle[layer]), part(gradients.mlp[layer]))
        add(layer, "mlp", pulled[None], slice(None))
        written[graph.mlp(layer)] = part(delta.mlps[layer])
    add(graph.n_layers, "logits", part(gradients.final)[None], slice(None))
