"""First-order effects of replacing a site's values, in the units that a sweep patches.

1. The gradient at what attention or an MLP puts out is the one where that joins the residual stream, times the residual
   multiplier, pulled back through the post-norm where there is one.
2. The gradient at the heads (`z`) or at an MLP's neurons (`hidden`) is that one through the output projection's rows;
   at queries, keys and values it is taken as autograd gives it; at the stream it is the stream's own, which in the
   middle of a block is the one where attention's output joins it.
3. A unit's effect is its difference times the gradient, summed over its features. A pattern's difference makes, with
   the values of the pass at which the gradient was taken, a difference of its head.
"""

from __future__ import annotations

from collections.abc import Container

import torch
from einops import einsum
from torch import Tensor

from circuitfind.engine.capture import ReaderGradients, Run
from circuitfind.engine.site_values import Values, attended, input_rows
from circuitfind.engine.stream_gradients import StreamGradients, stream_gradients
from circuitfind.models.adapter import Adapter
from circuitfind.models.norms import Norm


def site_effects(adapter: Adapter, site: str, delta: Values, run: Run, gradients: ReaderGradients) -> Values:
    """By layer, `[batch, pos, units]` first-order effects of every unit at every position (of a pattern: query).

    Args:
        site: as for `capture_site`.
        delta: by layer, the site's clean values minus ablated values.
        run: the pass at which the gradients were taken.
    """
    if site in ("q", "k", "v"):
        return {
            layer: torch.linalg.vecdot(change, getattr(gradients.qkv[layer], site)) for layer, change in delta.items()
        }
    effects: Values = {}
    for at in stream_gradients(adapter, run, gradients):
        if at.layer in delta:
            effects[at.layer] = _effects(adapter, site, delta[at.layer], run, at)
        if len(effects) == len(delta):
            break
    return effects


def _effects(adapter: Adapter, site: str, change: Tensor, run: Run, at: StreamGradients) -> Tensor:
    view, layer = adapter.layers[at.layer], at.layer
    if site == "resid":
        return torch.linalg.vecdot(change, at.entering).unsqueeze(-1)
    if site == "middle":
        return torch.linalg.vecdot(change, at.attention).unsqueeze(-1)
    if site in ("mlp_out", "hidden"):
        gradient = _before(view.post_mlp_norm, run.mlp_out[layer].view(at.mlp.shape), at.mlp * view.multiplier)
    else:
        gradient = _at_attention(adapter, run, at)
    if site in ("mlp_out", "attn_out"):
        return torch.linalg.vecdot(change, gradient).unsqueeze(-1)
    rows = input_rows(adapter, "hidden" if site == "hidden" else "z", layer).to(gradient)
    if site == "hidden":
        return change * einsum(gradient, rows, "b t d, n d -> b t n")
    if site == "pattern":
        change = attended(adapter, change, run.qkv[layer].v, range(adapter.graph.n_heads))
    return torch.linalg.vecdot(change, _at_heads(adapter, gradient, rows))


def head_gradients(adapter: Adapter, layers: Container[int], run: Run, gradients: ReaderGradients) -> Values:
    """By layer, `[batch, pos, heads, d_head]` gradients at the heads before the output projection."""
    found: Values = {}
    for at in stream_gradients(adapter, run, gradients):
        if at.layer in layers:
            gradient = _at_attention(adapter, run, at)
            found[at.layer] = _at_heads(adapter, gradient, input_rows(adapter, "z", at.layer).to(gradient))
    return found


def _at_attention(adapter: Adapter, run: Run, at: StreamGradients) -> Tensor:
    """The gradient at the output of the attention's output projection."""
    view = adapter.layers[at.layer]
    return _before(view.post_attn_norm, run.attn_out[at.layer], at.attention * view.multiplier)


def _at_heads(adapter: Adapter, gradient: Tensor, rows: Tensor) -> Tensor:
    by_head = rows.unflatten(0, (adapter.graph.n_heads, -1))
    return einsum(gradient, by_head, "b t d, h e d -> b t h e")


def _before(norm: Norm | None, output: Tensor, gradient: Tensor) -> Tensor:
    """The gradient at a module's output from the one behind its post-norm."""
    return gradient if norm is None else norm.pull_back(output.to(gradient), gradient)
