"""Methods that average gradients over points between the two prompts; `gradients.py` takes the gradients.

* `eap` for edges (Syed et al. 2023), `atp` for nodes and places (Nanda 2023): one gradient, at the clean prompt for the
  noising effect, at the corrupted prompt for the denoising effect. This is the first-order Taylor term of exact
  patching. It is exact for a linear model and fails where the metric is strongly nonlinear between the prompts: at
  early MLPs above all, at saturated attention, and for any metric that is flat at the clean run (`kl`).
* `clean-corrupted` (Hanna et al. 2024): the mean of the gradients at both prompts, which is the trapezoidal rule on the
  line of `eap-ig-inputs`. It works with metrics that are flat at the clean run, for one more backward pass.
* `eap-ig-inputs` (EAP-IG, Hanna et al. 2024): `steps` points on the line from the corrupted to the clean embedding (the
  residual stream that enters layer 0; positions are the same on both sides). Rules, k = 0 .. steps-1: `left`,
  k / steps, never uses the clean prompt (the EAP-IG library's choice, and the default); `right`, (k + 1) / steps, never
  uses the corrupted prompt; `midpoint`, (k + 1/2) / steps, has the smallest error for smooth metrics. As steps grow,
  the sum of the scores of the edges out of `input` tends to metric(clean) - metric(corrupted).
* `eap-ig-activations` (Hanna et al. 2024): on the clean prompt, the output of one component at a time (`input`, a
  layer's attention with all its heads, a layer's MLP) is replaced by the point k / steps, k = 1 .. steps, of the line
  from its corrupted to its clean value, before the post-norm if there is one. A replaced attention or MLP output is a
  constant: no gradient flows through it. All components and points have equal weights.
* `relp` (Jafari et al. 2025): `eap` and `atp` with other backward rules (`engine/backward_rules.py`): norm scales are
  constants, an activation's derivative is `act(x) / x`, and each factor of a gated MLP gets half the gradient.
* `gim` (Edin et al. 2025): likewise, with rules for attention in place of the rule for activations: softmax gradients
  at temperature 2, and scaled gradients at queries, keys and values.

`clean-corrupted` and the two EAP-IG methods score the same whatever the direction.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from circuitfind.attribution.method import LEVELS, Method, Point, Points
from circuitfind.engine.backward_rules import GIM as GIM_RULES, RELP as RELP_RULES, Rules
from circuitfind.errors import ScoreError, check_count, unknown

OFFSETS = {"left": 0.0, "midpoint": 0.5, "right": 1.0}
MOST_STEPS = 100_000
Options = Mapping[str, Any]


def one_end(direction: str, n_layers: int, options: Options) -> list[Point]:
    return [Point(1.0, 1.0 if direction == "noising" else 0.0)]


def by_rules(rules: Rules) -> Points:
    """Return the points of `one_end` with other backward rules."""
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
    """Raise ScoreError for an unknown rule, or for steps that are not a whole number from 1 to `MOST_STEPS`."""
    if options.get("rule", "left") not in OFFSETS:
        raise ScoreError(unknown("rule", options["rule"], OFFSETS))
    check_count("steps", options["steps"], 1, MOST_STEPS)


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
