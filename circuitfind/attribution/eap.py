"""Methods that average gradients over points between the two prompts; `gradients.py` takes and contracts them.

* `eap` (Syed et al. 2023), of nodes and places `atp` (Nanda 2023): one gradient, at the clean prompt for the noising
  effect, at the corrupted prompt for the denoising one. The first-order Taylor term of exact patching, exact for a
  linear model; it fails where the metric bends between the prompts: early MLPs above all, saturated attention, and any
  metric that is flat at the clean run (`kl`).
* `clean-corrupted` (Hanna et al. 2024): half the gradient at either prompt, the trapezoid of `eap-ig-inputs` with its
  end points only. It repairs flat metrics for one more backward pass.
* `eap-ig-inputs` (EAP-IG, Hanna et al. 2024): `steps` points on the line from the corrupted to the clean embedding (the
  residual that enters layer 0; positions are the same on both sides). Rules, k = 0 .. steps-1: `left`, k / steps, never
  uses the clean prompt (the EAP-IG library's choice, and the default); `right`, (k + 1) / steps, never the corrupted
  one; `midpoint`, (k + 1/2) / steps, has the smallest error for smooth metrics. As steps grow, the scores of the edges
  out of `input` add up to metric(clean) - metric(corrupted) exactly.
* `eap-ig-activations` (Hanna et al. 2024): in the clean prompt, one component at a time (`input`, a layer's attention
  with all its heads, a layer's MLP) is held at k / steps, k = 1 .. steps, of the line from its corrupted to its clean
  output, before a post-norm where a family has one. A held output is a constant: no gradient flows through it. All
  components and points have equal weights.
* `relp` (Jafari et al. 2025): as `eap` and `atp`, with a coefficient in place of the gradient that goes back by the
  rules of `engine/backward_rules.py`: constant norm scales, activations as `act(x) / x`, half for either factor of a
  gated MLP.
* `gim` (Edin et al. 2025): the same with rules for attention in place of that for activations: softmax at temperature
  2, and less than what arrives at queries, keys and values.

The three that average do not depend on the direction, and neither do their scores.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from circuitfind.attribution.method import LEVELS, Method, Point, Points
from circuitfind.engine.backward_rules import GIM as GIM_RULES, RELP as RELP_RULES, Rules
from circuitfind.errors import ScoreError, check_count, unknown

OFFSETS = {"left": 0.0, "midpoint": 0.5, "right": 1.0}
Options = Mapping[str, Any]


def one_end(direction: str, n_layers: int, options: Options) -> list[Point]:
    return [Point(1.0, 1.0 if direction == "noising" else 0.0)]


def by_rules(rules: Rules) -> Points:
    """One end, as `one_end`, with a gradient that goes back by rules."""
    return lambda *asked: [point._replace(rules=rules) for point in one_end(*asked)]


def both_ends(direction: str, n_layers: int, options: Options) -> list[Point]:
    return [Point(0.5, 1.0), Point(0.5, 0.0)]


def between_embeddings(direction: str, n_layers: int, options: Options) -> list[Point]:
    steps, offset = options["steps"], OFFSETS[options["rule"]]
    return [Point(1 / steps, (k + offset) / steps) for k in range(steps)]


def between_outputs(direction: str, n_layers: int, options: Options) -> list[Point]:
    steps: int = options["steps"]
    held = [None, *((site, layer) for layer in range(n_layers) for site in ("attn_out", "mlp_out"))]
    weight = 1 / (steps * len(held))
    return [Point(weight, k / steps, component) for component in held for k in range(1, steps + 1)]


def check(options: Options) -> None:
    """Raises ScoreError for an unknown rule, or for steps that are not a whole number within reason."""
    if options.get("rule", "left") not in OFFSETS:
        raise ScoreError(unknown("rule", options["rule"], OFFSETS))
    check_count("steps", options["steps"], 1, MOST_STEPS)


MOST_STEPS = 100_000
EAP = Method(
    "eap",
    "edge attribution patching",
    "Syed et al. 2023",
    "2 forward, 1 backward",
    ("edge",),
    points=one_end,
    at_clean=True,
    spellings=("edge-attribution-patching",),
)
ATP = Method(
    "atp",
    "attribution patching of nodes",
    "Nanda 2023",
    "2 forward, 1 backward",
    ("node", "place"),
    points=one_end,
    at_clean=True,
    by_position=True,
    spellings=("attribution-patching", "attr-patch"),
)
CLEAN_CORRUPTED = Method(
    "clean-corrupted",
    "gradients averaged over both prompts",
    "Hanna et al. 2024",
    "2 forward and backward, 2 forward",
    LEVELS,
    points=both_ends,
    twin=True,
    by_position=True,
    spellings=("eap-clean-corrupted", "clean-corrupt", "corrupted-clean"),
)
INPUTS = Method(
    "eap-ig-inputs",
    "gradients averaged between the prompts' embeddings",
    "Hanna et al. 2024",
    "2 forward, and 1 forward and backward a step",
    LEVELS,
    points=between_embeddings,
    options={"steps": 5, "rule": "left"},
    check=check,
    twin=True,
    by_position=True,
    spellings=("eap-ig", "ig", "integrated-gradients", "eap-ig-input"),
)
ACTIVATIONS = Method(
    "eap-ig-activations",
    "gradients averaged between the nodes' outputs",
    "Hanna et al. 2024",
    "2 forward, and 1 forward and backward a step and component (2 a layer, and the input)",
    ("edge", "node"),
    points=between_outputs,
    options={"steps": 5},
    check=check,
    twin=True,
    by_position=True,
    spellings=("eap-ig-activation", "eap-ig-acts"),
)
RELP = Method(
    "relp",
    "attribution patching by rules of relevance propagation",
    "Jafari et al. 2025",
    "2 forward, 1 backward",
    LEVELS,
    points=by_rules(RELP_RULES),
    at_clean=True,
    by_position=True,
)
GIM = Method(
    "gim",
    "attribution patching with gradients corrected for interactions",
    "Edin et al. 2025",
    "2 forward, 1 backward",
    LEVELS,
    points=by_rules(GIM_RULES),
    at_clean=True,
    by_position=True,
    spellings=("gradient-interaction-modifications",),
)
