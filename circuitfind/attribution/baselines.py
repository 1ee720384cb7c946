"""Baselines that rank nodes and edges: by how much an output changes, by head importance, and at random.

**`activation`**: how much a writer's output changes, whether or not the change matters. Like magnitude pruning, it
needs no gradient. All edges from one writer to the attention of one layer have the same score.

    score(u)      = mean over examples of the sum over real tokens of ||D_u||
    score(u -> v) = mean over examples of the sum over real tokens of r_v ||D_u||

1. `D_u` is u's clean value minus its ablated value at a token (with `ablation="zero"`, u's output). If all norms of the
   model subtract the mean over `d_model`, so does `D_u`. The norm is the L2 norm over `d_model`.
2. `r_v` is the scale of v's norm in the clean run, so an edge's score is the change in the normed stream that v reads,
   without the norm's weight; 1 if v has no norm. The q, k and v readers of a layer share it.

**`hisp`**, the head importance score for pruning (Michel et al. 2019), as used by Conmy et al. (2023):

    score(u) = mean over examples of |sum over tokens of (u's clean value - u's ablated value) . gradient at u's output|

1. One gradient, as for `atp`. The only difference from `atp` is that each example's sum is replaced by its magnitude
   before the mean over examples, so a node that supports some examples and opposes others does not cancel to 0. Michel
   et al. use zero ablation, Conmy et al. the corrupted prompt's value; here it is the call's `ablation`.
2. `normalise`: divide each layer's scores by their L2 norm, heads and MLP together (Conmy et al.; Michel et al. score
   heads only). `input`, which is in no layer, becomes 1.

**`random`**: uniform in [0, 1), the same for the same seed on every machine.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from einops import einsum
from torch import Tensor

from circuitfind.attribution import eap
from circuitfind.attribution.gradients import Ends, mean_effects, mean_over
from circuitfind.attribution.method import Method, Request, Scored, as_array
from circuitfind.batch import Batch
from circuitfind.engine.capture import Run
from circuitfind.engine.experiment import Experiment
from circuitfind.engine.reader_gradients import ReaderGradients
from circuitfind.engine.stream_effects import node_effects
from circuitfind.engine.writers import Writers
from circuitfind.graph import Graph
from circuitfind.models.adapter import Adapter
from circuitfind.models.norms import Norm
from circuitfind.record import NO_EFFECT

HISP_SIGN = f"{NO_EFFECT}mean over examples of |first-order effect|, in units of the metric, never negative"
NORMALISED = f"{NO_EFFECT}mean over examples of |first-order effect|, as a share of its layer's L2 norm"
RANDOM_SIGN = f"{NO_EFFECT}random numbers, uniform in 0 to 1, in no unit"
SIGNS = {
    "node": f"{NO_EFFECT}L2 norm of how a node's output changes, summed over tokens, never negative",
    "edge": f"{NO_EFFECT}L2 norm of how a writer's output changes, times the scale of the reader's norm, never"
    " negative",
}


def norms_of_changes(experiment: Experiment, request: Request) -> Tensor:
    """Score edges, `[writers, readers]`, zero where there is no edge; or nodes, `[writers]` or by position `[writers,
    pos]`."""
    graph = experiment.graph

    def nodes(batch: Batch, _: slice) -> Tensor:
        return _norms(experiment, batch)[0].sum(1 if request.by_position else (1, 2))

    def edges(batch: Batch, _: slice) -> Tensor:
        norms, clean = _norms(experiment, batch)
        scores = norms.new_zeros(graph.n_writers, graph.n_readers)
        for layer, kind, scale in _scales(experiment.adapter, clean, norms):
            seen = norms[: graph.reads(layer, kind)]
            scores[: len(seen), graph.readers(layer, kind)] = einsum(seen, scale, "u b t, b t -> u").unsqueeze(1)
        return scores

    return mean_over(experiment, edges if request.level == "edge" else nodes, f"{request.level} scores")


def _norms(experiment: Experiment, batch: Batch) -> tuple[Tensor, Run]:
    """Return the norms `[writers, batch, pos]` of the writers' changes, zero at padding, and the clean run."""
    adapter, graph = experiment.adapter, experiment.graph
    ends = Ends(experiment, batch)
    clean, delta = ends.clean, ends.delta
    norms = delta.embed.new_empty(graph.n_writers, *delta.embed.shape[:2])

    def size(x: Tensor) -> Tensor:
        found: Tensor = torch.linalg.vector_norm(adapter.centre(x), dim=-1)
        return found

    norms[0] = size(delta.embed)
    for layer in range(graph.n_layers):
        norms[graph.heads(layer)] = size(adapter.head_outputs(layer, delta.heads[layer]))
        norms[graph.mlp(layer)] = size(delta.mlps[layer])
    return norms * batch.clean.mask.to(norms.device), clean


