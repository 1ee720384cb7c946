"""The two-point average: half the gradient at the clean prompt, half at the corrupted one (Hanna et al. 2024).

The trapezoid of the integrated-gradients line with its end points only. It repairs flat metrics at the price of one
more backward pass, and does not depend on the direction.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from circuitfind.attribution.method import Method, Point


def points(direction: str, n_layers: int, options: Mapping[str, Any]) -> list[Point]:
    """Both ends, equal weights."""
    return [Point(0.5, 1.0), Point(0.5, 0.0)]


METHOD = Method(
    "clean-corrupted",
    "gradients averaged over both prompts",
    "Hanna et al. 2024",
    "2 forward and backward, 2 forward",
    ("edge", "node", "place"),
    points=points,
    twin=True,
    by_position=True,
)
