"""Small models wrapped for the public interface, tasks of token ids for them, and literal twins of the estimates.

The twins take the model through `oracles.Literal`, where every reader has its own copy of the residual stream: averaged
gradients are computed one point at a time by autograd, exact effects by one forward pass an edge.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import numpy as np
import torch
from families import VOCAB, build
from helpers import off
from oracles import Literal, Pass, patch_edges
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel

import circuitfind as cf
from circuitfind.batch import Inputs
from circuitfind.graph import Graph
from circuitfind.tasks.bound import BoundTask

FOUR = ["gpt2", "llama", "gpt_neox", "gemma2"]  # fused heads, grouped key/value heads, parallel blocks, post-norms


@cache
def wrapped(name: str, dtype: torch.dtype = torch.float32, heads: int | None = None) -> cf.Model:
    """A random model of a family without tokenizer."""
    return cf.wrap(build(name, dtype=dtype, heads=heads), None, name=name)


@cache
def linear(dtype: torch.dtype = torch.float32) -> cf.Model:
    """A GPT-2 that is a linear map of its embeddings.

    An epsilon of 1e8 under a weight of 1e4 leaves of LayerNorm only the centring, queries and keys of zero leave of
    attention the mean over what went before, and MLPs write their bias alone.
    """
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=VOCAB, n_positions=16, n_embd=32, n_layer=3, n_head=4, layer_norm_epsilon=1e8, bos_token_id=1
    )
    hf = GPT2LMHeadModel(config).eval().to(dtype)
    with torch.no_grad():
        for name, parameter in hf.named_parameters():
            if "ln_" in name:
                parameter.fill_(1e4 if name.endswith("weight") else 0)
            elif parameter.ndim > 1:
                parameter.mul_(8)
            else:
                parameter.normal_(0, 0.1)
        for block in hf.transformer.h:
            block.attn.c_attn.weight[:, :64] = 0
            block.attn.c_attn.bias[:64] = 0
            block.mlp.c_proj.weight.zero_()
    return cf.wrap(hf, None, name="linear")


def either(heads: tuple[tuple[int, int], ...] = ((0, 0), (0, 1))) -> tuple[cf.Model, cf.Task]:
    """A GPT-2 that ORs up to three heads (layer, head), and pairs for it: its only edges are two a head, `m->logits`.

    Each head sees whether the first token is a 1; the last MLP is min(1, a + b + ...) = relu(a + b + ...) - relu(a + b
    + ... - 1). Norms are the identity, as in `linear`, because what is written has mean 0.
    """
    config = GPT2Config(
        vocab_size=8,
        n_positions=4,
        n_embd=8,
        n_layer=1 + max(heads)[0],
        n_head=2,
        n_inner=2,
        activation_function="relu",
        layer_norm_epsilon=1e8,
        tie_word_embeddings=False,
        bos_token_id=0,
    )
    hf = GPT2LMHeadModel(config).eval()
    signal, written, rest, idle = 0, 5, 7, 4
    with torch.no_grad():
        for name, parameter in hf.named_parameters():
            parameter.fill_(1e4 if "ln_" in name and name.endswith("weight") else 0)
        embedding = hf.transformer.wte.weight
        embedding[:, idle], embedding[1, signal] = 0.5, 1
        embedding[:, rest] = -embedding.sum(1)
        for number, (layer, head) in enumerate(heads, 1):
            block = hf.transformer.h[layer]
            block.attn.c_attn.weight[signal, 16 + 4 * head] = 2  # half of the pattern is on the first token
            block.attn.c_proj.weight[4 * head, [number, rest]] = torch.tensor([1.0, -1.0])
        block.mlp.c_fc.weight[1:4] = 1
        block.mlp.c_fc.bias[1] = -1
        block.mlp.c_proj.weight[:, written] = torch.tensor([1.0, -1.0])
        block.mlp.c_proj.weight[:, rest] = torch.tensor([-1.0, 1.0])
        hf.lm_head.weight[4, written], hf.lm_head.weight[6, idle] = 5, 1
    clean = torch.tensor([[1, last] for last in (2, 3, 5, 7)])
    corrupted = clean.clone()
    corrupted[:, 0] = 2
    return cf.wrap(hf, None, name="or"), cf.Task(clean, corrupted, [4] * 4, [5] * 4, name="or")


def id_task(
    lengths: tuple[int, ...] = (7, 7, 7), seed: int = 0, reads: int | None = None, **keywords: object
) -> cf.Task:
    """Random pairs of these lengths, padded on the right with a mask; two answers and one wrong answer each."""
    generator, size, length = torch.Generator().manual_seed(seed), len(lengths), max(lengths)
    clean, corrupted = torch.randint(3, VOCAB, (2, size, length), generator=generator)
    mask = torch.arange(length) < torch.tensor(lengths)[:, None]
    answers = torch.stack([torch.randperm(VOCAB - 3, generator=generator)[:3] + 3 for _ in range(size)])
    fields = {"metric": "logit_diff", "name": "ids", **keywords}
    return cf.Task(clean * mask, corrupted * mask, answers[:, :2], answers[:, 2], attention_mask=mask, **fields)


def off_scores(scores: cf.Scores, expected: Tensor) -> float:
    """Largest difference over the graph's edges, relative to the largest expected score."""
    real = torch.from_numpy(scores.graph.real)
    return off(torch.from_numpy(scores.values)[real], expected[real])


