"""Compiles a blueprint to the weights of a GPT-2 (`GPT2LMHeadModel`).

1. A norm is the identity: with epsilon E = 1e8 and weight 1e4, `(x - mean) / sqrt(var + E) * sqrt(E)` is x up to a
   relative error of var / 2E. The mean is 0 because the last channel holds minus the sum of all others. With
   `norm="real"`, epsilon is GPT-2's, and two channels of the embedding hold a large constant and its negative. The
   standard deviation then hardly changes, and the norm's weight cancels it.
2. Position embeddings are one-hot, so that an offset is a match of positions.
3. A head's query and key hold its matches, one after the other. The neurons of a layer's MLP are those of its tables.
   The activation is ReLU, and the embeddings are not tied.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel

from circuitfind.testbed.blueprint import Blueprint, Head, Match, Offset
from circuitfind.testbed.channels import Channels, Product, heads_of, tables_of

EPSILON = 1e8
BALLAST = 64.0


def gpt2(plan: Blueprint, norm: str = "identity") -> Any:
    """Return the model in float32, in evaluation mode. `norm`: "identity" or "real"."""
    products = {part: _products(plan, part) for part in plan.parts if isinstance(part, Head)}
    need = [max(sum(one.size for one in own), head.carried) for head, own in products.items()]
    extra = 1 + 2 * (norm == "real")
    channels = sum(variable.width for variable in plan.variables) + extra
    size = max([*need, math.ceil(channels / plan.heads)])
    size += size * plan.heads % 2  # makes the stream's width even
    stream = Channels(plan.variables, size * plan.heads)
    hf: Any = GPT2LMHeadModel(
        GPT2Config(
            vocab_size=len(plan.words),
            n_positions=plan.length,
            n_embd=stream.width,
            n_layer=plan.n_layers,
            n_head=plan.heads,
            n_inner=max(1, *(plan.neurons(layer) for layer in range(plan.n_layers))),
            activation_function="relu",
            layer_norm_epsilon=1e-5 if norm == "real" else EPSILON,
            tie_word_embeddings=False,
            bos_token_id=0,
            eos_token_id=None,
        )
    )
    hf.eval()
    scale = (2 * BALLAST**2 / stream.width) ** 0.5 if norm == "real" else EPSILON**0.5
    with torch.no_grad():
        for name, parameter in hf.named_parameters():
            parameter.fill_(scale if "ln_" in name and name.endswith("weight") else 0)
        embedding = stream.placed(plan.embedding(), len(plan.words))
        if norm == "real":
            embedding[:, stream.used : stream.used + 2] = torch.tensor([BALLAST, -BALLAST])
        hf.transformer.wte.weight.copy_(_balanced(embedding))
        positions = stream.placed({plan.position: torch.eye(plan.length)}, plan.length)
        hf.transformer.wpe.weight.copy_(_balanced(positions))
        hf.lm_head.weight[:, stream.of(plan.output)] = torch.eye(len(plan.words))
        for layer, block in enumerate(hf.transformer.h):
            for head in heads_of(plan, layer):
                _write_head(block.attn, head, products[head], stream, size)
            _write_tables(block.mlp, plan, layer, stream)
    return hf


def _balanced(written: Tensor) -> Tensor:
    """Set the last channel of `[rows, width]` so that each row's sum is 0, and return the tensor."""
    written[:, -1] = -written.sum(1)
    return written


def _products(plan: Blueprint, head: Head) -> list[Product]:
    """Return a head's matches and offsets as inner products; an offset is a match of positions."""

    def match(look: Match | Offset) -> Match:
        if isinstance(look, Match):
            return look
        strength = torch.full((plan.length - look.back,), look.strength)
        return Match(plan.position, plan.position, torch.diag(strength, -look.back))

    return [Product.of(match(look)) for look in head.looks]


def _write_head(attention: Any, head: Head, products: list[Product], stream: Channels, size: int) -> None:
    matrices = stream.matrices(head, products, size, range(size))
    own = slice(head.head * size, (head.head + 1) * size)
    for number, matrix in enumerate(matrices):
        attention.c_attn.weight[:, number * stream.width : (number + 1) * stream.width][:, own] = matrix
    attention.c_proj.weight[own][: head.carried] = _balanced(stream.placed(head.writes, head.carried))


def _write_tables(mlp: Any, plan: Blueprint, layer: int, stream: Channels) -> None:
    for own, table in tables_of(plan, layer):
        mlp.c_fc.weight[:, own] = stream.placed({one: by.T for one, by in table.takes.items()}, len(table.bias)).T
        mlp.c_fc.bias[own] = table.bias
        mlp.c_proj.weight[own] = _balanced(stream.placed(table.gives, len(table.bias)))
