"""EAP with integrated gradients over activations (EAP-IG-activations, Hanna et al. 2024).

1. One component at a time (`input`, a layer's attention with all its heads together, a layer's MLP) is held at points
   of the line from its corrupted to its clean output, k / steps for k = 1 .. steps; the prompt is the clean one. A held
   output is a constant: no gradient flows through it.
2. The gradients at all readers are averaged over all components and points, with equal weights.

What is held is the module's own output; a post-norm, where a family has one, comes after it. (2 layers + 1) x steps
gradients are taken. The average does not depend on the direction, and neither does the score.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from circuitfind.attribution.eap_ig_inputs import check_steps
from circuitfind.attribution.method import Method, Point


def points(direction: str, n_layers: int, options: Mapping[str, Any]) -> list[Point]:
    """Equal weights on the line of every component."""
    steps: int = options["steps"]
    held = [None, *((site, layer) for layer in range(n_layers) for site in ("attn_out", "mlp_out"))]
    weight = 1 / (steps * len(held))
    return [Point(weight, k / steps, component) for component in held for k in range(1, steps + 1)]


METHOD = Method(
    "eap-ig-activations",
    "gradients averaged between the nodes' outputs",
    "Hanna et al. 2024",
    "2 forward, and 1 forward and backward a step and component (2 a layer, and the input)",
    ("edge", "node"),
    points=points,
    options={"steps": 5},
    check=check_steps,
    twin=True,
    by_position=True,
    spellings=("eap-ig-activation", "eap-ig-acts"),
)