def contrast(
    seed: int,
    lengths: tuple[int, ...] = (7, 5, 6, 7),
    metric: Any = "logit_diff",
    name: str = "llama",
    model: cf.Model | None = None,
) -> cf.Task:
    """Random pairs whose answers are what the clean prompt makes likely: a behaviour that a random model does."""
    task = id_task(lengths, seed)
    with torch.no_grad():
        hf = (model or wrapped(name)).hf
        clean, corrupted = (
            torch.stack([hf(row[keep].unsqueeze(0)).logits[0, -1] for row, keep in zip(ids, mask, strict=True)])
            for ids, mask in ((task.clean, task.attention_mask), (task.corrupted, task.attention_mask))
        )
    change = clean - corrupted
    return dataclasses.replace(task, answers=change.argmax(-1), wrong_answers=change.argmin(-1), metric=metric)


def some_circuits(graph: Graph, count: int = 4, seed: int = 0) -> list[cf.Circuit]:
    rng = np.random.default_rng(seed)
    return [cf.Circuit(graph, graph.real & (rng.random(graph.real.shape) < p)) for p in np.linspace(0.1, 0.95, count)]


# -------------------------------------------------------------------- literal twins
def ablated_literally(corrupted: Pass, mask: Tensor, ablation: str) -> dict[str, Tensor]:
    """What each writer carries on an ablated edge, by the words of the documentation."""
    values = {}
    for name, value in corrupted.writers.items():
        if ablation == "zero":
            value = torch.zeros_like(value)
        elif ablation == "mean":
            value = value[mask].mean(0).expand_as(value)
        elif ablation == "mean-position":
            value = value.mean(0, keepdim=True).expand_as(value)
        values[name] = value
    return values


@contextmanager
def entering(literal: Literal, embed: Tensor | None) -> Iterator[None]:
    """Another residual enters layer 0. To be entered before a pass, so that this hook comes first."""

    def replace(_: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        return ((embed, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": embed})

    if embed is None:
        yield
        return
    handle = literal.blocks[0].register_forward_pre_hook(replace, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


def gradients_at(
    literal: Literal,
    inputs: Inputs,
    metric: Callable[[Tensor], Tensor],
    embed: Tensor | None = None,
    unused: bool = False,
) -> dict[str, Tensor]:
    """By reader, the gradient of the summed metric at what it reads; zero where it is `unused`, if that may be."""
    branches: dict[str, Tensor] = {}

    def split(reader: str, stream: Tensor, so_far: Pass) -> Tensor:
        branches[reader] = stream.view_as(stream)
        return branches[reader]

    with entering(literal, embed):
        run = literal.run(inputs, split)
    found = torch.autograd.grad(metric(run.logits).sum(), list(branches.values()), materialize_grads=unused)
    return dict(zip(branches, found, strict=True))


class Twin:
    """Clean and corrupted passes of a bound task, and the effects of all its edges computed the slow way.

    `dealt`: another batch that provides the corrupted prompts, for the resample ablation.
    """

    def __init__(self, model: cf.Model, bound: BoundTask, ablation: str = "corrupted", dealt: Inputs | None = None):
        self.literal, self.model, self.bound = Literal(model.hf), model, bound
        with torch.no_grad():
            self.clean = self.literal.run(bound.batch.clean)
            self.corrupted = self.literal.run(bound.batch.corrupted if dealt is None else dealt)
        self.batch = bound.batch.with_reference(self.clean.logits)
        self.carried = ablated_literally(self.corrupted, bound.batch.corrupted.mask, ablation)

    def metric(self, logits: Tensor) -> Tensor:
        return self.bound.metric(logits, self.batch)

    def estimates(self, alphas: list[float]) -> Tensor:
        """`[writers, readers]`: clean minus ablated writers, times the mean of the gradients at these points."""
        total: dict[str, Tensor] = {}
        low, high = self.corrupted.writers["input"], self.clean.writers["input"]
        for alpha in alphas:
            inputs = self.batch.corrupted if alpha == 0 else self.batch.clean
            embed = None if alpha in (0, 1) else low + alpha * (high - low)
            for reader, gradient in gradients_at(self.literal, inputs, self.metric, embed).items():
                total[reader] = total.get(reader, 0) + gradient / len(alphas)
        change = {name: value - self.carried[name] for name, value in self.clean.writers.items()}
        return self._matrix(lambda writer, reader: (change[writer] * total[reader]).sum() / len(self.batch))

    def exact(self, direction: str = "noising") -> Tensor:
        """`[writers, readers]`: one forward pass an edge."""
        if direction == "noising":
            inputs, base, sign = self.batch.clean, self.clean, 1
            change = {name: self.carried[name] - value for name, value in self.clean.writers.items()}
        else:
            inputs, base, sign = self.batch.corrupted, self.corrupted, -1
            change = {name: self.clean.writers[name] - value for name, value in self.corrupted.writers.items()}
        before = self.metric(base.logits).mean()

        edges = self.literal.edges()
        after = dict(zip(edges, patch_edges(self.literal, inputs, change, edges), strict=True))
        return self._matrix(lambda writer, reader: sign * (before - self.metric(after[writer, reader]).mean()))

    def _matrix(self, value: Callable[[str, str], Tensor]) -> Tensor:
        graph = self.model.graph
        matrix = torch.zeros(graph.n_writers, graph.n_readers, dtype=torch.float64)
        edges = self.literal.edges()
        assert [f"{writer}->{reader}" for writer, reader in edges] == graph.names(graph.real)
        for writer, reader in edges:
            matrix[graph.edge(f"{writer}->{reader}")] = value(writer, reader).double()
        return matrix


def node_sums(matrix: Tensor | np.ndarray) -> np.ndarray:
    """`[writers]`: each writer's scores over all its outgoing edges."""
    return np.asarray(matrix).sum(1)
