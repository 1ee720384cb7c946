"""Edge attribution patching (Syed et al. 2023) and, over nodes, attribution patching (Nanda 2023).

One gradient: at the clean prompt for the noising effect, at the corrupted prompt for the denoising one. It is the
first-order Taylor term of exact patching, exact for a linear model; it fails where the metric bends between the two
prompts: early MLPs above all, saturated attention, and any metric that is flat at the clean run (`kl`).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from circuitfind.attribution.method import Method, Point


def points(direction: str, n_layers: int = 0, options: Mapping[str, Any] | None = None) -> list[Point]:
    """The one point of the gradient."""
    return [Point(1.0, 1.0 if direction == "noising" else 0.0)]


EAP = Method(
    "eap",
    "edge attribution patching",
    "Syed et al. 2023",
    "2 forward, 1 backward",
    ("edge",),
    points=points,
    at_clean=True,
)
ATP = Method(
    "atp",
    "attribution patching of nodes",
    "Nanda 2023",
    "2 forward, 1 backward",
    ("node", "place"),
    points=points,
    at_clean=True,
    by_position=True,
)
