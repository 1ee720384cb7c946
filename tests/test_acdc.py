"""ACDC's fast path makes the literal loop's decisions: one whole circuit run for every edge that is tried."""

from __future__ import annotations

from functools import cache

import numpy as np
import pytest
import torch
from families import build

import circuitfind as cf
from circuitfind.evaluation.faithfulness import Evaluator
from circuitfind.search.acdc_rule import ORDERS, edges_in_order

FAMILIES = ("gpt2", "llama", "gpt_neox", "gemma2")


def some_pairs(seed: int = 0, n: int = 4) -> cf.Task:
    clean, corrupted = torch.randint(3, 128, (2, n, 7), generator=torch.Generator().manual_seed(seed))
    return cf.Task(clean, corrupted, list(range(3, 3 + n)), list(range(20, 20 + n)))


def literal(model: cf.Model, task: cf.Task, threshold: float, edges: list, absolute: bool = False, **options) -> tuple:
    """The textbook loop: run the whole circuit without the edge, keep it out if the metric falls by less."""
    evaluator = Evaluator.of(model, task, **options)
    mask = model.graph.real.copy()
    current = evaluator.run(mask[None]).metric[0].mean()
    effects = {}
    for edge in edges:
        mask[edge] = False
        after = evaluator.run(mask[None]).metric[0].mean()
        effects[edge] = effect = current - after
        if (abs(effect) if absolute else effect) < threshold:
            current = after
        else:
            mask[edge] = True
    return mask, effects


def literal_masks(
    model: cf.Model, task: cf.Task, thresholds: list[float], edges: list, absolute: bool = False, **options
) -> list[np.ndarray]:
    """What `literal` leaves at each of several thresholds: its loops, whose circuits run side by side."""
    evaluator = Evaluator.of(model, task, **options)
    masks = np.repeat(model.graph.real[None], len(thresholds), axis=0)
    current = evaluator.run(masks).metric.mean(-1)
    for writer, reader in edges:
        masks[:, writer, reader] = False
        after = evaluator.run(masks).metric.mean(-1)
        effects = current - after
        goes = (np.abs(effects) if absolute else effects) < thresholds
        masks[:, writer, reader] = ~goes
        current = np.where(goes, after, current)
    return list(masks)


def telling(model: cf.Model, task: cf.Task, **options) -> float:
    """A threshold that splits the edges: below it go most, but not all."""
    effects = cf.attribute(model, task, "exact", **options).values[model.graph.real]
    return max(float(np.quantile(effects, 0.7)), 2e-4)


def equal(circuit: cf.Circuit, mask: np.ndarray) -> None:
    """The same decisions, and real ones: some edges stayed and some went."""
    assert np.array_equal(circuit.mask, mask)
    assert 0 < len(circuit) < circuit.graph.n_edges


@pytest.fixture(scope="module")
def model_of():
    """Of two heads a layer, because the literal loop runs the whole model for each edge; None: of four."""
    return cache(lambda name, heads=2: cf.wrap(build(name, heads=heads), backend="hooks"))


@pytest.mark.parametrize("name", FAMILIES)
def test_decisions_equal_the_literal_loop(name, model_of):
    model, task = model_of(name, None if name == "llama" else 2), some_pairs()  # of llama two key/value heads
    edges = edges_in_order(model.graph, "reverse-topological")
    threshold = telling(model, task, metric="kl")
    mask, effects = literal(model, task, threshold, edges, metric="kl")
    close = [e for e, effect in effects.items() if abs(effect - threshold) < 1e-6]
    assert not close, "choose another seed: a decision is too close to call"
    for side_by_side in (1, 4):
        circuit = cf.acdc(model, task, threshold, metric="kl", side_by_side=side_by_side)
        equal(circuit, mask)
        assert circuit.exact is not None
        for edge, effect in effects.items():
            assert circuit.exact[edge] == pytest.approx(effect, abs=2e-5)


@pytest.mark.parametrize("order", [name for name in ORDERS if name != "scores"])
def test_every_order_equals_the_literal_loop_in_that_order(order, model_of):
    model, task = model_of("gpt2"), some_pairs(1)
    edges = edges_in_order(model.graph, order, seed=3)
    assert sorted(edges) == sorted((int(u), int(r)) for u, r in np.argwhere(model.graph.real))
    threshold = telling(model, task)
    mask, _ = literal(model, task, threshold, edges)
    equal(cf.acdc(model, task, threshold, metric=None, order=order, seed=3), mask)


def test_orders_differ_and_are_seeded(model_of):
    graph = model_of("gpt2").graph
    orders = {name: edges_in_order(graph, name, 1) for name in ORDERS if name != "scores"}
    assert len({tuple(edges) for edges in orders.values()}) == len(orders)
    assert edges_in_order(graph, "shuffled", 1) == orders["shuffled"] != edges_in_order(graph, "shuffled", 2)


