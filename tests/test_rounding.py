"""What counts as rounding: more than two computations of one circuit differ by, for every metric, and not much more."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache

import numpy as np
import pytest
import torch
from families import build
from helpers import run_circuits_traced
from torch import Tensor
from toys import FOUR, contrast, id_task, wrapped

import circuitfind as cf
from circuitfind.batch import Batch
from circuitfind.errors import ScoreError
from circuitfind.evaluation import rounding
from circuitfind.evaluation.faithfulness import Evaluator
from circuitfind.metrics import METRICS, metric_of
from circuitfind.search.acdc_rule import Rule


def thousandfold(logits: Tensor, batch: Batch) -> Tensor:
    """A metric of the user's, large in numbers."""
    return 1000 * logits.log_softmax(-1).gather(-1, batch.answers[:, 0, :1]).squeeze(-1)


def hit(logits: Tensor, batch: Batch) -> Tensor:
    """One that goes in steps."""
    return logits.argmax(-1) == 5


def from_numpy(logits: Tensor, batch: Batch) -> Tensor:
    """One that leaves torch, which a tensor with a gradient may not."""
    return torch.from_numpy(logits.numpy()[:, 5] - logits.numpy()[:, 6])


ALL = [*METRICS, thousandfold]
LENGTHS = (7, 5, 6, 7)


def masks(graph: cf.Graph) -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    return [graph.real & (rng.random(graph.real.shape) < share) for share in (1, 0.9, 0.6, 0.3)]


@pytest.mark.parametrize("metric", ALL)
@pytest.mark.parametrize("name", ["gpt2", "llama", "gpt_neox"])
def test_two_computations_of_one_circuit_differ_by_no_more(name: str, metric: str | Callable) -> None:
    evaluator = Evaluator.of(wrapped(name), id_task(LENGTHS), metric=metric)
    (prepared,) = evaluator.prepared()
    for mask in masks(evaluator.graph):
        bound = evaluator.rounding(mask)
        one, other = (
            evaluator.bound.metric(run_circuits_traced(prepared, mask[None], sparse)[0], prepared.batch).double()
            for sparse in (True, False)
        )
        assert ((one - other).abs().numpy() <= bound).all()
        effects = evaluator.full - evaluator.empty
        assert rounding.of_mean(bound) <= bound.max() < 0.02 * np.abs(effects).max(), "and it hides no effect"


@pytest.mark.parametrize("metric", ALL)
def test_the_bound_holds_for_any_errors_of_the_logits_and_is_of_their_order(metric: str | Callable) -> None:
    """Errors as large as allowed, of the worst signs and of random ones, in float64, where arithmetic adds none."""
    model = wrapped("llama", torch.float64)
    evaluator = Evaluator.of(model, id_task(LENGTHS), metric=metric)
    (prepared,) = evaluator.prepared()
    batch, function = prepared.batch, evaluator.bound.metric
    for logits in (prepared.clean.logits, prepared.empty.logits):
        found = rounding.parts(function, logits, (prepared.clean.logits, prepared.empty.logits), batch, torch.bfloat16)
        bound, off = torch.from_numpy(found.bound()), torch.from_numpy(found.logits)
        assert torch.equal(off, 2 * 2**-7 * logits.abs().amax((1, 2)))
        at = logits.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(function(at, batch).sum(), at)
        worst = gradient.sign()
        random = [torch.randn(logits.shape, generator=torch.Generator().manual_seed(n)).sign() for n in range(20)]
        changes = [
            (function(logits + off[:, None, None] * sign, batch) - function(logits, batch)).abs()
            for sign in (worst, -worst, *random)
        ]
        assert all((change <= bound).all() for change in changes)
        if metric in ("logit_diff", "logprob"):  # the others bend, or are steeper elsewhere
            assert (torch.stack(changes).amax(0) > 0.9 * bound).all()


def test_the_slopes_are_those_of_the_documentation() -> None:
    evaluator = Evaluator.of(wrapped("gpt2"), id_task(LENGTHS))
    (prepared,) = evaluator.prepared()
    batch, clean, empty = prepared.batch, prepared.clean.logits, prepared.empty.logits
    assert torch.allclose(rounding.slopes(METRICS["logit_diff"], empty, batch), torch.tensor(2.0))
    assert (rounding.slopes(METRICS["prob_diff"], empty, batch) <= 1).all()
    assert (rounding.slopes(METRICS["logprob"], empty, batch) <= 2).all()
    p, q = clean.softmax(-1), empty.softmax(-1)
    expected = (p - q).abs().sum((1, 2))
    torch.testing.assert_close(rounding.slopes(METRICS["kl"], empty, batch), expected)
    assert (rounding.slopes(METRICS["kl"], clean, batch) < 1e-5).all()
    for metric in (hit, from_numpy):
        assert not rounding.slopes(metric_of(metric), empty, batch).any()


