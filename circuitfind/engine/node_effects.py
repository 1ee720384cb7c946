"""First-order effects of whole nodes (attribution patching), from the same gradients as the edges.

The gradient at a writer's output is the sum of the gradients at all its readers, so it is gathered from the top down:

1. `s = gradient at the final norm's input`.
2. For each layer, last first: the MLP's output gradient is s; its reader's pulled-back gradient is added; the heads'
   output gradient is s now (before that addition in a parallel block); the q, k, v readers' gradients are added.
3. A node's effect is its difference, clean minus ablated, times the gradient at its output, summed over d_model.

Summing a node's edge scores gives the same number.
"""

from __future__ import annotations

import torch
from einops import einsum, rearrange
from torch import Tensor

from circuitfind.engine.capture import ReaderGradients, Run, Writers
from circuitfind.engine.folded import AttentionReaders
from circuitfind.models.adapter import Adapter


def node_effects(adapter: Adapter, delta: Writers, run: Run, gradients: ReaderGradients) -> Tensor:
    """`[writers, batch, pos]` first-order effects of every writer at every position.

    Args:
        delta: writers' clean values minus ablated values.
        run: the pass at which the gradients were taken.
    """
    graph, work = adapter.graph, adapter.work
    effects = delta.embed.new_empty(graph.n_writers, *delta.embed.shape[:2])
    stream = gradients.final.to(work)
    for layer in reversed(range(graph.n_layers)):
        view = adapter.layers[layer]
        effects[graph.mlp(layer)] = torch.linalg.vecdot(delta.mlps[layer], stream)
        at_mlp = gradients.mlp[layer].to(work)
        if view.mlp_norm is not None:
            at_mlp = view.mlp_norm.pull_back(run.middle[layer].to(work), at_mlp)
        at_heads = stream if graph.parallel else stream + at_mlp
        projected = einsum(at_heads, view.output_weight(), "b t d, h e d -> b t h e")
        effects[graph.heads(layer)] = rearrange(torch.linalg.vecdot(delta.heads[layer], projected), "b t h -> h b t")
        stream = stream + at_mlp + _pulled_back_together(adapter, layer, run, gradients)
    effects[0] = torch.linalg.vecdot(delta.embed, stream)
    return effects


def _pulled_back_together(adapter: Adapter, layer: int, run: Run, gradients: ReaderGradients) -> Tensor:
    """`[batch, pos, d_model]`: the summed gradients of a layer's q, k and v readers at the stream."""
    readers = AttentionReaders(adapter.layers[layer], with_bias=False)
    at_values = torch.cat(gradients.qkv[layer], dim=-2).to(adapter.work)  # batch pos readers d_head
    together = einsum(at_values, readers.weight, "b t r e, r e d -> b t d")
    if readers.norm is None:
        return together
    x = run.resid[layer].to(adapter.work)
    scale = readers.norm.scale(x)
    y = readers.norm.centre(x) * scale
    return scale * together - y * (scale * together * y).mean(-1, keepdim=True)
