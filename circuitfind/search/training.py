"""Learn gates by gradient descent: draw a mask, run the model under it, update the gates' logits with Adam.

At each step, on the next mini-batch of pairs:

1. Draw a mask from the gates' logits.
2. Run the model under it and take the gradient of the mean metric at the mask (`engine/masked_run.py`).
3. Take one step of Adam on the logits, to lower `loss = -metric + pressure(expected number of open gates)`, and update
   the pressure's multipliers. Faithful gates have the mean of |metric - whole model's| over pairs in place of -metric.
   A method with several kinds of gates alternates between them (`matryoshka.py`).

Means over `EVERY` steps are logged. Training stops early if, since the pressure settled (its target no longer changes),
the logged loss has not fallen by 1% below its lowest value for `patience` rows.

A step is a function from one immutable state to the next, and its noise is seeded by its number. So a training that is
stopped at any step continues to the same result, to the bit.

Hard concrete gates (Louizos et al. 2018) are often exactly 0 or 1, and still differentiable:

1. With u uniform on (0, 1): `s = sigmoid((log u - log(1 - u) + logit) / T)`, stretched to `low + (high - low) s` and
   clamped to [0, 1]. As in Edge Pruning (Bhaskar et al. 2024): T = 2/3, stretched to (-0.1, 1.1).
2. A gate is open (above 0) with probability `sigmoid(logit - T log(-low / high))`. The sum over gates is the expected
   L0 norm.

Uniform gates (uniform gradient sampling, UGS, Li and Janson 2024), with `p = sigmoid(logit)` and `w = p (1 - p)`:

1. A gate is 1 with probability p - w/2, 0 with probability 1 - p - w/2, else uniform in [0, 1]. Its mean is p.
2. Only a gate between 0 and 1 has a gradient: its derivative with respect to p is 1. So the expected gradient is w
   times the mean slope of the loss from 0 to 1, where a smooth mask takes the slope at one point.

The pressure is in units of the metric and grows with the expected number of open gates: a fixed `Price` per gate, as in
subnetwork probing (Cao et al. 2021) and UGS, or Lagrange multipliers that steer to a wanted number of gates (`Target`),
as in Edge Pruning.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from os import PathLike
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from circuitfind.batch import Batch
from circuitfind.checkpoint import SECONDS_BETWEEN_WRITES, CheckpointFile, key_of
from circuitfind.engine.experiment import Experiment
from circuitfind.engine.masked_run import mask_gradient
from circuitfind.engine.memory_plan import learning_size, sizes_of
from circuitfind.engine.prepare import Prepared, PreparedRuns
from circuitfind.errors import ScoreError
from circuitfind.progress import progress

EVERY = 10
LABEL = "masked runs"
NEW_LOW = 0.01  # relative fall below the lowest loss that counts as a new low
MOMENTS = (0.9, 0.999)  # Adam's betas
LOW, HIGH, TEMPERATURE = -0.1, 1.1, 2 / 3
SHIFT = TEMPERATURE * math.log(-LOW / HIGH)
WARM_UP = 0.6


# -------------------------------------------------------------------- gates
class Gates(NamedTuple):
    """A kind of gates.

    Attributes:
        sample: from logits and uniform noise (float64) of their shape to gates in [0, 1].
        open_probability: from logits to each gate's probability not to be 0; None: the sum of the drawn gates is the
            number of open gates.
        faithful: train the metric to equal the whole model's, instead of to be high.
    """

    sample: Callable[[Tensor, Tensor], Tensor]
    open_probability: Callable[[Tensor], Tensor] | None = None
    faithful: bool = False


def _hard_concrete(logits: Tensor, u: Tensor) -> Tensor:
    u = u.clamp(1e-12, 1 - 1e-12)
    noise = (u.log() - (-u).log1p()).to(logits)
    return (LOW + (HIGH - LOW) * torch.sigmoid((noise + logits) / TEMPERATURE)).clamp(0, 1)


def _uniform(logits: Tensor, u: Tensor) -> Tensor:
    p = torch.sigmoid(logits)
    fixed = p.detach()
    width = (fixed * (1 - fixed)).clamp(min=torch.finfo(logits.dtype).tiny)
    inside = (fixed - u.to(logits)) / width + 0.5  # uniform on [0, 1] if u is in the window of width w around p
    return (inside + (p - fixed) * ((inside > 0) & (inside < 1))).clamp(0, 1)


HARD_CONCRETE = Gates(_hard_concrete, lambda logits: torch.sigmoid(logits - SHIFT))
UNIFORM = Gates(_uniform, torch.sigmoid)


@dataclass(frozen=True)
class Price:
    """A fixed price, in units of the metric, per expected open gate."""

    price: float

    def loss(self, expected: Tensor, step: int, multipliers: Tensor) -> Tensor:
        """Return what to add to the loss. `multipliers [2]`: only `Target` uses them."""
        return self.price * expected

    def ascended(self, multipliers: Tensor, expected: float, step: int) -> Tensor:
        """Return the multipliers after this step."""
        return multipliers

    def settled(self, step: int) -> bool:
        """Whether the pressure's target no longer changes."""
        return True


