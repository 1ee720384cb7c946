"""First-order effects of nodes and places, from one backward pass's gradients at the readers of the residual stream.
(For edges see `edge_effects.py`.)

`stream_gradients` computes the gradient at the stream as a sum over the readers of later layers, from the top down:

1. `s = gradient at the final norm's input`.
2. For each layer, last first: s is the gradient at the MLP's contribution. Add the gradient at the MLP's input, pulled
   back through its norm: the sum is the gradient at attention's contribution (in a parallel block that is s alone). Add
   the gradients at q, k and v, pulled back through their weights and norm: the sum is the gradient where the block
   begins, the s of the layer before.

`node_effects` (attribution patching): a node's difference, clean minus ablated, times the gradient where its output
is added to the stream, summed over d_model. It equals the sum of the node's edge scores.

`site_effects`, in the units that a sweep patches:

1. `attn` and `mlp`, the contributions of attention and MLP: the gradient where they are added to the stream. `attn_out`
   and `mlp_out`, the modules' outputs: that gradient times the residual multiplier, pulled back through the post-norm
   if there is one. `resid`: the gradient where the block begins; `middle`: where attention's contribution is added.
2. `z` (heads) and `hidden` (neurons): the gradient at the module's output, through the output projection's rows. `q`,
   `k`, `v`: autograd's gradient.
3. A unit's effect is its difference times the gradient, summed over its features. Its magnitude is at most the product
   of their two norms, and far smaller where they are nearly orthogonal. A pattern's difference is first multiplied by
   the values of the pass in which the gradients were taken, which gives a difference of the head.
"""

from __future__ import annotations

from collections.abc import Container, Iterator
from typing import NamedTuple

import torch
from einops import einsum, rearrange
from torch import Tensor

from circuitfind.engine.capture import Run
from circuitfind.engine.reader_gradients import ReaderGradients
from circuitfind.engine.sites import Values, attended, input_rows
from circuitfind.engine.writers import Writers
from circuitfind.models.adapter import Adapter
from circuitfind.models.layer import AttentionReaders, Heads
from circuitfind.models.norms import Norm


# -------------------------------------------------------------------- gradients at the stream
class StreamGradients(NamedTuple):
    """One layer's gradients at the stream, `[batch, pos, d_model]` each: where the block begins (`entering`), and where
    the contributions of attention and of the MLP are added."""

    layer: int
    entering: Tensor
    attention: Tensor
    mlp: Tensor


def stream_gradients(adapter: Adapter, run: Run, gradients: ReaderGradients) -> Iterator[StreamGradients]:
    """Yield the gradients of every layer, last layer first; `run`: the pass in which `gradients` were taken."""
    stream = gradients.final.to(adapter.work)
    for layer in reversed(range(adapter.graph.n_layers)):
        view = adapter.layers[layer]
        middle, at_mlp = (x[layer].to(adapter.work) for x in (run.middle, gradients.mlp))
        at_mlp = view.mlp_pull_back(middle, at_mlp)
        resid = run.resid[layer].to(adapter.work)
        at_read = view.at_read(resid, Heads(*(part.to(adapter.work) for part in gradients.qkv[layer]))).together()
        entering = stream + at_mlp + AttentionReaders(view, with_bias=False).pull_back_together(resid, at_read)
        yield StreamGradients(layer, entering, stream if adapter.graph.parallel else stream + at_mlp, stream)
        stream = entering


def node_effects(adapter: Adapter, delta: Writers, run: Run, gradients: ReaderGradients) -> Tensor:
    """Return first-order effects `[writers, batch, pos]` of every writer at every position.

    `delta`: clean minus ablated values; `run`: the pass in which `gradients` were taken.
    """
    graph = adapter.graph
    effects = delta.embed.new_empty(graph.n_writers, *delta.embed.shape[:2])
    for layer, entering, at_heads, at_mlp in stream_gradients(adapter, run, gradients):
        effects[graph.mlp(layer)] = _dot(delta.mlps[layer], at_mlp)
        projected = einsum(at_heads, adapter.layers[layer].output_weight(), "b t d, h e d -> b t h e")
        effects[graph.heads(layer)] = rearrange(_dot(delta.heads[layer], projected), "b t h -> h b t")
        if layer == 0:
            effects[0] = _dot(delta.embed, entering)
    return effects


