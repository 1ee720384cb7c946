"""A model under a mask of its edges, differentiable in its weights: what `circuitfind.engine` runs with frozen ones.

Every reader gets `constants + sum over writers of m * own + (1 - m) * other`: the writer's output in this run if the
edge is kept (m = 1), and its output in another run if not. Each prompt has its own mask. GPT-2 and Llama are the models
of transformers, with their modules and parameters unchanged.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from einops import einsum, rearrange
from torch import Tensor
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from circuitfind.graph import Graph


class Layer(NamedTuple):
    """A layer's modules, and its projections as `[heads, d_model, d_head]` (the output one the other way round)."""

    norms: tuple[Any, Any]
    mlp: Any
    q: Tensor
    k: Tensor
    v: Tensor
    out: Tensor
    q_bias: Tensor
    k_bias: Tensor
    v_bias: Tensor
    out_bias: Tensor


def layer_of(hf: Any, number: int, graph: Graph) -> Layer:
    none = torch.zeros(())
    if hf.config.model_type == "gpt2":
        block = hf.transformer.h[number]
        weights = rearrange(block.attn.c_attn.weight, "d (kind head c) -> kind head d c", kind=3, head=graph.n_heads)
        biases = rearrange(
            block.attn.c_attn.bias, "(kind head one c) -> kind head one c", kind=3, head=graph.n_heads, one=1
        )
        out = rearrange(block.attn.c_proj.weight, "(head c) d -> head c d", head=graph.n_heads)
        return Layer((block.ln_1, block.ln_2), block.mlp, *weights, out, *biases, block.attn.c_proj.bias)
    block = hf.model.layers[number]
    own, norms = block.self_attn, (block.input_layernorm, block.post_attention_layernorm)
    q, k, v = (
        rearrange(one.weight, "(head c) d -> head d c", head=heads)
        for one, heads in zip(
            (own.q_proj, own.k_proj, own.v_proj), (graph.n_heads, *[graph.n_kv_heads] * 2), strict=True
        )
    )
    out = rearrange(own.o_proj.weight, "d (head c) -> head c d", head=graph.n_heads)
    return Layer(norms, block.mlp, q, k, v, out, none, none, none, none)


class Written(NamedTuple):
    """Outputs of writers, `[batch, writer, position, d_model]`: before the last layer at every token, and of all at the
    last token."""

    before: Tensor
    last: Tensor


def run(
    hf: Any, graph: Graph, ids: Tensor, mask: Tensor | None = None, other: Written | None = None
) -> tuple[Tensor, Written]:
    """Return the logits `[batch, vocab]` at the last token, and every writer's output.

    Args:
        ids: `[batch, position]`.
        mask: `[batch, writer, reader]`; without a mask every edge is kept.
        other: the writers' outputs in the other run.
    """
    length = ids.shape[1]
    at = torch.arange(length)
    if hf.config.model_type == "gpt2":
        turn = None
        first, final = hf.transformer.wte(ids) + hf.transformer.wpe(at), hf.transformer.ln_f
    else:
        turn = hf.model.rotary_emb(hf.model.embed_tokens.weight, at[None])
        first, final = hf.model.embed_tokens(ids), hf.model.norm
    future = torch.ones(length, length, dtype=torch.bool).triu(1)
    constants = torch.zeros(())
    before = written = first[:, None]
    past = None if other is None else other.before

    def read(readers: slice) -> Tensor:
        """`[batch, reader, position, d_model]`"""
        if mask is None or past is None:
            return (written.sum(1, keepdim=True) + constants).expand(-1, readers.stop - readers.start, -1, -1)
        through, then = mask[:, : written.shape[1], readers], past[:, : written.shape[1]]
        return then.sum(1, keepdim=True) + constants + einsum(written - then, through, "b w p d, b w r -> b r p d")

    for number in range(graph.n_layers):
        layer = layer_of(hf, number, graph)
        k, v = (
            einsum(layer.norms[0](read(graph.readers(number, kind))), weight, "b h p d, h d c -> b h p c") + bias
            for kind, weight, bias in (("k", layer.k, layer.k_bias), ("v", layer.v, layer.v_bias))
        )
        if number == graph.n_layers - 1:  # from here on only the last token counts
            before, written, past = written, written[:, :, -1:], None if other is None else other.last
        q = (
            einsum(layer.norms[0](read(graph.readers(number, "q"))), layer.q, "b h p d, h d c -> b h p c")
            + layer.q_bias
        )
        if turn is not None:
            k, _ = apply_rotary_pos_emb(k, k, *turn)
            q, _ = apply_rotary_pos_emb(q, q, *(one[:, -q.shape[2] :] for one in turn))
        k, v = (one.repeat_interleave(graph.group, 1) for one in (k, v))
        scores = einsum(q, k, "b h p c, b h s c -> b h p s") / q.shape[-1] ** 0.5
        z = scores.masked_fill(future[-q.shape[2] :], -torch.inf).softmax(-1) @ v
        constants = constants + layer.out_bias
        written = torch.cat([written, einsum(z, layer.out, "b h p c, h c d -> b h p d")], 1)
        written = torch.cat([written, layer.mlp(layer.norms[1](read(graph.readers(number, "mlp"))))], 1)
    logits = hf.lm_head(final(read(graph.readers(0, "logits"))[:, 0, -1]))
    return logits, Written(before, written)