@dataclass(frozen=True)
class Target:
    """Steers the expected number of open gates to `target` out of `gates`, over a training of `steps` steps.

    With `gap = (expected - wanted) / gates`, `a gap + b gap^2` is added to the loss; the multipliers a and b are
    updated by gradient ascent with the learning rate `ascent` (units of the metric). The wanted number shrinks linearly
    from all gates to the target over the first `WARM_UP` of the steps.
    """

    target: int
    gates: int
    steps: int
    ascent: float

    @property
    def warm_up(self) -> int:
        return max(1, round(WARM_UP * self.steps))

    def wanted(self, step: int) -> float:
        """Return the wanted number of open gates at a step."""
        return self.gates - (self.gates - self.target) * min(1.0, step / self.warm_up)

    def loss(self, expected: Tensor, step: int, multipliers: Tensor) -> Tensor:
        gap = (expected - self.wanted(step)) / self.gates
        linear, square = multipliers.tolist()
        pressed: Tensor = linear * gap + square * gap**2
        return pressed

    def ascended(self, multipliers: Tensor, expected: float, step: int) -> Tensor:
        gap = (expected - self.wanted(step)) / self.gates
        return multipliers + self.ascent * torch.tensor([gap, gap**2], dtype=multipliers.dtype)

    def settled(self, step: int) -> bool:
        return step >= self.warm_up


@dataclass(frozen=True)
class NoPressure(Price):
    """No pressure, for gates whose number is drawn at each step. Losses of different sizes cannot be compared, so
    training never stops early."""

    price: float = 0.0

    def settled(self, step: int) -> bool:
        return False


Pressure = Price | Target


# -------------------------------------------------------------------- training
class MiniBatches:
    """A seeded partition of the pairs into mini-batches of `per_step`, in a new random order each epoch."""

    def __init__(self, experiment: Experiment, per_step: int) -> None:
        _, length, reads = sizes_of(experiment.batch)
        # the batch size changes results by rounding only
        size = experiment.setting.batch_size or learning_size(experiment.adapter, per_step, length, reads)
        seed, batch = experiment.setting.seed, experiment.batch
        order = torch.randperm(len(experiment), generator=torch.Generator().manual_seed(seed))
        self.experiment, self.seed = experiment, seed
        parts = (batch.rows(rows.sort().values.to(batch.answers.device)) for rows in order.split(per_step))
        self.batches = [PreparedRuns(experiment, part, size) for part in parts]

    def at(self, step: int) -> PreparedRuns:
        """Return the mini-batch of a step."""
        epoch, place = divmod(step, len(self.batches))
        generator = torch.Generator().manual_seed(self.seed + 1 + epoch)
        return self.batches[int(torch.randperm(len(self.batches), generator=generator)[place])]

    def contrast(self) -> float:
        """Return the metric of the whole model minus that with every edge ablated, mean over all pairs."""

        def lost(prepared: Prepared) -> float:
            runs, metric = (prepared.clean, prepared.empty), self.experiment.metric
            full, empty = (metric(run.logits, prepared.batch).cpu().double() for run in runs)
            return float((full - empty).sum())

        return sum(sum(runs.each(lost, LABEL)) for runs in self.batches) / len(self.experiment)


class Logged(NamedTuple):
    """The last of some steps, and means over them: loss, metric of the masked runs, expected number of open gates."""

    step: int
    loss: float
    metric: float
    expected: float


