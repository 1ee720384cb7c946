"""EAP with integrated gradients over inputs (EAP-IG, Hanna et al. 2024).

The gradient is averaged over `steps` inputs on the line from the corrupted to the clean embedding (the residual that
enters layer 0; positions are the same on both sides). Rules for where on the line, k = 0 .. steps-1:

* `left`: k / steps. The clean prompt itself is never used. The EAP-IG library's choice, and the default.
* `right`: (k + 1) / steps. The corrupted prompt is never used.
* `midpoint`: (k + 1/2) / steps. The smallest error for smooth metrics.

As steps grow, the scores of the edges out of `input` add up to metric(clean) - metric(corrupted) exactly. The average
does not depend on the direction, so noising and denoising estimates are the same.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from circuitfind.attribution.method import Method, Point
from circuitfind.errors import ScoreError, check_count, unknown

OFFSETS = {"left": 0.0, "midpoint": 0.5, "right": 1.0}


def check(options: Mapping[str, Any]) -> None:
    """
    Raises:
        ScoreError: no steps, or an unknown rule.
    """
    if options["rule"] not in OFFSETS:
        raise ScoreError(unknown("rule", options["rule"], OFFSETS))
    check_steps(options)


def check_steps(options: Mapping[str, Any]) -> None:
    """
    Raises:
        ScoreError: `steps` is not a whole number, 1 or more.
    """
    check_count("steps", options["steps"], 1)


def points(direction: str, n_layers: int, options: Mapping[str, Any]) -> list[Point]:
    """Equal weights on the line."""
    steps, offset = options["steps"], OFFSETS[options["rule"]]
    return [Point(1 / steps, (k + offset) / steps) for k in range(steps)]


METHOD = Method(
    "eap-ig-inputs",
    "gradients averaged between the prompts' embeddings",
    "Hanna et al. 2024",
    "2 forward, and 1 forward and backward a step",
    ("edge", "node", "place"),
    points=points,
    options={"steps": 5, "rule": "left"},
    check=check,
    twin=True,
    by_position=True,
    spellings=("eap-ig", "ig", "integrated-gradients", "eap-ig-input"),
)
