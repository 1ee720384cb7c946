"""Gradients at the residual stream, gathered from those at its readers.

What adds to the stream is read by every later reader, so the gradient there is a sum over readers, from the top down:

1. `s = gradient at the final norm's input`.
2. For each layer, last first: what the MLP adds meets s. The gradient at the MLP's input, pulled back through its norm,
   comes on top; what attention adds meets that sum (s alone in a parallel block). With the gradients at the layer's q,
   k and v, pulled back through their weights and norm, s is the gradient where the block begins.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from einops import einsum
from torch import Tensor

from circuitfind.engine.capture import ReaderGradients, Run
from circuitfind.engine.folded import AttentionReaders
from circuitfind.models.adapter import Adapter


class StreamGradients(NamedTuple):
    """Of one layer, `[batch, pos, d_model]` each.

    entering: at the stream where the block begins; attention, mlp: where what they write is added.
    """

    layer: int
    entering: Tensor
    attention: Tensor
    mlp: Tensor


def stream_gradients(adapter: Adapter, run: Run, gradients: ReaderGradients) -> Iterator[StreamGradients]:
    """Gradients of every layer, last layer first.

    Args:
        run: the pass at which the readers' gradients were taken.
    """
    stream = gradients.final.to(adapter.work)
    for layer in reversed(range(adapter.graph.n_layers)):
        norm = adapter.layers[layer].mlp_norm
        at_mlp = gradients.mlp[layer].to(adapter.work)
        if norm is not None:
            at_mlp = norm.pull_back(run.middle[layer].to(adapter.work), at_mlp)
        entering = stream + at_mlp + _pulled_back_together(adapter, layer, run, gradients)
        yield StreamGradients(layer, entering, stream if adapter.graph.parallel else stream + at_mlp, stream)
        stream = entering


def _pulled_back_together(adapter: Adapter, layer: int, run: Run, gradients: ReaderGradients) -> Tensor:
    """`[batch, pos, d_model]`: the summed gradients of a layer's q, k and v readers at the stream."""
    readers = AttentionReaders(adapter.layers[layer], with_bias=False)
    at_values = torch.cat(gradients.qkv[layer], dim=-2).to(adapter.work)  # batch pos readers d_head
    together = einsum(at_values, readers.weight, "b t r e, r e d -> b t d")
    if readers.norm is None:
        return together
    x = run.resid[layer].to(adapter.work)
    scale = readers.norm.scale(x)
    if readers.norm.fixed_scale:
        return scale * together
    y = readers.norm.centre(x) * scale
    return scale * together - y * (scale * together * y).mean(-1, keepdim=True)
