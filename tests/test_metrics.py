"""Metrics as numbers, against loops in plain Python."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from helpers import random_pairs
from torch import Tensor

from circuitfind.batch import Batch, Inputs, log_probabilities
from circuitfind.errors import TaskError
from circuitfind.metrics import METRICS, correctness, metric_of

VOCAB = 128
SIZE = 4


@pytest.fixture()
def batch() -> Batch:
    """Four pairs, two read positions, two answers each; some answer sets hold one token only."""
    batch = random_pairs((0,) * SIZE, (0,) * SIZE)
    batch.answers[2, :, 1] = -1
    return batch


@pytest.fixture()
def logits() -> Tensor:
    return torch.randn(SIZE, 2, VOCAB, generator=torch.Generator().manual_seed(1)) * 3


@pytest.mark.parametrize("spread", [1.0, 4.0, 8.0])
def test_a_large_vocabulary_costs_no_digits(spread: float) -> None:
    """Gemma's 262,144 tokens, against float64: torch's float32 `log_softmax` is off by up to 7e-5."""
    generator, size = torch.Generator().manual_seed(0), (2, 1, 262_144)
    clean = torch.randn(size, generator=generator) * spread + 10
    logits = clean + torch.randn(size, generator=generator) / 2
    answers = clean.argmax(-1, keepdim=True)
    wrong = torch.randint(0, size[-1], (2, 1, 2), generator=generator)
    inputs = Inputs(answers[..., 0], answers[..., 0] >= 0, answers[..., 0])
    pairs = Batch(inputs, inputs, answers, wrong)
    for name in ("logprob", "prob_diff", "kl"):
        single = METRICS[name](logits, pairs.with_reference(clean))
        double = METRICS[name](logits.double(), pairs.with_reference(clean.double()))
        assert single.dtype == torch.float32
        torch.testing.assert_close(single.double(), double, rtol=0, atol=1e-6)
        assert bool((METRICS["kl"](clean, pairs.with_reference(clean)) == 0).all())
    torch.testing.assert_close(
        log_probabilities(logits).double(), logits.double().log_softmax(-1), rtol=2e-7, atol=1e-6
    )


def listed(ids: Tensor) -> list[int]:
    return [token for token in ids.tolist() if token >= 0]


def softmax(row: Tensor) -> list[float]:
    weights = [math.exp(value) for value in row.tolist()]
    return [weight / sum(weights) for weight in weights]


def by_loops(name: str, logits: Tensor, batch: Batch, reference: Tensor | None = None) -> list[float]:
    """The definitions of DESIGN, one example and one read position at a time."""
    values = []
    for example in range(len(batch)):
        total = 0.0
        for read in range(logits.shape[1]):
            row = logits[example, read]
            p, right, wrong = softmax(row), listed(batch.answers[example, read]), listed(batch.wrong[example, read])
            if name == "logit_diff":
                total += sum(float(row[t]) for t in right) / len(right) - sum(float(row[t]) for t in wrong) / len(wrong)
            elif name == "prob_diff":
                total += sum(p[t] for t in right) - sum(p[t] for t in wrong)
            elif name == "logprob":
                total += math.log(sum(p[t] for t in right))
            else:
                clean = softmax(reference[example, read])
                total -= sum(c * (math.log(c) - math.log(q)) for c, q in zip(clean, p, strict=True))
        values.append(total / logits.shape[1])
    return values


@pytest.mark.parametrize("name", METRICS)
def test_metrics_are_their_definitions(name: str, batch: Batch, logits: Tensor) -> None:
    clean = torch.randn(SIZE, 2, VOCAB, generator=torch.Generator().manual_seed(2))
    value = metric_of(name)(logits, batch.with_reference(clean))
    assert value.tolist() == pytest.approx(by_loops(name, logits, batch, clean), rel=1e-4, abs=1e-5)


@pytest.mark.parametrize("name", METRICS)
def test_padding_of_answer_sets_has_no_gradient(name: str, batch: Batch, logits: Tensor) -> None:
    """-1 is an index too: it must neither count nor leak."""
    batch = replace(batch, answers=torch.tensor([[[5, -1]] * 2] * SIZE)).with_reference(logits.roll(1, 0))
    logits.requires_grad_()
    gradient = torch.autograd.grad(metric_of(name)(logits, batch).sum(), logits)[0]
    assert gradient.isfinite().all()
    if name == "logit_diff":
        untouched = torch.ones(SIZE, 2, VOCAB, dtype=torch.bool)
        for ids in (batch.answers, batch.wrong):
            untouched = untouched.scatter(-1, ids.clamp(min=0).where(ids >= 0, ids[..., :1]), False)
        assert not gradient[untouched].any()


def test_higher_means_more_of_the_behaviour(batch: Batch, logits: Tensor) -> None:
    batch = batch.with_reference(logits)
    better = logits.clone()
    for example in range(SIZE):
        for read in range(2):
            better[example, read, listed(batch.answers[example, read])] += 2
    for name in ("logit_diff", "prob_diff", "logprob"):
        assert (metric_of(name)(better, batch) > metric_of(name)(logits, batch)).all()
    assert (metric_of("kl")(better, batch) < 0).all()


def test_kl_is_zero_and_flat_at_the_clean_run(batch: Batch, logits: Tensor) -> None:
    batch = batch.with_reference(logits)
    logits.requires_grad_()
    value = metric_of("kl")(logits, batch)
    assert value.abs().max() < 1e-6
    assert torch.autograd.grad(value.sum(), logits)[0].abs().max() < 1e-6
    assert METRICS["kl"].flat_at_clean and not any(METRICS[n].flat_at_clean for n in METRICS if n != "kl")


def test_half_precision_logits_are_summed_in_float32(batch: Batch, logits: Tensor) -> None:
    for name in ("prob_diff", "logprob", "kl"):
        half = logits.to(torch.bfloat16)
        value = metric_of(name)(half, batch.with_reference(half.roll(1, 0)))
        assert value.dtype == torch.float32
        assert torch.allclose(value, metric_of(name)(half.float(), batch.with_reference(half.roll(1, 0).float())))


def test_a_callable_is_a_metric(batch: Batch, logits: Tensor) -> None:
    shapes = []

    def first_logit(logits: Tensor, batch: Batch) -> Tensor:
        shapes.append(tuple(logits.shape))
        return logits.flatten(1)[:, 0]

    metric = metric_of(first_logit)
    assert metric.name == "first_logit"
    assert torch.equal(metric(logits, batch), logits[:, 0, 0])
    assert torch.equal(metric(logits[:, :1], batch), logits[:, 0, 0])
    assert shapes == [(SIZE, 2, VOCAB), (SIZE, VOCAB)]  # one read position: no axis for it
    assert metric_of(metric) is metric


def test_wrong_shapes_and_names_are_refused(batch: Batch, logits: Tensor) -> None:
    def summed(logits: Tensor, batch: Batch) -> Tensor:
        return logits.sum()

    with pytest.raises(TaskError, match=r"metric 'summed' returned shape \[\]: one number per example is needed"):
        metric_of(summed)(logits, batch)
    with pytest.raises(TaskError, match=r"returned a float: one number per example is needed, a tensor \[4\]"):
        metric_of(lambda logits, batch: 1.0)(logits, batch)
    message = r"metric 'logitdiff' is unknown: did you mean 'logit_diff'\? Known: logit_diff, prob_diff, logprob, kl"
    with pytest.raises(TaskError, match=message):
        metric_of("logitdiff")


def test_what_a_metric_needs_is_declared() -> None:
    needs = {name: (metric.answers, metric.wrong, metric.reference) for name, metric in METRICS.items()}
    assert needs == {
        "logit_diff": (True, True, False),
        "prob_diff": (True, True, False),
        "logprob": (True, False, False),
        "kl": (False, False, True),
    }


def test_correctness_is_its_definition(batch: Batch, logits: Tensor) -> None:
    logits[0, :, batch.answers[0, 0, 0]] += 20  # right at one read position only
    for read in range(2):
        logits[1, read, batch.answers[1, read, 0]] += 20  # right at both
    accurate, top1 = correctness(logits, batch)
    for example in range(SIZE):
        rows = [softmax(logits[example, read]) for read in range(2)]
        right = [listed(batch.answers[example, read]) for read in range(2)]
        wrong = [listed(batch.wrong[example, read]) for read in range(2)]
        better = [sum(p[t] for t in r) > sum(p[t] for t in w) for p, r, w in zip(rows, right, wrong, strict=True)]
        likeliest = [p.index(max(p)) in r for p, r in zip(rows, right, strict=True)]
        assert (bool(accurate[example]), bool(top1[example])) == (all(better), all(likeliest))
    assert accurate[1] and top1[1] and not top1[0]


def test_an_answer_that_ties_with_a_wrong_one_is_not_accurate(batch: Batch, logits: Tensor) -> None:
    row = batch.rows(slice(1))
    row = replace(row, answers=torch.tensor([[[3], [4]]]), wrong=torch.tensor([[[5, 6], [7, -1]]]))
    tied = logits[:1].clone()
    tied[0, 0, [3, 5]], tied[0, 0, 6], tied[0, 1, 4], tied[0, 1, 7] = 2.0, 1.0, 3.0, 1.0
    assert not correctness(tied, row).accurate[0]
    tied[0, 0, 3] += 0.01
    assert correctness(tied, row).accurate[0]


def test_without_wrong_answers_accuracy_is_top1(batch: Batch, logits: Tensor) -> None:
    alone = replace(batch, wrong=batch.wrong[..., :0])
    logits[1, [0, 1], batch.answers[1, :, 1]] += 20
    accurate, top1 = correctness(logits, alone)
    assert torch.equal(accurate, top1) and top1.tolist()[1]
