"""Gates between 0 and 1: how they are drawn, and what closes them.

Hard concrete gates (Louizos et al. 2018) are often exactly 0 or 1, and differentiable:

1. With u uniform on (0, 1): `s = sigmoid((log u - log(1 - u) + logit) / T)`, stretched to `low + (high - low) s` and
   clamped to [0, 1]. As in Edge Pruning (Bhaskar et al. 2024): T = 2/3, stretched to (-0.1, 1.1).
2. A gate is open (above 0) with probability `sigmoid(logit - T log(-low / high))`. The sum over gates is the expected
   L0 norm, by which a size is asked for or penalised.

Uniform gates (uniform gradient sampling, UGS, Li and Janson 2024) are 0 or 1, or now and then uniform between. With
`p = sigmoid(logit)` and a window of width `w = p (1 - p)`:

1. A gate is 1 with probability p - w/2, 0 with probability 1 - p - w/2, and otherwise, with probability w, a uniform
   number in [0, 1]. Its mean is p.
2. Only a gate inside its window has a gradient, which is 1 to p: in expectation w times the mean slope of the loss from
   0 to 1, where a smooth mask takes the slope at one point.

The loss gains a pressure, in units of the metric, that grows with the expected number of open gates:

* `Price`: a fixed price a gate, as in subnetwork probing (Cao et al. 2021) and UGS.
* `Target`: Lagrange multipliers that steer to a wanted number of gates, as in Edge Pruning.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

LOW, HIGH, TEMPERATURE = -0.1, 1.1, 2 / 3
SHIFT = TEMPERATURE * math.log(-LOW / HIGH)
WARM_UP = 0.6


class Gates(NamedTuple):
    """A kind of gates.

    Attributes:
        sample: masks in [0, 1] from logits and uniform noise (float64) of their shape.
        open_probability: from logits, how likely each gate is not 0.
    """

    sample: Callable[[Tensor, Tensor], Tensor]
    open_probability: Callable[[Tensor], Tensor]


def _hard_concrete(logits: Tensor, u: Tensor) -> Tensor:
    u = u.clamp(1e-12, 1 - 1e-12)
    noise = (u.log() - (-u).log1p()).to(logits)
    return (LOW + (HIGH - LOW) * torch.sigmoid((noise + logits) / TEMPERATURE)).clamp(0, 1)


def _uniform(logits: Tensor, u: Tensor) -> Tensor:
    p = torch.sigmoid(logits)
    fixed = p.detach()
    width = (fixed * (1 - fixed)).clamp(min=torch.finfo(logits.dtype).tiny)
    inside = (fixed - u.to(logits)) / width + 0.5  # uniform on [0, 1] where u is inside the window around p
    return (inside + (p - fixed) * ((inside > 0) & (inside < 1))).clamp(0, 1)


HARD_CONCRETE = Gates(_hard_concrete, lambda logits: torch.sigmoid(logits - SHIFT))
UNIFORM = Gates(_uniform, torch.sigmoid)


@dataclass(frozen=True)
class Price:
    """A fixed price, in units of the metric, for every gate that is expected to be open."""

    price: float

    def loss(self, expected: Tensor, step: int, multipliers: Tensor) -> Tensor:
        """What the loss gains. Multipliers `[2]` are those of `Target`, which a price does without."""
        return self.price * expected

    def ascended(self, multipliers: Tensor, expected: float, step: int) -> Tensor:
        """The multipliers after this step."""
        return multipliers

    def settled(self, step: int) -> bool:
        """Whether what is asked for no longer changes."""
        return True


@dataclass(frozen=True)
class Target:
    """Steers the expected number of open gates to `target` out of `gates`, over a training of so many steps.

    With `gap = (expected - wanted) / gates` the loss gains `a gap + b gap^2`; a and b are Lagrange multipliers that
    follow by gradient ascent. The wanted size shrinks linearly from all gates to the target over the first `WARM_UP` of
    the steps, then stays.

    `ascent`: learning rate of the ascent, in units of the metric per step and whole gap.
    """

    target: int
    gates: int
    steps: int
    ascent: float

    @property
    def warm_up(self) -> int:
        return max(1, round(WARM_UP * self.steps))

    def wanted(self, step: int) -> float:
        """The size asked for at a step."""
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


Pressure = Price | Target
