"""Metrics: one number per example that measures how well the model does the task; higher is better.

With `A` the answers, `W` the wrong answers and `p` the softmax of the logits at the read position:

* `logit_diff`: mean logit over A - mean logit over W.
* `prob_diff`: sum of p over A - sum of p over W (Hanna et al. 2023, greater-than).
* `logprob`: log of the sum of p over A.
* `kl`: -KL(clean run || this run): 0 at the clean run, negative elsewhere. Its gradient at the clean run is zero.

Values at several read positions of an example are averaged; those of an answer's tokens (`answer="all"`) are summed. A
callable `(logits, batch) -> [batch]` is a metric, too. It gets logits `[batch, vocab]` (`[batch, reads, vocab]` with
several read positions), through which gradients flow. `register` adds a `Metric` by its name.

A metric may read these attributes of `batch` (`circuitfind.batch.Batch`, the pairs of this pass):

* `answers`, `wrong` `[batch, reads, answers]`: token ids, padded with -1; `[batch, reads, 0]` if the task has none.
* `clean`, `corrupted`: the prompts, each with `ids [batch, pos]`, `mask [batch, pos]` (False at padding) and `read
  [batch, reads]`, the positions of the logits.
* `reference` `[batch, reads, vocab]`: log probabilities of the clean run, for a `Metric` with `reference=True`.
* `summed` `[batch, reads]`: with `answer="all"` true at the answer's tokens, false at padding; else None.
* `over_reads(values)`: values `[batch, reads]` averaged or summed to `[batch]`, as in the built-in metrics.
* `len(batch)`: the number of pairs.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from circuitfind.batch import Batch, log_probabilities, wide
from circuitfind.errors import NoFile, TaskError, entered, unknown

Function = Callable[[Tensor, Batch], Tensor]


@dataclass(frozen=True)
class Metric(NoFile):
    """A named metric.

    Attributes:
        function: `(logits [batch, reads, vocab], batch) -> [batch]`.
        answers, wrong: the task must have answers, or wrong answers.
        reference: the metric compares with the clean run; the batch then holds `reference`.
        flat_at_clean: its gradient at the clean run is zero by construction.
        steepest: an upper bound on the sum of |d metric / d logit| over an example's logits; None if not known.
    """

    name: str
    function: Function
    answers: bool = True
    wrong: bool = False
    reference: bool = False
    flat_at_clean: bool = False
    steepest: float | None = None

    def __call__(self, logits: Tensor, batch: Batch) -> Tensor:
        """Return the values `[batch]` for logits `[batch, reads, vocab]`. TaskError if they have another shape."""
        value = self.function(logits, batch)
        if not isinstance(value, Tensor) or value.shape != (len(batch),):
            what = f"shape {list(value.shape)}" if isinstance(value, Tensor) else f"a {type(value).__name__}"
            needed = f"one number per example is needed, a tensor [{len(batch)}]"
            raise TaskError(f"metric '{self.name}' returned {what}: {needed}")
        return value if value.is_floating_point() else value.float()


def _gather(logits: Tensor, ids: Tensor) -> Tensor:
    """Return the values of the listed tokens, `[batch, reads, answers]`; at padding, the value of token 0."""
    return logits.gather(-1, ids.clamp(min=0))


def _mean_of(values: Tensor, ids: Tensor) -> Tensor:
    real = ids >= 0
    return (values * real).sum(-1) / real.sum(-1)


def _log_sum_of(logprobs: Tensor, ids: Tensor) -> Tensor:
    """Return the log of the listed tokens' summed probability."""
    return _gather(logprobs, ids).masked_fill(ids < 0, -torch.inf).logsumexp(-1)


def logit_diff(logits: Tensor, batch: Batch) -> Tensor:
    """Mean logit of the answers minus mean logit of the wrong answers."""
    logits = wide(logits)
    right, wrong = (_mean_of(_gather(logits, ids), ids) for ids in (batch.answers, batch.wrong))
    return batch.over_reads(right - wrong)


def prob_diff(logits: Tensor, batch: Batch) -> Tensor:
    """Summed probability of the answers minus that of the wrong answers."""
    probabilities = log_probabilities(logits).exp()
    right, wrong = ((_gather(probabilities, ids) * (ids >= 0)).sum(-1) for ids in (batch.answers, batch.wrong))
    return batch.over_reads(right - wrong)


def logprob(logits: Tensor, batch: Batch) -> Tensor:
    """Log of the answers' summed probability, in nats."""
    return batch.over_reads(_log_sum_of(log_probabilities(logits), batch.answers))


def kl(logits: Tensor, batch: Batch) -> Tensor:
    """-KL(clean run || this run) in nats, over the whole vocabulary."""
    assert batch.reference is not None, "the engine gives the reference to metrics that declare it"
    clean = batch.reference
    return batch.over_reads(-(clean.exp() * (clean - log_probabilities(logits))).sum(-1))


METRICS = {
    "logit_diff": Metric("logit_diff", logit_diff, wrong=True, steepest=2),
    "prob_diff": Metric("prob_diff", prob_diff, wrong=True, steepest=1),
    "logprob": Metric("logprob", logprob, steepest=2),
    "kl": Metric("kl", kl, answers=False, reference=True, flat_at_clean=True, steepest=2),
}


def register(metric: Metric) -> Metric:
    """Register a metric under its name, in this process. TaskError if the name is taken."""
    return entered(metric, Metric, METRICS, TaskError, "metric '{}' exists: give yours another name")


def metric_of(metric: str | Metric | Function) -> Metric:
    """Return the metric of a name, or make one from a callable. TaskError if the name is unknown."""
    if isinstance(metric, Metric):
        return metric
    if callable(metric):
        return Metric(getattr(metric, "__name__", type(metric).__name__), _as_seen_by_user(metric), answers=False)
    if not isinstance(metric, str) or metric not in METRICS:
        raise TaskError(f"{unknown('metric', metric, METRICS)}, or a callable (logits, batch)")
    return METRICS[metric]


def _as_seen_by_user(function: Function) -> Function:
    def call(logits: Tensor, batch: Batch) -> Tensor:
        return function(logits.squeeze(1) if logits.shape[1] == 1 else logits, batch)

    return call


class Correctness(NamedTuple):
    """`[batch]` bool each: whether the answers beat the wrong answers, and whether the likeliest token is an answer."""

    accurate: Tensor
    top1: Tensor


def correctness(logits: Tensor, batch: Batch) -> Correctness:
    """Return whether each example is answered correctly at all its read positions.

    A single answer must be more likely than every wrong answer; several answers must have a larger summed probability
    than the wrong answers. Without wrong answers, accuracy is top-1. With `answer="all"`, tokens that the answer and
    the wrong answer share do not count.
    """
    logprobs = log_probabilities(logits)
    best = logprobs.argmax(-1, keepdim=True)
    top1 = (best == batch.answers).any(-1).all(-1)
    if not batch.wrong.shape[-1]:
        return Correctness(top1, top1)
    strongest = _gather(logprobs, batch.wrong).masked_fill(batch.wrong < 0, -torch.inf).amax(-1)
    single = (batch.answers >= 0).sum(-1) == 1
    bar = torch.where(single, strongest, _log_sum_of(logprobs, batch.wrong))
    better = _log_sum_of(logprobs, batch.answers) > bar
    if batch.summed is not None:
        better = better | (batch.answers == batch.wrong).all(-1)
    return Correctness(better.all(-1), top1)
