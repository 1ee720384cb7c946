"""Learns gates by gradient descent: a random mask, a masked run, a step of Adam, again.

At each step, on the next mini-batch of pairs:

1. Draw a mask from the gates' logits (`hard_concrete.py`, `uniform.py`).
2. Run the model under it and take the gradient of the mean metric at the mask (`engine/masked_run.py`).
3. `loss = -metric + pressure(expected number of open gates)` (`pressure.py`); one step of Adam on the logits alone,
   the model's weights are frozen. The pressure's multipliers follow.

Every `EVERY` steps the means over them are logged. Training stops early once what the pressure asks for has settled
and the logged loss has found no new low (by 1%) for `patience` rows.

A step is a function from one immutable state to the next, and its noise is seeded by its number: a training that is
stopped anywhere goes on to the same end.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from circuitfind.engine.masked_run import mask_gradient
from circuitfind.errors import ScoreError
from circuitfind.search.learned.batches import MiniBatches
from circuitfind.search.learned.pressure import Pressure

EVERY = 10
NEW_LOW = 0.01  # a fall of the loss by a smaller part of it is no progress
MOMENTS = (0.9, 0.999)  # Adam's


class Gates(NamedTuple):
    """How logits (and uniform noise) become masks, and the probability that each gate is open."""

    sample: Callable[[Tensor, Tensor], Tensor]
    open_probability: Callable[[Tensor], Tensor]


class Logged(NamedTuple):
    """Means over the steps since the row before: loss, metric of the masked runs, expected open gates."""

    step: int
    loss: float
    metric: float
    expected: float


@dataclass(frozen=True, eq=False)
class State:
    """Everything that changes in training.

    logits, first, second: `[gates]` and Adam's two moments of their gradient; multipliers: `[2]` of the pressure;
    trace: `[steps, 3]` loss, metric and expected open gates of every step done.
    """

    logits: Tensor
    first: Tensor
    second: Tensor
    multipliers: Tensor
    trace: Tensor

    @classmethod
    def start(cls, logits: Tensor) -> State:
        zero = torch.zeros_like(logits)
        rows = torch.zeros(0, 3, dtype=torch.float64)
        return cls(logits, zero, zero, torch.zeros(2, dtype=torch.float64), rows)

    @property
    def step(self) -> int:
        """How many steps are done."""
        return len(self.trace)

    def history(self) -> tuple[Logged, ...]:
        """The trace in means over `EVERY` steps; a rest at the end counts as a row."""
        rows = [part.mean(0).tolist() for part in self.trace.split(EVERY)] if self.step else []
        return tuple(Logged(min((i + 1) * EVERY, self.step), *row) for i, row in enumerate(rows))


@dataclass(frozen=True)
class Training:
    """What a training is made of.

    spread: from gates `[gates]` to the mask `[writers, readers]`, differentiable.
    """

    batches: MiniBatches
    gates: Gates
    spread: Callable[[Tensor], Tensor]
    pressure: Pressure
    lr: float
    seed: int

    def advance(self, state: State) -> State:
        """One step.

        Raises:
            ScoreError: the metric or its gradient is NaN or infinite, or nothing depends on the gates.
        """
        step = state.step
        logits = state.logits.clone().requires_grad_(True)
        noise = np.random.default_rng((self.seed % 2**32, step)).random(len(logits))
        with torch.enable_grad():
            mask = self.spread(self.gates.sample(logits, torch.from_numpy(noise)))
            metric, at_mask = self._metric(mask, step)
            expected = self.gates.open_probability(logits).sum()
            pressed = self.pressure.loss(expected, step, state.multipliers)
            (gradient,) = torch.autograd.grad(pressed - (at_mask * mask).sum(), logits)
        row = torch.tensor([[float(pressed.detach()) - metric, metric, float(expected.detach())]], dtype=torch.float64)
        first = MOMENTS[0] * state.first + (1 - MOMENTS[0]) * gradient
        second = MOMENTS[1] * state.second + (1 - MOMENTS[1]) * gradient**2
        mean, power = first / (1 - MOMENTS[0] ** (step + 1)), second / (1 - MOMENTS[1] ** (step + 1))
        return replace(
            state,
            logits=state.logits - self.lr * mean / (power.sqrt() + 1e-8),
            first=first,
            second=second,
            multipliers=self.pressure.ascended(state.multipliers, float(expected.detach()), step),
            trace=torch.cat([state.trace, row]),
        )

    def finished(self, state: State, patience: int | None) -> bool:
        """Whether the loss has found no new low for `patience` logged rows since the pressure settled."""
        if patience is None or state.step % EVERY:
            return False
        losses = [row.loss for row in state.history() if self.pressure.settled(row.step - EVERY)]
        best, since = math.inf, 0
        for loss in losses:
            progress = loss < best - NEW_LOW * abs(best) if math.isfinite(best) else True
            best, since = (loss, 0) if progress else (best, since + 1)
        return since >= patience

    def _metric(self, mask: Tensor, step: int) -> tuple[float, Tensor]:
        """The mean metric of a step's pairs, and its gradient at the mask."""
        total, count, gradient = 0.0, 0, torch.zeros_like(mask)
        metric = self.batches.experiment.metric
        for prepared in self.batches.at(step):
            values, part = mask_gradient(prepared, mask, metric)
            total, count, gradient = total + float(values.cpu().double().sum()), count + len(values), gradient + part
        if not (math.isfinite(total) and bool(gradient.isfinite().all())):
            raise ScoreError(
                f"metric '{metric.name}' or its gradient is NaN or infinite under the mask of step {step}: look for"
                " inf or NaN in the model's logits (half precision overflows first: load with dtype='float32') or in a"
                " metric of your own"
            )
        if not step and not bool(gradient.any()):
            raise ScoreError(
                f"the gradient of metric '{metric.name}' at the first mask is zero, so there is nothing to learn from:"
                " give a metric that moves with the logits, such as 'kl'"
            )
        return total / count, gradient / count
