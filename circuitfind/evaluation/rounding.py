"""Bound on rounding: how far two computations of the same circuit may differ in a metric.

In another form, order or batch, or on another machine, the last digits of a circuit's logits differ. For a metric m of
an example's logits z:

1. The logits are off by at most `d = UNITS * eps * max|z|`, units in the last place of the largest logit.
2. By Taylor's theorem the metric is then off by at most `slope * d + curvature * d^2 / 2`. `slope` is the sum of
   |dm/dz| at the circuit's logits. The second derivative along an error is, for metrics of a softmax, a variance, at
   most `d^2`, times the metric's scale: the steepest slope that it can have (2 for `logit_diff`, `logprob` and `kl`, 1
   for `prob_diff`, times the tokens of a whole answer that it is summed over; for a callable, the steepest at the
   circuit and at the task's ends). This term alone remains where the slope is 0, as for `kl` at the clean run.
3. The metric's own arithmetic is off by `2 * eps * (scale * log(vocabulary) + |m|)`: rounding of log-probabilities
   has the same size even if the result is near 0. Here eps is that of float32, for a callable that of the model.

For a metric without gradient only the last term, without the scale, remains. Rounding of different examples is
independent, so a mean over examples is off by `sqrt(sum of squares) / examples`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from circuitfind.batch import Batch
from circuitfind.engine.batches import out_of_memory
from circuitfind.metrics import Metric

# Four times the root mean square difference between logits of a circuit's two forms on trained models, in units in the
# last place of the largest one: 2 in float32, half a unit in half precision, whose sums are wider than what is kept.
UNITS, HALF_UNITS = 8, 2
SINGLE = torch.finfo(torch.float32).eps


class Parts(NamedTuple):
    """Parts of the bound, `[examples]` each: d, the slope, the scale, eps * log(vocabulary) and eps * |m|."""

    logits: np.ndarray
    slope: np.ndarray
    scale: np.ndarray
    arithmetic: np.ndarray
    value: np.ndarray

    def bound(self) -> np.ndarray:
        """`[examples]`: bound on the rounding of the metric."""
        scale = self.scale.max()
        own = 2 * (scale * self.arithmetic + self.value)
        return np.asarray(self.slope * self.logits + scale * self.logits**2 / 2 + own)


def parts(metric: Metric, logits: Tensor, ends: Sequence[Tensor], batch: Batch, dtype: torch.dtype) -> Parts:
    """Compute the bound for a batch.

    Args:
        logits: `[batch, reads, vocab]` of the circuit.
        ends: logits of the whole model and of the empty circuit.
        dtype: precision of the model.
    """
    eps = max(torch.finfo(dtype).eps, SINGLE)  # RMSNorms of a float64 model compute in float32
    off = (HALF_UNITS if eps > SINGLE else UNITS) * eps * logits.abs().amax((1, 2))
    slope, value = slopes(metric, logits, batch), metric(logits, batch).abs()
    if metric.steepest is None:
        scale = torch.stack([slope, *(slopes(metric, end, batch) for end in ends)]).amax(0)
    else:
        scale, eps = metric.steepest * batch.weights.sum(-1).to(slope), SINGLE
    columns = (off, slope, scale, torch.full_like(slope, eps * math.log(logits.shape[-1])), eps * value)
    return Parts(*(column.cpu().double().numpy() for column in columns))


def slopes(metric: Metric, logits: Tensor, batch: Batch) -> Tensor:
    """`[batch]`: the sum of |dm/dz| over an example's logits; 0 where the metric has no gradient."""
    with torch.inference_mode(False), torch.enable_grad():
        logits = logits.detach().clone().requires_grad_()
        try:
            value = metric(logits, batch)
            (gradient,) = (
                torch.autograd.grad(value.sum(), logits) if value.requires_grad else (torch.zeros_like(logits),)
            )
        except RuntimeError as error:  # the metric leaves torch: `.numpy()` fails on a tensor that requires a gradient
            if out_of_memory(error):
                raise
            gradient = torch.zeros_like(logits)
    return gradient.nan_to_num(0, 0, 0).abs().sum((1, 2))


def of_mean(rounding: np.ndarray) -> float:
    """Bound on the rounding of a mean, from bounds `[examples]` of the examples."""
    return float(np.sqrt((rounding**2).sum()) / len(rounding))
