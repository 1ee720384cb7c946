"""Compiles a blueprint to the weights of a Llama with grouped queries (`LlamaForCausalLM`).

1. An RMSNorm with epsilon E = 1e8 and weight 1e4 is the identity up to a relative error of (mean square) / 2E.
2. A head of the blueprint becomes the first of two query heads that share a key and a value. The second one attends
   equally to all tokens, and writes to a variable that nothing reads.
3. Positions are rotary. The first two pairs of channels rotate by 1 and by `TURN` radians per token. An offset puts
   constant queries and keys into them, so that the score is largest at the distance `back`. Matches are in the pairs
   from `FIRST` on, whose rotation is negligible.
4. There are no biases. The variable `one` gives a neuron's bias, and the second factor of the gated MLP.
"""

from __future__ import annotations

import math
import re
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from circuitfind.errors import ScoreError
from circuitfind.testbed.blueprint import Blueprint, Head, Offset, Variable
from circuitfind.testbed.channels import Channels, Product, heads_of, tables_of
from circuitfind.testbed.gpt2 import EPSILON

TURN = 0.12  # ratio of a pair's rotary frequency to that of the pair before
PLACED = 2  # pairs of channels that encode positions
FIRST = 8  # index of the first pair that holds matches; it rotates by TURN^8 = 4e-8 radians per token
SMALLEST_GAP = 0.25  # cos(d) + cos(TURN d) is at least this much larger at d = 0 than at |d| = 1, ..., 7
GROUP = 2  # query heads that share a key and a value


def grouped(edge: str) -> str:
    """Return an edge's name in this model, from its name in the blueprint."""
    shared = re.sub(r"a(\d+)\.h(\d+)<([kv])>", r"a\1.kv\2<\3>", edge)
    return re.sub(r"\.h(\d+)", lambda found: f".h{GROUP * int(found[1])}", shared)


def llama(plan: Blueprint) -> Any:
    """Return the model in float32, in evaluation mode.

    Raises:
        ScoreError: a part reads `position`, which Llama's residual stream does not contain.
    """
    for part in plan.parts:
        if plan.position in [one for read in part.reads().values() for one in read]:
            raise ScoreError(f"testbed: {part.writer} reads positions, which Llama's residual stream does not contain")
    products = {
        part: [Product.of(look) for look in part.looks if not isinstance(look, Offset)]
        for part in plan.parts
        if isinstance(part, Head)
    }
    pairs = max(math.ceil(sum(one.size for one in own) / 2) + FIRST for own in products.values())
    pairs = max(pairs, *(math.ceil(head.carried / 2) for head in products))
    aside = [Variable(f"aside of {head.writer}", head.carried) for head in products]
    variables = [one for one in plan.variables if one is not plan.position]
    heads = GROUP * plan.heads
    width = heads * math.ceil(sum(one.width for one in (*variables, *aside)) / heads)
    stream = Channels([*variables, *aside], width)
    hf: Any = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(plan.words),
            hidden_size=width,
            intermediate_size=max(1, *(plan.neurons(layer) for layer in range(plan.n_layers))),
            num_hidden_layers=plan.n_layers,
            num_attention_heads=heads,
            num_key_value_heads=plan.heads,
            head_dim=2 * pairs,
            max_position_embeddings=plan.length,
            hidden_act="relu",
            rms_norm_eps=EPSILON,
            rope_parameters={"rope_type": "default", "rope_theta": TURN**-pairs},
            tie_word_embeddings=False,
            pad_token_id=None,
            bos_token_id=0,
            eos_token_id=None,
        )
    )
    hf.eval()
    with torch.no_grad():
        for name, parameter in hf.named_parameters():
            parameter.fill_(EPSILON**0.5 if "norm" in name else 0)
        hf.model.embed_tokens.weight.copy_(stream.placed(plan.embedding(), len(plan.words)))
        hf.lm_head.weight[:, stream.of(plan.output)] = torch.eye(len(plan.words))
        for layer, block in enumerate(hf.model.layers):
            for head in heads_of(plan, layer):
                unread = aside[list(products).index(head)]
                _write_head(block.self_attn, plan, head, products[head], stream, pairs, unread)
            _write_tables(block.mlp, plan, layer, stream)
    return hf


def _write_head(
    attention: Any, plan: Blueprint, head: Head, products: list[Product], stream: Channels, pairs: int, unread: Variable
) -> None:
    size = 2 * pairs
    slow = [*range(FIRST, pairs), *range(pairs + FIRST, size)]  # both channels of every pair that hardly rotates
    query, key, value = stream.matrices(head, products, size, slow)
    one = stream.of(plan.one).start
    for look in head.looks:
        if isinstance(look, Offset):
            _write_offset(query[one], key[one], look, pairs)
    shared, first = (slice(n * size, (n + 1) * size) for n in (head.head, GROUP * head.head))
    attention.q_proj.weight[first] = query.T
    attention.k_proj.weight[shared], attention.v_proj.weight[shared] = key.T, value.T
    attention.o_proj.weight[:, first][:, : head.carried] = stream.placed(head.writes, head.carried).T
    second = slice(first.stop, first.stop + size)
    kept = stream.placed({unread: torch.eye(head.carried)}, head.carried)
    attention.o_proj.weight[:, second][:, : head.carried] = kept.T


def _write_offset(query: torch.Tensor, key: torch.Tensor, look: Offset, pairs: int) -> None:
    """Write a head's offset into the query and key of the variable `one`; a head can have only one offset.

    If `strength` is positive, the distance `back` scores at least `strength` more than distances that differ from it by
    1 to 7. If it is negative, the score at `back` is `strength`, and other distances also get a part of it.
    """
    amplitude = look.strength / (SMALLEST_GAP if look.strength > 0 else PLACED)
    for pair in range(PLACED):
        angle = -look.back * TURN**pair  # rotates the query from its position t to t - back
        query[[pair, pairs + pair]] = amplitude * (2 * pairs) ** 0.5 * torch.tensor([math.cos(angle), math.sin(angle)])
        key[pair] = 1.0


def _write_tables(mlp: Any, plan: Blueprint, layer: int, stream: Channels) -> None:
    one = stream.of(plan.one).start
    for own, table in tables_of(plan, layer):
        count = len(table.bias)
        mlp.gate_proj.weight[own] = stream.placed({variable: by.T for variable, by in table.takes.items()}, count)
        mlp.gate_proj.weight[own, one] += table.bias
        mlp.up_proj.weight[own, one] = 1
        mlp.down_proj.weight[:, own] = stream.placed(table.gives, count).T
