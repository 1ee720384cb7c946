"""Circuits in one forward pass: both forms against a literal evaluation, and at the two ends of the range."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from families import EVERY_FAMILY, STRUCTURES, swept
from helpers import off, random_pairs, run_circuits_traced
from oracles import Literal, Pass, run_circuit
from torch import Tensor

from circuitfind.batch import Batch
from circuitfind.engine import memory_plan
from circuitfind.engine.ablation import ablation_of, mean_of, resampled, sum_writers
from circuitfind.engine.capture import capture
from circuitfind.engine.circuit_run import prefers_sparse, run_circuits
from circuitfind.engine.prepare import Prepared, prepare
from circuitfind.errors import TaskError
from circuitfind.graph import Graph
from circuitfind.models.adapter import Adapter

FOUR = ["gpt2", "llama", "gpt_neox", "gemma2"]  # fused heads, grouped key/value heads, parallel blocks, post-norms
DENSITIES = (0.03, 0.2, 0.6, 0.95)


@pytest.fixture(autouse=True)
def nothing_left_over(monkeypatch: pytest.MonkeyPatch) -> None:
    """New memory holds NaN: a row that a run forgets to write must not find what the run before left there."""
    original = Tensor.new_empty

    def new_empty(value: Tensor, *shape: Any, **options: Any) -> Tensor:
        made = original(value, *shape, **options)
        return made.fill_(torch.nan) if made.is_floating_point() else made

    monkeypatch.setattr(Tensor, "new_empty", new_empty)


def random_masks(graph: Graph, seed: int = 0) -> np.ndarray:
    """`[circuits, writers, readers]`: one circuit of each density."""
    draw = np.random.default_rng(seed).random((len(DENSITIES), *graph.real.shape))
    return graph.real & (draw < np.array(DENSITIES)[:, None, None])


def kept_edges(graph: Graph, mask: np.ndarray) -> set[tuple[str, str]]:
    return {tuple(name.split("->")) for name in graph.names(mask)}


def prepared_for(adapter: Adapter, batch: Batch, ablation: str) -> Prepared:
    means = mean_of([sum_writers(adapter, batch, ablation == "mean-position")]) if ablation.startswith("mean") else None
    return prepare(adapter, resampled(batch, 0) if ablation == "resample" else batch, ablation, means)


def literal_ablated(corrupted: Pass, mask: Tensor, ablation: str) -> dict[str, Tensor]:
    """What each writer carries outside a circuit, by the words of DESIGN: loops over real positions."""
    values = {}
    for writer, value in corrupted.writers.items():
        if ablation == "zero":
            value = torch.zeros_like(value)
        elif ablation == "mean":
            real = [value[row, at] for row in range(len(mask)) for at in range(mask.shape[1]) if mask[row, at]]
            value = (sum(real) / len(real)).expand_as(value)
        elif ablation == "mean-position":
            value = (sum(value) / len(value)).expand_as(value)
        values[writer] = value
    return values


def check_against_literal(adapter: Adapter, batch: Batch, ablation: str, masks: np.ndarray) -> None:
    literal, graph = Literal(adapter.model), adapter.graph
    with torch.no_grad():
        dealt = resampled(batch, 0) if ablation == "resample" else batch
        values = literal_ablated(literal.run(dealt.corrupted), batch.corrupted.mask, ablation)
    prepared = prepared_for(adapter, batch, ablation)
    for mask in masks:
        expected = run_circuit(literal, batch.clean, kept_edges(graph, mask), values)
        for sparse in (True, False):
            assert off(run_circuits(prepared, mask[None], sparse)[0], expected) < 1e-5, (mask.sum(), sparse)


@pytest.mark.parametrize("name", swept(EVERY_FAMILY))
def test_circuits_equal_the_literal_evaluation(name: str, adapter_of: Callable[..., Adapter], pairs: Batch) -> None:
    adapter = adapter_of(name)
    check_against_literal(adapter, pairs, "corrupted", random_masks(adapter.graph)[1:3])


@pytest.mark.parametrize("ablation", ["corrupted", "zero", "mean"])
@pytest.mark.parametrize("name", FOUR)
def test_ablations_equal_the_literal_evaluation(
    name: str, ablation: str, adapter_of: Callable[..., Adapter], pairs: Batch
) -> None:
    adapter = adapter_of(name)
    ends = np.stack([np.zeros_like(adapter.graph.real), adapter.graph.real])
    check_against_literal(adapter, pairs, ablation, np.concatenate([random_masks(adapter.graph, seed=1), ends]))


@pytest.mark.parametrize("ablation", ["mean-position", "resample"])
def test_ablations_of_equal_lengths(ablation: str, adapter_of: Callable[..., Adapter], plain_pairs: Batch) -> None:
    adapter = adapter_of("gemma2")
    check_against_literal(adapter, plain_pairs, ablation, random_masks(adapter.graph)[:3])


@pytest.mark.parametrize("name", STRUCTURES)
def test_both_forms_agree_side_by_side_and_one_by_one(
    name: str, adapter_of: Callable[..., Adapter], pairs: Batch
) -> None:
    adapter = adapter_of(name)
    masks = random_masks(adapter.graph, seed=2)
    for ablation in ("corrupted", "mean"):
        prepared = prepared_for(adapter, pairs, ablation)
        together = [run_circuits(prepared, masks, sparse) for sparse in (True, False)]
        assert together[0].shape[:3] == (len(masks), *pairs.clean.read.shape)
        alone = [torch.cat([run_circuits(prepared, mask[None], s) for mask in masks]) for s in (True, False)]
        for value in (together[1], *alone):
            assert off(value, together[0]) < 1e-5
        assert off(together[0][0], together[0][3]) > 1e-3, "the circuits do not differ"


@pytest.mark.parametrize("ablation", ["corrupted", "zero", "mean"])
@pytest.mark.parametrize("name", STRUCTURES)
def test_full_and_empty_circuits_are_bitwise_the_runs(
    name: str, ablation: str, adapter_of: Callable[..., Adapter], pairs: Batch
) -> None:
    adapter = adapter_of(name)
    prepared, full = prepared_for(adapter, pairs, ablation), adapter.graph.real[None]
    with torch.no_grad():
        plain = [adapter.model(**adapter.keywords(side)).logits for side in (pairs.clean, pairs.corrupted)]
    read = torch.arange(len(pairs))[:, None], pairs.clean.read
    assert torch.equal(run_circuits(prepared, full)[0], prepared.clean.logits)
    assert off(plain[0][read], prepared.clean.logits) < 1e-5  # all positions are unembedded, instead of two
    assert torch.equal(run_circuits(prepared, np.zeros_like(full))[0], prepared.empty.logits)
    if ablation == "corrupted":
        assert off(plain[1][read], prepared.empty.logits) < 1e-5


@pytest.mark.parametrize("backend", ["nnsight", "hooks"])
@pytest.mark.parametrize("name", STRUCTURES)
def test_traced_without_skipping_equals_hooks(
    name: str, backend: str, adapter_of: Callable[..., Adapter], pairs: Batch
) -> None:
    adapter = adapter_of(name)
    adapter.backend = backend
    prepared, masks = prepared_for(adapter, pairs, "corrupted"), random_masks(adapter.graph)
    for sparse in (True, False):
        assert torch.equal(run_circuits_traced(prepared, masks, sparse), run_circuits(prepared, masks, sparse))


@pytest.mark.parametrize("name", ["gpt2", "gemma2"])
def test_slices_of_tokens_do_not_matter(
    name: str, adapter_of: Callable[..., Adapter], pairs: Batch, monkeypatch: pytest.MonkeyPatch
) -> None:
    adapter = adapter_of(name)
    prepared, masks = prepared_for(adapter, pairs, "corrupted"), random_masks(adapter.graph)
    whole = [run_circuits(prepared, masks, sparse) for sparse in (True, False)]
    monkeypatch.setattr(memory_plan, "IN_CACHE", {"cpu": 2000})  # a token or two at a time
    sliced = [run_circuits(prepared, masks, sparse) for sparse in (True, False)]
    assert all(off(a, b) < 1e-5 for a, b in zip(sliced, whole, strict=True))


def test_modules_that_nothing_changes_are_not_run(adapter_of: Callable[..., Adapter], pairs: Batch) -> None:
    adapter = adapter_of("llama")
    prepared, graph = prepared_for(adapter, pairs, "corrupted"), adapter.graph
    called: list[str] = []
    for name, module in adapter.model.named_modules():
        if name.endswith(("q_proj", "up_proj")):
            module.register_forward_hook(lambda *_, name=name: called.append(name.removeprefix("model.layers.")))
    for edges, expected in (
        ([], []),
        (["input->logits"], []),
        (["input->m1", "m1->logits"], ["1.mlp.up_proj"]),
        (["input->a0.h1<q>", "a0.h1->m1", "m1->logits"], ["0.self_attn.q_proj", "1.mlp.up_proj"]),
        (["m0->logits"], []),  # nothing reaches m0: it carries its ablated value
    ):
        called.clear()
        run_circuits(prepared, graph.mask(edges)[None])
        assert called == expected


def test_the_cheaper_form_is_taken(adapter_of, pairs) -> None:
    prepared = prepare(adapter_of("gpt2"), pairs)
    graph = prepared.adapter.graph
    sparse, dense = random_masks(graph)[[0, 3]]
    assert prefers_sparse(prepared, sparse[None]) and prefers_sparse(prepared, np.zeros_like(sparse)[None])
    assert not prefers_sparse(prepared, dense[None]) or (graph.real & ~dense).any(axis=0).all()
    assert not prefers_sparse(prepared, graph.real[None])


def test_streams_that_can_be_zero_are_summed_not_subtracted(adapter_of, pairs) -> None:
    """Under zero ablation a cut-off reader sees 0 in the sparse form and rounding noise in the dense one."""
    prepared = prepare(adapter_of("llama"), pairs, "zero")
    graph = prepared.adapter.graph
    mask = graph.real.copy()
    mask[:, graph.readers(1, "v")] = False
    assert prefers_sparse(prepared, mask[None]) and not prefers_sparse(prepared, graph.real[None])


def test_resampling_gives_nobody_its_own_prompt() -> None:
    batch = random_pairs((0,) * 5, (0,) * 5)
    for seed in range(5):
        dealt = resampled(batch, seed)
        assert sorted(map(tuple, dealt.corrupted.ids.tolist())) == sorted(map(tuple, batch.corrupted.ids.tolist()))
        assert not (dealt.corrupted.ids == batch.corrupted.ids).all(1).any()
        assert torch.equal(dealt.clean.ids, batch.clean.ids)
        assert torch.equal(resampled(batch, seed).corrupted.ids, dealt.corrupted.ids)
    assert len({str(resampled(batch, seed).corrupted.ids) for seed in range(5)}) > 2, "the seed deals"
    with pytest.raises(TaskError, match="at least two examples"):
        resampled(batch.rows(slice(1)), 0)


def test_means_do_not_depend_on_the_batching(adapter_of: Callable[..., Adapter], pairs: Batch) -> None:
    adapter = adapter_of("gemma2")
    pieces = [pairs.rows(slice(2)), pairs.rows(slice(2, 3))]
    whole = mean_of([sum_writers(adapter, pairs, by_position=False)])
    parts = mean_of(sum_writers(adapter, piece, by_position=False) for piece in pieces)
    for a, b in zip((whole.embed, *whole.heads, *whole.mlps), (parts.embed, *parts.heads, *parts.mlps), strict=True):
        assert off(b, a) < 1e-5


def test_means_are_of_the_corrupted_prompts_alone(adapter_of: Callable[..., Adapter], pairs: Batch) -> None:
    """Also of pairs whose clean prompts have other lengths (aligned by spans)."""
    shorter = replace(pairs, clean=pairs.clean._replace(mask=pairs.clean.mask & (torch.arange(9) < 5)))
    whole, other = (mean_of([sum_writers(adapter_of("gpt2"), batch, by_position=False)]) for batch in (pairs, shorter))
    mask = pairs.corrupted.mask
    assert off(whole.embed[0, 0], capture(adapter_of("gpt2"), pairs.corrupted).resid[0][mask].mean(0)) < 1e-5
    assert torch.equal(other.embed, whole.embed) and torch.equal(other.mlps[1], whole.mlps[1])


def test_impossible_ablations_are_refused(pairs: Batch, plain_pairs: Batch) -> None:
    with pytest.raises(TaskError, match=r"ablation 'noise' is unknown\. Known: corrupted, zero, mean"):
        ablation_of("noise")
    for ablation in ("mean-position", "resample"):
        with pytest.raises(TaskError, match=f"'{ablation}' needs prompts of one length"):
            ablation_of(ablation).check(pairs)
        ablation_of(ablation).check(plain_pairs)


@pytest.mark.parametrize("name", STRUCTURES)
def test_a_small_circuit_of_mlps_alone_skips_attention_and_stays_right(name, adapter_of, pairs):
    """With no q, k, v reader active the attention never runs, and the MLP must still see the stream behind it."""
    adapter = adapter_of(name)
    graph, prepared = adapter.graph, prepare(adapter, pairs)
    for layer in range(graph.n_layers):
        mask = graph.mask([f"input->m{layer}", f"m{layer}->logits"])[None]
        assert off(run_circuits(prepared, mask, sparse=True), run_circuits(prepared, mask, sparse=False)) < 1e-5


@pytest.mark.parametrize("name", ("gpt2", "llama", "gemma2", "bloom"))
def test_circuits_of_few_edges_agree_in_both_forms(name, adapter_of, pairs):
    """One mask at a time: together, some circuit always keeps every module running."""
    adapter = adapter_of(name)
    rng, prepared = np.random.default_rng(0), prepare(adapter, pairs)
    for density in (0.01, 0.03, 0.1):
        for _ in range(8):
            mask = (adapter.graph.real & (rng.random(adapter.graph.real.shape) < density))[None]
            assert off(run_circuits(prepared, mask, sparse=True), run_circuits(prepared, mask, sparse=False)) < 2e-5