@dataclass(frozen=True, eq=False)
class State:
    """Everything that changes in training.

    logits: `[gates]`; first, second: Adam's moments of their gradient, `[gates]`; multipliers: the pressure's, `[2]`.
    trace: loss, metric and expected number of open gates of every step so far, `[steps, 3]`.
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
        """The number of steps so far."""
        return len(self.trace)

    def history(self) -> tuple[Logged, ...]:
        """Return the trace as means over `EVERY` steps; fewer steps at the end make a row, too."""
        rows = [part.mean(0).tolist() for part in self.trace.split(EVERY)] if self.step else []
        return tuple(Logged(min((i + 1) * EVERY, self.step), *row) for i, row in enumerate(rows))

    def arrays(self) -> dict[str, np.ndarray]:
        """Return the fields, for a checkpoint."""
        return {field.name: getattr(self, field.name).cpu().numpy() for field in fields(self)}

    def of_arrays(self, known: dict[str, np.ndarray]) -> State:
        """Return the state with the fields `known`, on the devices of this state."""
        on = {field.name: getattr(self, field.name).device for field in fields(self)}
        return State(**{name: torch.from_numpy(known[name]).to(device) for name, device in on.items()})


@dataclass(frozen=True)
class Training:
    """Everything that stays the same in training.

    gates: the kinds of gates; steps alternate between them.
    spread: the differentiable function from gates `[gates]` to the mask `[writers, readers]`.
    only: the edges that have a gate, `[writers, readers]` bool; None: all.
    """

    batches: MiniBatches
    gates: tuple[Gates, ...]
    spread: Callable[[Tensor], Tensor]
    pressure: Pressure
    lr: float
    only: np.ndarray | None = None

    def run(
        self, state: State, steps: int, patience: int | None, checkpoint: str | PathLike[str] | None, settings: object
    ) -> State:
        """Train for `steps` steps or until `finished`, from the checkpoint if there is one; return the last state.

        Args:
            settings: everything else that decides the result, besides pairs, metric and ablation.

        Raises:
            FileError: the checkpoint belongs to another run.
        """
        key = key_of(self.batches.experiment.key(), settings) if checkpoint else ""
        file = CheckpointFile(checkpoint, key, "model, prompts, metric or settings")
        known = file.read()
        if known is not None:
            state = state.of_arrays(known)
        written = time.monotonic()
        with progress("learning masks", steps) as advance:
            advance(state.step)
            try:
                while state.step < steps and not self.finished(state, patience):
                    state = self.advance(state)
                    advance(1)
                    if time.monotonic() - written > SECONDS_BETWEEN_WRITES:
                        file.write(state.arrays())
                        written = time.monotonic()
            except BaseException:  # also on Ctrl-C
                file.write(state.arrays())
                raise
        file.finish(state.arrays())
        return state

    def advance(self, state: State) -> State:
        """Return the state after one step. ScoreError if the metric or its gradient is NaN or infinite, or the first
        gradient is zero."""
        step = state.step
        logits = state.logits.clone().requires_grad_(True)
        noise = np.random.default_rng((self.batches.seed % 2**32, step)).random(len(logits))
        gates = self.gates[step % len(self.gates)]
        with torch.enable_grad():
            drawn = gates.sample(logits, torch.from_numpy(noise))
            mask = self.spread(drawn)
            metric, at_mask, off = self._metric(mask, step, gates.faithful)
            expected = (gates.open_probability(logits) if gates.open_probability else drawn).sum()
            pressed = self.pressure.loss(expected, step, state.multipliers)
            (gradient,) = torch.autograd.grad(pressed - (at_mask * mask).sum(), logits)
        loss = float(pressed.detach()) + (off if gates.faithful else -metric)
        row = torch.tensor([[loss, metric, float(expected.detach())]], dtype=torch.float64)
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
            new_low = not math.isfinite(best) or loss < best - NEW_LOW * abs(best)
            best, since = (loss, 0) if new_low else (best, since + 1)
        return since >= patience

    def _metric(self, mask: Tensor, step: int, faithful: bool) -> tuple[float, Tensor, float]:
        """Return the mean metric of a step's pairs, a gradient at the mask, and the mean |metric - whole model's|.

        The gradient is that of the mean metric; with `faithful`, that of minus the mean distance.
        """
        total, off, count, gradient = 0.0, 0.0, 0, torch.zeros_like(mask)
        metric = self.batches.experiment.metric

        def run(prepared: Prepared) -> tuple[Tensor, Tensor, Tensor]:
            full, seen = metric(prepared.clean.logits, prepared.batch), []

            def rising(logits: Tensor, batch: Batch) -> Tensor:
                values = metric(logits, batch)
                seen.append(values.detach())
                return -(values - full.to(values)).abs() if faithful else values

            part = mask_gradient(prepared, mask, replace(metric, function=rising), self.only).gradient
            return seen[-1], (seen[-1] - full.to(seen[-1])).abs(), part

        for values, distances, part in self.batches.at(step).each(run, LABEL):
            total, off = total + float(values.cpu().double().sum()), off + float(distances.cpu().double().sum())
            count, gradient = count + len(values), gradient + part
        if not (math.isfinite(total) and bool(gradient.isfinite().all())):
            raise ScoreError(
                f"metric '{metric.name}' or its gradient is NaN or infinite under the mask of step {step}: look for"
                " inf or NaN in the model's logits (half precision overflows first: load with dtype='float32') or in a"
                " metric of your own"
            )
        if not step and not bool(gradient.any()):
            raise ScoreError(
                f"the gradient of metric '{metric.name}' at the first mask is zero, so training would not"
                " change anything: give a metric with a gradient, such as 'kl'"
            )
        return total / count, gradient / count, off / count
