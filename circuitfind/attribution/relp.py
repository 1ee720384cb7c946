"""RelP, relevance patching (Jafari et al. 2025): attribution patching with relevance in place of gradients.

    effect(u -> v) ~ (u's clean value - u's ablated value) . coefficient of v's input

The coefficient goes back through the model as a gradient does, but by the rules of `engine/relevance.py`: constant norm
scales, activations as `act(x) / x`, half for either factor of a gated MLP. It is taken at the clean prompt for the
noising effect and at the corrupted one for the denoising effect (the authors' choice). All else, and the
cost, is as for `eap` and `atp`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from circuitfind.attribution import eap
from circuitfind.attribution.method import Method, Point


def points(direction: str, n_layers: int, options: Mapping[str, Any]) -> list[Point]:
    """The one point of the coefficient."""
    return [point._replace(relevance=True) for point in eap.points(direction)]


METHOD = Method(
    "relp",
    "attribution patching by rules of relevance propagation",
    "Jafari et al. 2025",
    "2 forward, 1 backward",
    ("edge", "node", "place"),
    points=points,
    at_clean=True,
    by_position=True,
)
