"""HISP, the head importance score for pruning (Michel et al. 2019), in the form that ACDC is compared with.

    score(u) = mean over examples of |sum over tokens of (u's clean value - u's ablated value) . gradient at u's output|

1. One gradient, as for attribution patching: at the clean prompt, or the corrupted one when denoising.
2. The magnitude is taken of each example's sum, *inside* the mean, so that a node which supports some examples and
   opposes others still scores. This is the only difference from `atp`. Michel et al. ablate with zeros, Conmy et al.
   (2023) with the corrupted prompt's value; here `ablation` decides.
3. `normalised`: each layer's scores divided by the L2 norm of all of them, heads and MLP together (Conmy et al. 2023;
   Michel et al. have heads only). `input`, which is in no layer, becomes 1.
"""

from __future__ import annotations

import numpy as np
from torch import Tensor

from circuitfind.attribution import eap
from circuitfind.attribution.gradients import mean_effects
from circuitfind.attribution.method import Method, Request, Scored, as_array
from circuitfind.engine.capture import ReaderGradients, Run
from circuitfind.engine.experiment import Experiment
from circuitfind.engine.stream_effects import node_effects
from circuitfind.engine.writers import Writers
from circuitfind.graph import Graph
from circuitfind.models.adapter import Adapter
from circuitfind.record import NO_EFFECT

SIGN = f"{NO_EFFECT}mean over examples of |first-order effect|, in units of the metric, never negative"
NORMALISED = f"{NO_EFFECT}mean over examples of |first-order effect|, as a share of its layer's L2 norm"


def magnitudes(adapter: Adapter, delta: Writers, run: Run, gradients: ReaderGradients) -> Tensor:
    """`[writers]`: each example's magnitude, summed over examples; arguments as for `node_effects`."""
    return node_effects(adapter, delta, run, gradients).sum(-1).abs().sum(-1)


def normalised(graph: Graph, values: np.ndarray) -> np.ndarray:
    """`[writers]` values by layer, divided by the layer's L2 norm; a layer of zeros stays zero."""
    parts = [slice(0, 1), *(slice(graph.head(layer), graph.head(layer + 1)) for layer in range(graph.n_layers))]
    values = values.copy()
    for part in parts:
        values[part] /= np.linalg.norm(values[part]) or 1
    return values


def score(experiment: Experiment, request: Request) -> Scored:
    """Nodes."""
    points = eap.one_end(experiment.setting.direction, experiment.graph.n_layers, request.options)
    values = as_array(mean_effects(experiment, points, magnitudes, "node scores"))
    return normalised(experiment.graph, values) if request.options["normalise"] else values


METHOD = Method(
    "hisp",
    "head importance scores",
    "Michel et al. 2019",
    "2 forward, 1 backward",
    ("node",),
    score=score,
    options={"normalise": False},
    sign=lambda level, options: NORMALISED if options["normalise"] else SIGN,
    at_clean=True,
    spellings=("head-importance", "head-importance-score"),
)