def _scales(adapter: Adapter, clean: Run, like: Tensor) -> Iterator[tuple[int, str, Tensor]]:
    """Yield (layer, kind of reader, scale `[batch, pos]` of the norm that the readers read through)."""

    def scale(norm: Norm | None, stream: Tensor) -> Tensor:
        return torch.ones_like(like[0]) if norm is None else norm.scale(stream.to(like)).squeeze(-1)

    for layer, view in enumerate(adapter.layers):
        yield layer, "qkv", scale(view.attn_norm, clean.resid[layer])
        yield layer, "mlp", scale(view.mlp_norm, clean.middle[layer])
    yield adapter.graph.n_layers, "logits", scale(adapter.final_norm, clean.resid[-1])


def head_importance(experiment: Experiment, request: Request) -> np.ndarray:
    """Return the head importance scores, `[writers]`."""

    def magnitudes(adapter: Adapter, delta: Writers, run: Run, gradients: ReaderGradients) -> Tensor:
        return node_effects(adapter, delta, run, gradients).sum(-1).abs().sum(-1)

    points = eap.one_end(experiment.setting.direction, experiment.graph.n_layers, request.options)
    values = as_array(mean_effects(experiment, points, magnitudes, "node scores"))
    return normalised(experiment.graph, values) if request.options["normalise"] else values


def normalised(graph: Graph, values: np.ndarray) -> np.ndarray:
    """Divide values `[writers]` by their layer's L2 norm; a layer of zeros stays zero."""
    parts = [slice(0, 1), *(slice(graph.head(layer), graph.head(layer + 1)) for layer in range(graph.n_layers))]
    values = values.copy()
    for part in parts:
        values[part] /= np.linalg.norm(values[part]) or 1
    return values


def random_numbers(experiment: Experiment, request: Request) -> Scored:
    """Return random scores: `[writers, readers]` for edges, `[writers]` for nodes."""
    graph = experiment.graph
    shape = graph.real.shape if request.level == "edge" else (graph.n_writers,)
    return np.random.default_rng(experiment.setting.seed).random(shape, dtype=np.float32)


ACTIVATION = Method(
    "activation",
    "how far apart clean and corrupted outputs are",
    "magnitude pruning",
    "2 forward",
    ("edge", "node"),
    score=norms_of_changes,
    sign=lambda level, options: SIGNS[level],
    by_position=True,
    ungrouped=True,
)
HISP = Method(
    "hisp",
    "head importance scores",
    "Michel et al. 2019",
    "2 forward, 1 backward",
    ("node",),
    score=head_importance,
    options={"normalise": False},
    sign=lambda level, options: NORMALISED if options["normalise"] else HISP_SIGN,
    at_clean=True,
    spellings=("head-importance", "head-importance-score"),
)
RANDOM = Method(
    "random",
    "a random ranking",
    "",
    "none",
    ("edge", "node"),
    score=random_numbers,
    sign=lambda level, options: RANDOM_SIGN,
    ungrouped=True,
)
