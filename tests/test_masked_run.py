"""Soft circuits against circuits, a literal evaluation and its gradient, finite differences, the scores of EAP."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Mapping
from itertools import product
from typing import Any

import numpy as np
import pytest
import torch
from families import build
from helpers import edge_scores, off, random_pairs, surprise
from oracles import Literal, Pass
from torch import Tensor

import circuitfind as cf
from circuitfind.batch import Batch, Inputs
from circuitfind.engine import masked_run, masked_streams
from circuitfind.engine.ablation import mean_of, sum_writers
from circuitfind.engine.circuit_run import run_circuits
from circuitfind.engine.masked_run import mask_gradient, pair_gradients, run_masked
from circuitfind.engine.prepare import Prepared, prepare
from circuitfind.engine.writers import output
from circuitfind.graph import ends_of
from circuitfind.metrics import Metric
from circuitfind.models.adapter import Adapter

# Fused heads, grouped key/value heads, parallel blocks, pre- and post-norms, post-norms only, a norm that attention and
# MLP share (and addition in place), the same with biases, values clipped in place, residual multipliers.
# Last, keys and values read through a latent, and queries, too; mixers in place of attention.
FAMILIES = ["gpt2", "llama", "gpt_neox", "gemma2", "olmo2", "falcon", "phi", "olmo-clipped", "granite"]
FAMILIES += ["youtu-direct", "youtu", "lfm2"]
SURPRISE = Metric("surprise", lambda logits, batch: surprise(logits))


def prepared_for(adapter: Adapter, batch: Batch, ablation: str) -> Prepared:
    means = mean_of([sum_writers(adapter, batch, False)]) if ablation == "mean" else None
    return prepare(adapter, batch, ablation, means)


def soft_mask(adapter: Adapter, seed: int = 0) -> Tensor:
    """Closed, open and in between, a third each; garbage in the cells that are no edges."""
    draw = np.random.default_rng(seed).uniform(-1, 2, adapter.graph.real.shape)
    mask = np.where(adapter.graph.real, draw.clip(0, 1), 7.0)
    return torch.from_numpy(mask).to(adapter.work)


def soft_circuit(literal: Literal, inputs: Inputs, mask: Mapping[tuple[str, str], Any], carried: dict) -> Tensor:
    """Every reader sees, for each writer, a mixture of what it writes now and what it carries when ablated."""

    def see(reader: str, stream: Tensor, so_far: Pass) -> Tensor:
        total, writers = torch.zeros_like(stream), literal.writers(reader)
        for writer in writers:
            m = mask[writer, reader]
            total = total + m * so_far.writers[writer] + (1 - m) * carried[writer]
        before = {writer.split(".")[0] for writer in writers}
        return total + sum(bias for name, bias in so_far.biases.items() if name in before)

    with torch.set_grad_enabled(literal.differentiable):
        return literal.run(inputs, see).logits


def literal_gradients(prepared: Prepared, mask: Tensor) -> Tensor:
    """`[batch, writers, readers]`: the gradient of each pair's surprise, by autograd through the split readers."""
    adapter, graph = prepared.adapter, prepared.adapter.graph
    literal, leaf = Literal(adapter.model, differentiable=True), mask.repeat(len(prepared.batch), 1, 1)
    leaf.requires_grad_(True)
    amounts = {ends_of(name): leaf[:, *graph.edge(name), None, None] for name in graph.names(graph.real)}
    carried = {name: output(adapter, prepared.ablated, u) for u, name in enumerate(graph.writer_names)}
    logits = soft_circuit(literal, prepared.batch.clean, amounts, carried)
    (gradient,) = torch.autograd.grad(surprise(logits).sum(), leaf)
    return gradient


@pytest.mark.parametrize(
    ("name", "ablation"),
    [(name, "corrupted") for name in FAMILIES] + [(name, other) for name in FAMILIES[:4] for other in ("zero", "mean")],
)
def test_masks_of_zeros_and_ones_are_circuits(
    name: str, ablation: str, adapter_of: Callable[..., Adapter], pairs: Batch
) -> None:
    adapter = adapter_of(name)
    prepared = prepared_for(adapter, pairs, ablation)
    draw = np.random.default_rng(3).random((4, *adapter.graph.real.shape))
    masks = adapter.graph.real & (draw < np.array([0.0, 0.2, 0.7, 2.0])[:, None, None])
    expected = run_circuits(prepared, masks)
    for mask, logits in zip(masks, expected, strict=True):
        assert off(run_masked(prepared, torch.from_numpy(mask).to(adapter.work)), logits) < 1e-5, mask.sum()
    assert off(expected[1], expected[2]) > 1e-3, "the circuits do not differ"


