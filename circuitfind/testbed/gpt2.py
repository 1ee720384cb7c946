"""From a blueprint to weights of GPT-2's class, as transformers has it.

1. A norm is the identity: with epsilon E = 1e8 and weight 1e4, `(x - mean) / sqrt(var + E) * sqrt(E)` is x up to
   var / 2E, because the last channel keeps the mean at 0. With `norm="real"` epsilon stays GPT-2's, and two channels of
   the embedding hold a large constant and its negative: the standard deviation then hardly moves, and the weight undoes
   it.
2. Positions are learned, one-hot: an offset is a match of positions.
3. A head's query and key channels hold its matches side by side, its value channels what it carries. Tables of a layer
   share the neurons of its MLP. ReLU, no dropout, nothing tied.
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
    """The model in float32, in evaluation mode."""
    products = {part: _products(plan, part) for part in plan.parts if isinstance(part, Head)}
    need = [max(sum(one.size for one in own), head.carried) for head, own in products.items()]
    extra = 1 + 2 * (norm == "real")
    channels = sum(variable.width for variable in plan.variables) + extra
    size = max([*need, math.ceil(channels / plan.heads)])
    size += size * plan.heads % 2  # an even width
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
    """`[rows, width]` with the last channel set so that the sum is 0."""
    written[:, -1] = -written.sum(1)
    return written


def _products(plan: Blueprint, head: Head) -> list[Product]:
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