def test_near_0_a_metric_has_the_rounding_of_its_logits() -> None:
    """And in its units: a thousandfold metric has a thousandfold bound."""
    evaluator = Evaluator.of(wrapped("gpt2"), id_task(LENGTHS), metric="kl")
    eps = torch.finfo(torch.float32).eps
    assert np.abs(evaluator.full).max() < 1e-6
    assert (evaluator.rounding(evaluator.graph.real) > 2 * eps * 2 * math.log(128)).all()
    plain, large = (
        Evaluator.of(wrapped("gpt2"), id_task(LENGTHS), metric=metric).rounding(evaluator.graph.real)
        for metric in (lambda logits, batch: thousandfold(logits, batch) / 1000, thousandfold)
    )
    np.testing.assert_allclose(large, 1000 * plain, rtol=1e-4)


@pytest.mark.parametrize("metric", [hit, from_numpy])
def test_a_metric_without_gradient_is_rounded_as_its_value_is(metric: Callable) -> None:
    evaluator = Evaluator.of(wrapped("gpt2"), id_task(LENGTHS), metric=metric)
    bound = evaluator.rounding(evaluator.graph.real)
    np.testing.assert_allclose(bound, 2 * torch.finfo(torch.float32).eps * np.abs(evaluator.full), rtol=1e-5)


@cache
def deaf(name: str) -> cf.Model:
    """A model whose head a1.h1 writes nothing, though its inputs lead to the logits."""
    hf = build(name)
    block = (hf.transformer.h if name == "gpt2" else hf.model.layers)[1]
    width = hf.config.hidden_size // 4
    with torch.no_grad():
        if name == "gpt2":
            block.attn.c_proj.weight[width : 2 * width] = 0
        else:
            block.self_attn.o_proj.weight[:, width : 2 * width] = 0
    return cf.wrap(hf, None, name=name)


@pytest.mark.parametrize(("name", "metric"), [*(("gpt2", metric) for metric in ALL), ("llama", "kl")])
def test_edges_into_a_head_that_writes_nothing_are_superfluous(name: str, metric: str | Callable) -> None:
    model = deaf(name)
    edges = cf.Circuit.full(model.graph).edges
    found = {
        one.name: one for one in cf.minimality(model, contrast(2, (7, 5, 6, 7) * 16, metric, model=model), edges).edges
    }
    silent = [one for edge, one in found.items() if edge.endswith("->a1.h1<q>")]
    assert len(silent) > 3 and all(one.superfluous for one in silent)
    assert sum(not one.superfluous for one in found.values()) > 10


def test_a_contrast_within_rounding_is_none() -> None:
    """The corrupted prompts differ in a token whose embedding is the same but for the last digits."""
    hf = build("gpt2")
    task = id_task((7,), metric="kl")
    task.corrupted[:] = task.clean
    task.corrupted[0, 3] = 127 if task.clean[0, 3] != 127 else 126
    with torch.no_grad():
        wte = hf.transformer.wte.weight
        wte[task.corrupted[0, 3]] = wte[task.clean[0, 3]] * (1 + 2**-22)
    evaluator = Evaluator.of(cf.wrap(hf, None), task)
    assert evaluator.full.mean() != evaluator.empty.mean(), "the test needs two runs that differ in last digits"
    with pytest.raises(ScoreError, match=r"within noise \(standard error 0, rounding \de-0\d, 1 examples\)"):
        evaluator.check_contrast()


def test_decisions_of_acdc_within_rounding_are_listed() -> None:
    model, task = wrapped("gpt2"), id_task(LENGTHS)
    plain = cf.acdc(model, task, 0.01, metric="logit_diff")
    assert not plain.facts["close_calls"]
    u, v = np.argwhere(np.abs(plain.exact) > 0.01)[0]
    exactly = float(plain.exact[u, v])
    rule = Rule(exactly)
    assert rule.close(exactly + 1.9e-5, 1e-5), "both metrics of the difference are rounded"
    assert rule.close(exactly - 1e-5, 1e-5) and not rule.close(exactly + 3e-5, 1e-5) and not rule.close(math.nan, 1)


@pytest.mark.parametrize("name", FOUR)
def test_half_precision_has_its_own_units(name: str) -> None:
    for dtype in (torch.bfloat16, torch.float16):
        evaluator = Evaluator.of(wrapped(name, dtype), id_task(LENGTHS), metric="kl")
        (prepared,) = evaluator.prepared()
        for mask in masks(evaluator.graph):
            metrics = [
                evaluator.bound.metric(run_circuits_traced(prepared, mask[None], sparse)[0], prepared.batch)
                for sparse in (True, False)
            ]
            assert ((metrics[0] - metrics[1]).abs().numpy() <= evaluator.rounding(mask)).all()
