"""Soft masks of exactly k expected edges (Matryoshka Attribution, 2026): one ranking that serves every size.

Every gate has a score s. A step draws a size k, from 1 to the number of gates, and opens each gate to

    m = sigmoid((s - tau) / T),        tau such that the sum of m is k        (T = 1/2; tau by bisection)

As k differs at each step, the scores learn a ranking whose top k edges work for every k. tau depends on every score:
with `slope = m (1 - m) / T` and g the loss's gradient at m, the gradient at s is, by implicit differentiation,

    slope (g - sum(g slope) / sum(slope))

so the gradients of all scores add up to 0: scores only compete.

A step has one of two objectives, each with its own order of the edges:

| objective | gates are ordered by | size drawn | the step |
|---|---|---|---|
| `metric` (as published) | s | uniformly | raises the metric, even beyond the whole model's |
| `faithfulness` (ours) | \\|s\\| | log-uniformly | lowers each pair's \\|metric - whole model's\\| |
| `both` (ours) | | | alternates between the two, on the same scores |

So under `both` an edge that opposes the behaviour gets a score far below 0: it is among the last by sign, as MIB's CPR
needs, and among the first by magnitude, as its CMD needs.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from circuitfind.search.training import Gates

TEMPERATURE = 0.5
HALVINGS = 60


class _SoftTop(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, scores: Tensor, k: float) -> Tensor:
        exact = scores.double()
        low, high = exact.min() - 40 * TEMPERATURE, exact.max() + 40 * TEMPERATURE
        for _ in range(HALVINGS):
            tau = (low + high) / 2
            more = torch.sigmoid((exact - tau) / TEMPERATURE).sum() > k
            low, high = torch.where(more, tau, low), torch.where(more, high, tau)
        gates = torch.sigmoid((exact - low) / TEMPERATURE)
        ctx.save_for_backward(gates)
        return gates.to(scores)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        (gates,) = ctx.saved_tensors
        slope = gates * (1 - gates) / TEMPERATURE
        mean = (gradient * slope).sum() / slope.sum().clamp(min=torch.finfo(slope.dtype).tiny)
        return (slope * (gradient - mean)).to(gradient), None


soft_top: Callable[[Tensor, float], Tensor] = _SoftTop.apply
"""(scores, k) -> gates in (0, 1) that add up to k, differentiable in the scores."""


def _uniform(scores: Tensor, noise: Tensor) -> Tensor:
    return soft_top(scores, 1 + float(noise[0]) * (len(scores) - 1))


def _log_uniform(scores: Tensor, noise: Tensor) -> Tensor:
    magnitudes = torch.where(scores < 0, -scores, scores)  # unlike |s|, with a slope at 0
    return soft_top(magnitudes, len(scores) ** float(noise[0]))


RAISED, FAITHFUL = Gates(_uniform), Gates(_log_uniform, faithful=True)
OBJECTIVES = {"metric": (RAISED,), "faithfulness": (FAITHFUL,), "both": (RAISED, FAITHFUL)}
