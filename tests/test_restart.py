"""Exact effects of single edges by restarted runs, against one full forward pass an edge."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from families import HYBRIDS, swept
from helpers import as_matrix, edge_scores, off, surprise
from oracles import Literal, patch_edges
from torch import Tensor

from circuitfind.batch import Batch, Inputs
from circuitfind.engine.capture import capture
from circuitfind.engine.restart import Restart
from circuitfind.models.adapter import Adapter

FOUR = ["gpt2", "llama", "gpt_neox", "gemma2"]
OTHERS = ["falcon-new", "opt", "bloom", "olmo2", "gpt_oss", "granite"]  # own layouts, flattening, inner residuals, ...
OTHERS += ["codegen", "ctrl", "dbrx", "gpt_bigcode", "granitemoe", "llama4_text", "modernbert-decoder", "moshi", "mpt"]
OTHERS += ["nanochat", "persimmon"]
OTHERS += ["deepseek_v2", "minicpm3"]  # latents
OTHERS += HYBRIDS


class Edges:
    """Patches edges of a base run with what the writers carry in another."""

    def __init__(self, adapter: Adapter, base: Inputs, other: Inputs) -> None:
        self.base = capture(adapter, base)
        self.restart = Restart(adapter, base, self.base)
        self.change = capture(adapter, other).writers.minus(self.base.writers)

    def patch(self, reader: int, writers: list[int]) -> Tensor:
        return self.restart.edges(reader, writers, self.change)


def restarted_effects(adapter: Adapter, base: Inputs, other: Inputs) -> Tensor:
    """`[writers, readers]`: the metric of the base run minus that with the edge patched, summed over examples."""
    graph, patched = adapter.graph, Edges(adapter, base, other)
    effects = torch.zeros(graph.n_writers, graph.n_readers)
    for reader in range(graph.n_readers):
        logits = patched.patch(reader, list(range(graph.limits[reader])))
        for writer, changed in enumerate(logits):
            effects[writer, reader] = (surprise(patched.base.logits) - surprise(changed)).sum()
    return effects


def literal_effects(adapter: Adapter, base: Inputs, other: Inputs, edges: list[tuple[str, str]]) -> dict:
    literal = Literal(adapter.model)
    with torch.no_grad():
        run, source = literal.run(base), literal.run(other)
    change = {name: source.writers[name] - value for name, value in run.writers.items()}
    before = surprise(run.logits)
    after = patch_edges(literal, base, change, edges)
    return {edge: float((before - surprise(logits)).sum()) for edge, logits in zip(edges, after, strict=True)}


@pytest.mark.parametrize("name", FOUR)
def test_every_edge_equals_a_forward_pass_of_its_own(
    name: str, adapter_of: Callable[..., Adapter], pairs: Batch
) -> None:
    adapter = adapter_of(name)
    expected = as_matrix(
        adapter.graph, literal_effects(adapter, pairs.clean, pairs.corrupted, Literal(adapter.model).edges())
    )
    effects = restarted_effects(adapter, pairs.clean, pairs.corrupted)
    assert off(effects, expected) < 1e-5
    assert off(edge_scores(adapter, pairs), expected) > 1e-2, "no first-order estimate is exact here"


@pytest.mark.parametrize("name", swept(OTHERS))
def test_some_edges_of_other_families(name: str, adapter_of: Callable[..., Adapter], pairs: Batch) -> None:
    """One edge into each kind of reader of the last layer, and into one of the first."""
    adapter = adapter_of(name)
    edges = [edge for edge in Literal(adapter.model).edges() if edge[0] in ("input", "a0.h2", "s0", "m0")]
    edges = [edge for edge in edges if edge[1] in ("logits", "m1", "a0.h3<q>", "s0") or edge[1].startswith("a1.")]
    literal, patched = Literal(adapter.model), Edges(adapter, pairs.clean, pairs.corrupted)
    with torch.no_grad():
        run, source = literal.run(pairs.clean), literal.run(pairs.corrupted)
    change = {name: source.writers[name] - value for name, value in run.writers.items()}
    after = patch_edges(literal, pairs.clean, change, edges)
    for (writer, reader), expected in zip(edges, after, strict=True):
        u, r = adapter.graph.edge(f"{writer}->{reader}")
        assert off(patched.patch(r, [u])[0], expected) < 1e-5, (writer, reader)


def test_denoising_restarts_from_the_corrupted_run(adapter_of: Callable[..., Adapter], pairs: Batch) -> None:
    adapter = adapter_of("llama")
    edges = Literal(adapter.model).edges()
    expected = as_matrix(adapter.graph, literal_effects(adapter, pairs.corrupted, pairs.clean, edges))
    assert off(restarted_effects(adapter, pairs.corrupted, pairs.clean), expected) < 1e-5


@pytest.mark.parametrize("name", ["gpt2", "gpt_neox", "falcon"])
def test_earlier_layers_are_not_run_again(name: str, adapter_of: Callable[..., Adapter], pairs: Batch) -> None:
    adapter = adapter_of(name)
    patched, called = Edges(adapter, pairs.clean, pairs.corrupted), []
    for layer, view in enumerate(adapter.layers):
        for part in ("qkv", "mlp_out"):
            module = view.module(getattr(view.family, part))
            module.register_forward_hook(lambda *_, key=f"{layer}.{part}": called.append(key))
    for reader, expected in (
        ("a0.h0<q>", ["0.qkv", "0.mlp_out", "1.qkv", "1.mlp_out"]),
        ("a1.h3<q>", ["1.qkv", "1.mlp_out"]),
        ("m1", ["1.mlp_out"]),
        ("logits", []),
    ):
        called.clear()
        patched.patch(adapter.graph.edge(f"input->{reader}")[1], [0])
        assert called == expected


def test_many_writers_side_by_side_equal_one_by_one(adapter_of: Callable[..., Adapter], pairs: Batch) -> None:
    adapter = adapter_of("gemma2")
    patched = Edges(adapter, pairs.clean, pairs.corrupted)
    reader = adapter.graph.readers(1, "mlp").start
    writers = [7, 0, 3, 5]
    together = patched.patch(reader, writers)
    assert together.shape[:3] == (4, *pairs.clean.read.shape)
    for writer, logits in zip(writers, together, strict=True):
        assert off(patched.patch(reader, [writer])[0], logits) < 1e-5