def test_order_by_scores_starts_with_the_weakest_edge(model_of):
    model, task = model_of("gpt2"), some_pairs(1)
    scores = cf.attribute(model, task, "eap")
    edges = edges_in_order(model.graph, "scores", scores=scores)
    magnitudes = [abs(scores.values[edge]) for edge in edges]
    assert magnitudes == sorted(magnitudes)
    threshold = telling(model, task)
    mask, _ = literal(model, task, threshold, edges)
    equal(cf.acdc(model, task, threshold, metric=None, order="scores", scores=scores), mask)


@pytest.mark.parametrize("ablation", ("zero", "mean"))
def test_other_ablations_equal_the_literal_loop(ablation, model_of):
    model, task = model_of("gpt2"), some_pairs(2)
    edges = edges_in_order(model.graph, "reverse-topological")
    threshold = telling(model, task, ablation=ablation)
    mask, _ = literal(model, task, threshold, edges, ablation=ablation)
    equal(cf.acdc(model, task, threshold, metric=None, ablation=ablation), mask)


def test_the_absolute_rule_keeps_edges_that_oppose(model_of):
    model, task = model_of("gpt2"), some_pairs(3)
    edges = edges_in_order(model.graph, "reverse-topological")
    mask, effects = literal(model, task, 0.004, edges, absolute=True)
    circuit = cf.acdc(model, task, 0.004, metric=None, absolute=True)
    equal(circuit, mask)
    assert any(effects[edge] < -0.004 for edge in zip(*np.nonzero(mask), strict=True))


def test_several_batches_decide_as_one(model_of):
    model, task = model_of("llama"), some_pairs(n=6)
    threshold = telling(model, task)
    equal(cf.acdc(model, task, threshold, metric=None, batch_size=2), cf.acdc(model, task, threshold, metric=None).mask)


def test_an_edge_whose_effect_equals_the_threshold_is_kept(model_of):
    """Strictly less: edges without any effect stay at threshold 0 and go at any above it."""
    model, task = model_of("gpt2"), some_pairs()
    first = edges_in_order(model.graph, "reverse-topological")[0]
    name = model.graph.edge_name(*first)
    effect = cf.acdc(model, task, 1e9, metric=None, order=[name]).exact[first]
    evaluator = Evaluator.of(model, task)
    mask = model.graph.real.copy()
    mask[first] = False
    assert effect == pytest.approx(float((evaluator.full - evaluator.run(mask[None]).metric[0]).mean()), abs=1e-5)
    dead = cf.acdc(model, task, 1e9, metric=None)
    assert len(dead) == 0 and dead.facts["decided_without_a_run"] > 0
    kept = cf.acdc(model, task, 0.0, metric=None, order=[name])
    assert (name in kept) == (effect >= 0)


def test_edges_without_any_effect_stay_at_threshold_zero(model_of):
    """0 < 0 is false: a metric that nothing changes prunes nothing."""
    model, task = model_of("gpt2"), some_pairs()
    order = [name for name in cf.Circuit.full(model.graph).edges if name.endswith("->logits")]
    always = lambda logits, batch: logits.new_zeros(len(batch)) + 0 * logits.sum(-1)  # noqa: E731
    circuit = cf.acdc(model, task, 0.0, metric=always, order=order)
    assert len(circuit) == model.graph.n_edges


def test_unknown_orders_and_missing_scores_are_refused(model_of):
    model, task = model_of("gpt2"), some_pairs()
    with pytest.raises(cf.ScoreError, match="order 'alphabetical' is unknown"):
        cf.acdc(model, task, order="alphabetical")
    with pytest.raises(cf.ScoreError, match="needs scores="):
        cf.acdc(model, task, order="scores")


@pytest.mark.slow
@pytest.mark.shared
def test_the_reference_sets_edge_for_edge(shared):
    import json

    folder = shared / "conformance"
    content = json.loads((folder / "gpt2-tiny" / "data_n8.json").read_text())
    reference = json.loads((folder / "acdc" / "tiny_n8_block_order.json").read_text())
    model = cf.load(str(folder / "gpt2-tiny"), backend="hooks")
    ids = [torch.tensor(content[side]) for side in ("clean", "corrupted")]
    task = cf.Task(*ids, content["answer"], content["wrong"])
    kept, thresholds = {float(key): value for key, value in reference["kept"].items()}, [0.001, 0.01, 0.1]
    edges = [model.graph.edge(name) for name in reference["order"]]
    for threshold in thresholds:
        circuit = cf.acdc(model, task, threshold, metric="kl", order=reference["order"])
        assert set(circuit.edges) == set(kept[threshold]), threshold
    (literal,) = literal_masks(model, task, [0.01], edges, metric="kl")
    assert set(model.graph.names(literal)) == set(kept[0.01]), "the twin of the other tests is not the reference's loop"
