"""Edge attribution patching (Syed et al. 2023), for nodes attribution patching (Nanda 2023), and a two-point average.

One gradient: at the clean prompt for the noising effect, at the corrupted prompt for the denoising one. It is the
first-order Taylor term of exact patching, exact for a linear model; it fails where the metric bends between the two
prompts: early MLPs above all, saturated attention, and any metric that is flat at the clean run (`kl`).

`clean-corrupted` (Hanna et al. 2024) takes half the gradient at the clean prompt and half at the corrupted one: the
trapezoid of the integrated-gradients line with its end points only. It repairs flat metrics at the price of one more
backward pass, and does not depend on the direction.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from circuitfind.attribution.method import Method, Point


def points(direction: str, n_layers: int = 0, options: Mapping[str, Any] | None = None) -> list[Point]:
    """The one point of the gradient."""
    return [Point(1.0, 1.0 if direction == "noising" else 0.0)]


def both_ends(direction: str, n_layers: int, options: Mapping[str, Any]) -> list[Point]:
    """Both ends, equal weights."""
    return [Point(0.5, 1.0), Point(0.5, 0.0)]


EAP = Method(
    "eap",
    "edge attribution patching",
    "Syed et al. 2023",
    "2 forward, 1 backward",
    ("edge",),
    points=points,
    at_clean=True,
    spellings=("edge-attribution-patching",),
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
    spellings=("attribution-patching", "attr-patch"),
)
CLEAN_CORRUPTED = Method(
    "clean-corrupted",
    "gradients averaged over both prompts",
    "Hanna et al. 2024",
    "2 forward and backward, 2 forward",
    ("edge", "node", "place"),
    points=both_ends,
    twin=True,
    by_position=True,
    spellings=("eap-clean-corrupted", "clean-corrupt", "corrupted-clean"),
)