@pytest.mark.parametrize("name", FAMILIES)
def test_soft_masks_equal_the_literal_evaluation(name: str, adapter_of: Callable[..., Adapter], pairs: Batch) -> None:
    adapter = adapter_of(name)
    literal, graph, mask = Literal(adapter.model), adapter.graph, soft_mask(adapter)
    with torch.no_grad():
        carried = literal.run(pairs.corrupted).writers
    amounts = {(u, r): float(mask[graph.edge(f"{u}->{r}")]) for u, r in literal.edges()}
    expected = soft_circuit(literal, pairs.clean, amounts, carried)
    assert off(run_masked(prepare(adapter, pairs), mask), expected) < 1e-5


@pytest.mark.parametrize("name", FAMILIES)
def test_gradients_equal_finite_differences(name: str, adapter_of: Callable[..., Adapter]) -> None:
    adapter = adapter_of(name, dtype=torch.float64)  # its RMSNorms still compute in float32
    pairs = random_pairs(left=(0, 0), right=(0, 3))  # Gemma 2 itself is NaN in float64 with padding on the left
    prepared, real = prepare(adapter, pairs), torch.from_numpy(adapter.graph.real)
    mask = 0.2 + 0.6 * torch.rand(real.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    gradient = mask_gradient(prepared, mask, SURPRISE).gradient
    assert not gradient[~real].any()
    step, generator = 1e-3, np.random.default_rng(2)
    edges = torch.from_numpy(np.argwhere(adapter.graph.real))[generator.permutation(int(real.sum()))[:3]]
    for edge in [*edges, edges.new_tensor([0, 0]), None]:  # single edges, and all at once in a random direction
        way = torch.zeros_like(mask)
        if edge is None:
            way = torch.from_numpy(generator.choice([-1.0, 1.0], mask.shape))
        else:
            way[tuple(edge)] = 1
        high, low = (float(surprise(run_masked(prepared, mask + sign * step * way)).sum()) for sign in (1, -1))
        slope, expected = float((gradient * way)[real].sum()), (high - low) / (2 * step)
        assert slope == pytest.approx(expected, rel=2e-3, abs=1e-3 * float(gradient.abs().max()))


@pytest.mark.parametrize("name", FAMILIES)
def test_the_gradient_at_the_full_mask_is_eap(name: str, pairs: Batch) -> None:
    """Through a latent in float64: in float32, rounding alone reaches 1e-5 there."""
    model = build(name).to(torch.float64 if name == "youtu-direct" else torch.float32)
    adapter = cf.wrap(model, name=name, check=False).adapter
    ones = torch.ones(adapter.graph.real.shape, dtype=adapter.work)
    gradient = mask_gradient(prepare(adapter, pairs), ones, SURPRISE).gradient
    assert off(gradient, edge_scores(adapter, pairs)) < 1e-5


@pytest.mark.parametrize(
    ("name", "ablation"),
    [(name, "corrupted") for name in (*FAMILIES, "gemma3", "qwen2")]
    + [(name, other) for name in ("gpt2", "llama", "gpt_neox", "gemma3") for other in ("zero", "mean")],
)
def test_gradients_equal_autograd_through_split_readers(
    name: str, ablation: str, adapter_of: Callable[..., Adapter], pairs: Batch, monkeypatch
) -> None:
    """At a soft mask and at a circuit; of all edges, of the circuit's own and of any others; for each pair; with the
    writers one by one and 64 together."""
    adapter = adapter_of(name)
    prepared, real, generator = prepared_for(adapter, pairs, ablation), adapter.graph.real, np.random.default_rng(4)
    circuit, others = (real & (generator.random(real.shape) < part) for part in (0.3, 0.2))
    circuit[0, -1] = True  # so that it is never without a path
    hard = torch.from_numpy(np.where(real, circuit, 7.0)).to(adapter.work)
    for mask, wanted in ((soft_mask(adapter), [None, others]), (hard, [None, circuit, others, circuit | others])):
        expected = literal_gradients(prepared, mask)
        values = surprise(run_masked(prepared, mask))
        for only, together in product(wanted, (1, 64)):
            monkeypatch.setattr(masked_streams, "PANEL", together)
            edges = real if only is None else only
            found = mask_gradient(prepared, mask, SURPRISE, only)
            each, largest = pair_gradients(prepared, mask, SURPRISE, edges), float(expected.abs().max())
            wrong = found.gradient - expected.sum(0) * torch.from_numpy(edges)
            assert float(wrong.abs().max()) < 2e-5 * largest
            assert float((each.gradient - expected[:, *np.nonzero(edges)].T).abs().max()) < 2e-5 * largest
            assert off(found.values, values) < 1e-5 and off(each.values, values) < 1e-5


def test_nothing_outside_a_circuit_is_formed(adapter_of: Callable[..., Adapter], pairs: Batch, monkeypatch) -> None:
    made: list[masked_streams.Streams] = []

    class Watched(masked_streams.Streams):
        def __init__(self, *arguments: Any) -> None:
            super().__init__(*arguments)
            made.append(self)

    monkeypatch.setattr(masked_run, "Streams", Watched)
    adapter = adapter_of("llama")
    graph, ran = adapter.graph, []
    circuit = np.zeros_like(graph.real)
    # the last leads nowhere
    for name in ("input->a0.kv0<v>", "a0.h0->m1", "input->m1", "m1->logits", "input->a1.h2<q>"):
        circuit[graph.edge(name)] = True
    linears = {name: one for name, one in adapter.model.named_modules() if isinstance(one, torch.nn.Linear)}
    for path, module in linears.items():
        forward = module.forward
        monkeypatch.setattr(module, "forward", lambda x, f=forward, p=path: (ran.append(p), f(x))[1])
    found = mask_gradient(prepare(adapter, pairs), torch.from_numpy(circuit).float(), SURPRISE, circuit).gradient
    assert made[-1].written.shape[0] == 3 and len(made[-1].readers) == 3  # input, a0.h0, m1; a0.kv0<v>, m1, logits
    assert (found != 0).sum() == 4 and not found[graph.edge("input->a1.h2<q>")]
    masked = ran[ran.index("lm_head", ran.index("lm_head") + 1) + 1 :]  # after the clean and the corrupted run
    assert sorted({path.split(".mlp")[0] for path in masked}) == ["lm_head", "model.layers.1"]


def test_a_circuit_that_leads_nowhere_has_no_gradient(adapter_of: Callable[..., Adapter], pairs: Batch) -> None:
    adapter = adapter_of("gpt2")
    prepared, circuit = prepare(adapter, pairs), np.zeros_like(adapter.graph.real)
    circuit[adapter.graph.edge("input->m0")] = True
    found = mask_gradient(prepared, torch.from_numpy(circuit).float(), SURPRISE, circuit)
    assert not found.gradient.any() and off(found.values, surprise(prepared.empty.logits)) < 1e-5
    assert not pair_gradients(prepared, torch.from_numpy(circuit).float(), SURPRISE, circuit).gradient.any()


def test_a_graph_that_is_kept_can_be_gone_back_twice(adapter_of: Callable[..., Adapter], pairs: Batch) -> None:
    adapter = adapter_of("llama")
    mask = soft_mask(adapter).requires_grad_(True)
    metric = surprise(run_masked(prepare(adapter, pairs), mask)).sum()
    first, second = (torch.autograd.grad(metric, mask, retain_graph=True)[0] for _ in range(2))
    assert torch.equal(first, second) and first.any()


def test_buffers_are_let_go_of(adapter_of: Callable[..., Adapter], pairs: Batch, monkeypatch) -> None:
    left: list[weakref.ref] = []
    made = masked_streams.Streams.__init__

    def watched(streams: masked_streams.Streams, *arguments: Any) -> None:
        made(streams, *arguments)
        left.append(weakref.ref(streams))

    monkeypatch.setattr(masked_streams.Streams, "__init__", watched)
    adapter = adapter_of("llama")
    prepared, mask = prepare(adapter, pairs), soft_mask(adapter)
    gc.disable()
    try:
        mask_gradient(prepared, mask, SURPRISE)
        surprise(run_masked(prepared, mask.requires_grad_(True))).sum().backward()
        assert len(left) == 2 and all(streams() is None for streams in left)
    finally:
        gc.enable()


def test_gates_of_nodes_are_rows_and_their_gradient_is_attribution_patching() -> None:
    from toys import id_task, wrapped

    model = wrapped("llama")
    bound = id_task().on(model)
    prepared = prepare(model.adapter, bound.batch)
    gates = torch.ones(model.graph.n_writers, requires_grad=True)
    logits = run_masked(prepared, gates[:, None].expand(-1, model.graph.n_readers))
    (gradient,) = torch.autograd.grad(bound.metric(logits, bound.batch).mean(), gates)
    assert off(gradient, torch.from_numpy(cf.attribute(model, bound, "atp", level="node").values)) < 1e-5


def test_gradients_flow_through_later_layers_and_not_to_the_weights(adapter_of, pairs: Batch) -> None:
    adapter = adapter_of("gpt2")
    adapter.model.requires_grad_(True)
    mask = torch.full(adapter.graph.real.shape, 0.5, requires_grad=True)
    surprise(run_masked(prepare(adapter, pairs), mask)).sum().backward()
    assert mask.grad is not None and (mask.grad[0, : adapter.graph.n_heads] != 0).all()  # the first layer's queries
    assert all(parameter.grad is None for parameter in adapter.model.parameters())


def test_the_model_is_left_as_it_was(adapter_of: Callable[..., Adapter], pairs: Batch) -> None:
    adapter = adapter_of("gemma2")
    model, prepared = adapter.model, prepare(adapter, pairs)
    model.requires_grad_(True).train()
    next(model.parameters()).requires_grad_(False)

    def found() -> list:
        modules = list(model.modules())
        hooks = [(len(m._forward_hooks), len(m._forward_pre_hooks), m.training, "forward" in vars(m)) for m in modules]
        return [*hooks, *((p.requires_grad, p.grad, p._version) for p in model.parameters())]

    before = found()
    mask_gradient(prepared, soft_mask(adapter), SURPRISE)
    assert found() == before
    with pytest.raises(RuntimeError, match="stop here"):
        mask_gradient(prepared, soft_mask(adapter), Metric("broken", _fail))
    assert found() == before
    model.eval()


def _fail(logits: Tensor, batch: Batch) -> Tensor:
    raise RuntimeError("stop here")


def test_the_same_position_read_twice_counts_twice(adapter_of: Callable[..., Adapter]) -> None:
    batch = random_pairs((0, 0), (0, 0))
    once = Batch(*(Inputs(s.ids, s.mask, s.read[:, :1]) for s in (batch.clean, batch.corrupted)), batch.answers[:, :1],
                 batch.wrong[:, :1])  # fmt: skip
    twice = once.map(lambda s: Inputs(s.ids, s.mask, s.read.repeat(1, 2)), lambda value: value.repeat(1, 2, 1))
    adapter = adapter_of("llama")
    mask = soft_mask(adapter)
    one, two = (mask_gradient(prepare(adapter, b), mask, SURPRISE).gradient for b in (once, twice))
    assert off(two, 2 * one) < 1e-5


def test_half_precision_keeps_small_gradients(adapt: Callable[..., Adapter], pairs: Batch) -> None:
    adapter = adapt(build("gpt2", dtype=torch.float16))
    prepared, mask = prepare(adapter, pairs), soft_mask(adapter)
    small = Metric("small", lambda logits, batch: 1e-7 * surprise(logits))
    found, tiny = (mask_gradient(prepared, mask, metric).gradient for metric in (SURPRISE, small))
    exact = adapt(build("gpt2"))
    expected = mask_gradient(prepare(exact, pairs), mask, SURPRISE).gradient
    assert off(found, expected) < 0.03 and off(1e7 * tiny, found) < 0.01


def test_masks_and_metrics_that_cannot_be_used(adapter_of: Callable[..., Adapter], pairs: Batch) -> None:
    adapter = adapter_of("gpt2")
    prepared = prepare(adapter, pairs)
    with pytest.raises(cf.ScoreError, match="mask has shape"):
        run_masked(prepared, torch.ones(3, 4))
    argmax = Metric("argmax", lambda logits, batch: logits.argmax(-1).double().sum(-1))
    with pytest.raises(cf.ScoreError, match="'argmax' does not depend on the logits in a differentiable way"):
        mask_gradient(prepared, soft_mask(adapter), argmax)