class Effects(NamedTuple):
    """First-order effects `[batch, pos, units]`, and the product of the norms of difference and gradient, which bounds
    their magnitude."""

    value: Tensor
    most: Tensor


def site_effects(
    adapter: Adapter, site: str, delta: Values, run: Run, gradients: ReaderGradients
) -> dict[int, Effects]:
    """Return first-order effects of every unit at every position (of a pattern: every query), by layer.

    `site`: as for `capture_site`; `delta`: its clean minus ablated values by layer; `run`: the pass in which
    `gradients` were taken.
    """
    if site in ("q", "k", "v"):
        return {layer: _product(change, getattr(gradients.qkv[layer], site)) for layer, change in delta.items()}
    effects: dict[int, Effects] = {}
    for at in stream_gradients(adapter, run, gradients):
        if at.layer in delta:
            effects[at.layer] = _effects(adapter, site, delta[at.layer], run, at)
        if len(effects) == len(delta):
            break
    return effects


def _effects(adapter: Adapter, site: str, change: Tensor, run: Run, at: StreamGradients) -> Effects:
    view, layer = adapter.layers[at.layer], at.layer
    in_stream = {"resid": at.entering, "middle": at.attention, "attn": at.attention, "mlp": at.mlp}
    if site in in_stream:
        return _product(change.unsqueeze(-2), in_stream[site].unsqueeze(-2))
    if site in ("mlp_out", "hidden"):
        gradient = _before_norm(view.post_mlp_norm, run.mlp_out[layer].view(at.mlp.shape), at.mlp * view.multiplier)
    else:
        gradient = _at_attention(adapter, run, at)
    if site in ("mlp_out", "attn_out"):
        return _product(change.unsqueeze(-2), gradient.unsqueeze(-2))
    if site == "hidden":
        at_neurons = einsum(gradient, input_rows(adapter, site, layer).to(gradient), "b t d, n d -> b t n")
        return _product(change.unsqueeze(-1), at_neurons.unsqueeze(-1))
    if site == "pattern":
        change = attended(adapter, change, view.values_by_head(run.qkv[layer].v))
    return _product(change, _at_heads(adapter, layer, gradient))


def head_gradients(adapter: Adapter, layers: Container[int], run: Run, gradients: ReaderGradients) -> Values:
    """Return the gradients `[batch, pos, heads, d_head]` at the heads before their output projection, by layer."""
    found: Values = {}
    for at in stream_gradients(adapter, run, gradients):
        if at.layer in layers:
            found[at.layer] = _at_heads(adapter, at.layer, _at_attention(adapter, run, at))
    return found


def _at_attention(adapter: Adapter, run: Run, at: StreamGradients) -> Tensor:
    """Return the gradient at the output of the attention's output projection."""
    view = adapter.layers[at.layer]
    return _before_norm(view.post_attn_norm, run.attn_out[at.layer], at.attention * view.multiplier)


def _at_heads(adapter: Adapter, layer: int, gradient: Tensor) -> Tensor:
    by_head = input_rows(adapter, "z", layer).to(gradient).unflatten(0, (adapter.graph.heads_in(layer), -1))
    gradients: Tensor = einsum(gradient, by_head, "b t d, h e d -> b t h e")
    return gradients


def _dot(a: Tensor, b: Tensor) -> Tensor:
    """Return the inner product over the last axis."""
    product: Tensor = torch.linalg.vecdot(a, b)
    return product


def _product(change: Tensor, gradient: Tensor) -> Effects:
    return Effects(_dot(change, gradient), change.norm(dim=-1) * gradient.norm(dim=-1))


def _before_norm(norm: Norm | None, output: Tensor, gradient: Tensor) -> Tensor:
    """Return the gradient at a module's output, from the gradient after its post-norm."""
    return gradient if norm is None else norm.pull_back(output.to(gradient), gradient)
