"""The methods by name: their gates, their learning rate, and what makes their circuits small.

| method | gates | what makes the circuit small |
|---|---|---|
| `edge-pruning` (Bhaskar et al. 2024) | hard concrete | Lagrange multipliers steer to a wanted number of gates |
| `subnetwork-probing` (Cao et al. 2021) | hard concrete | a fixed price a gate |
| `ugs` (uniform gradient sampling, Li and Janson 2024) | 0, 1 or uniform between | a fixed price a gate |

Prices are in units of the metric. The default ones are parts of `contrast`, metric(full) - metric(empty), so that they
suit any metric.
"""

from __future__ import annotations

import math
from numbers import Real
from typing import NamedTuple

from circuitfind.errors import ScoreError
from circuitfind.search.learned import hard_concrete, uniform
from circuitfind.search.learned.batches import MiniBatches
from circuitfind.search.learned.pressure import Pressure, Price, Target
from circuitfind.search.learned.training import Gates

HARD_CONCRETE = Gates(hard_concrete.sample, hard_concrete.open_probability)
UNIFORM = Gates(uniform.sample, uniform.open_probability)
# The numbers, the learning rates too, were chosen on the embedded model's `greater-than` task.
START = 2.0  # every gate's first logit: mostly open, and with a gradient
SHARE = 0.1  # the default price of all wanted gates together, as a part of the contrast
ASCENT = 0.5  # contrasts that a step adds to a multiplier, per whole gap between the expected size and the wanted one


class Method(NamedTuple):
    """A kind of gates, its learning rate, and whether it steers to a size or has a fixed price."""

    gates: Gates
    lr: float
    steers: bool


METHODS = {
    "edge-pruning": Method(HARD_CONCRETE, 0.05, True),
    "subnetwork-probing": Method(HARD_CONCRETE, 0.1, False),
    "ugs": Method(UNIFORM, 0.05, False),
}


def method_of(name: str, level: str, target: int | None, regularisation: float | None) -> Method:
    """The method of a name, if it can do what is asked.

    Raises:
        ScoreError: it is unknown, steers to a size and has none, or to a price and has none.
    """
    if name not in METHODS:
        raise ScoreError(f"method '{name}' does not learn masks: use one of {', '.join(METHODS)}")
    method = METHODS[name]
    if method.steers and target is None:
        raise ScoreError(f"method '{name}' steers to a size: give n_{level}s= or sparsity=")
    if method.steers and regularisation is not None:
        raise ScoreError(f"method '{name}' steers to a size, it has no fixed price: leave regularisation= out")
    if regularisation is not None and not (isinstance(regularisation, Real) and regularisation >= 0):
        raise ScoreError(f"regularisation={regularisation!r} is the price of an open gate: 0 or more")
    return method


def pressure_of(
    method: Method, batches: MiniBatches, target: int | None, gates: int, steps: int, price: float | None
) -> Pressure:
    """What makes the masks of a training small.

    Raises:
        ScoreError: there is no behaviour in the metric, so nothing to measure a price by.
    """
    if price is not None:
        return Price(price)
    contrast, name = batches.contrast(), batches.experiment.metric.name
    if math.isnan(contrast):
        raise ScoreError(f"metric '{name}' is NaN on these pairs: look for inf or NaN in the logits or in your metric")
    if contrast <= 0:
        raise ScoreError(
            f"metric '{name}' is not higher on the whole model than with every edge ablated (the difference is"
            f" {contrast:.3g}): there is no behaviour in it to keep; give another metric"
        )
    if method.steers and target is not None:
        return Target(target, gates, steps, ASCENT * contrast)
    return Price(SHARE * contrast / (target or SHARE * gates))
