"""GradDrop of AtP*: first-order effects with each layer's gradient dropped in turn, and the mean of their magnitudes.

    score(n) = mean over examples of the mean over layers l without n of |I_l(n)|       (Kramár et al. 2024, 3.1.2)

1. `I_l(n)` is the first-order effect of n where no gradient flows through layer l's attention and MLP, so that paths
   through them do not count. The gradient is taken with what these two put out held constant; the forward pass is
   the same.
2. A node of layer l has no `I_l`: the mean is over the other layers (the residual stream's is over all of them).
3. Magnitudes are taken of each example and each dropped layer, so nothing cancels: neither a node's direct effect with
   what a later layer makes of it, nor one example with another. The result ranks places; it is not an effect, and has
   no sign.

What one later layer cancels survives in the term that drops this layer, at a layers-th of its size. Costs one forward
and one backward pass a layer.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from circuitfind.attribution.components import Base, Estimate, place_effects
from circuitfind.attribution.gradients import Effects, check_not_flat
from circuitfind.attribution.method import Method, Request, Scored
from circuitfind.attribution.qk_fix import KINDS, query_key_changes
from circuitfind.batch import Batch, Inputs
from circuitfind.engine.capture import Gradients, Run, capture, capture_corrupted, capture_gradients
from circuitfind.engine.experiment import Experiment
from circuitfind.engine.stream_effects import node_effects
from circuitfind.errors import ScoreError
from circuitfind.graph import Graph
from circuitfind.metrics import Metric
from circuitfind.models.adapter import Adapter
from circuitfind.record import NO_EFFECT

SIGN = f"{NO_EFFECT}mean magnitude of first-order effects with one layer's gradient dropped, in units of the metric"
NO_LAYER = -1  # of what is no part of a layer's attention or MLP: the embedding, the residual stream


def check_layers(graph: Graph) -> None:
    """Before anything is run.

    Raises:
        ScoreError: a model of one layer, which cannot be dropped for its own nodes.
    """
    if graph.n_layers < 2:
        raise ScoreError("'atp-star' drops the gradient of every other layer, and this model has one: use 'atp'")


def dropped(adapter: Adapter, inputs: Inputs, base: Run, batch: Batch, metric: Metric) -> Iterator[Gradients]:
    """Gradients with layer 0 dropped, then layer 1, and so on.

    Args:
        base: a run on these inputs.
        batch: what the metric is given beside the logits.
    """
    for layer in range(adapter.graph.n_layers):
        held = {("attn_out", layer): base.attn_out[layer], ("mlp_out", layer): base.mlp_out[layer]}
        yield capture_gradients(adapter, inputs, lambda logits: metric(logits, batch), outputs=held)


def mean_magnitude(effects: Tensor, layers: list[int]) -> Tensor:
    """`[places, ...]` from effects `[dropped layer, places, ...]`.

    Args:
        layers: of each place; `NO_LAYER` for one of the residual stream.
    """
    at = torch.arange(len(effects), device=effects.device).unsqueeze(1)
    counts = (at != torch.tensor(layers, device=effects.device)).to(effects)
    counts = counts.view(*counts.shape, *[1] * (effects.ndim - 2))
    return (effects.abs() * counts).sum(0) / counts.sum(0)


def node_magnitudes(experiment: Experiment) -> Tensor:
    """`[writers]` scores, never negative.

    Raises:
        ScoreError: the gradient vanishes, or the model has one layer only.
    """
    adapter, metric, graph = experiment.adapter, experiment.metric, experiment.graph
    check_layers(graph)
    layers = [NO_LAYER, *(graph.layer_of(writer) for writer in range(1, graph.n_writers))]

    def one(batch: Batch, _: slice) -> tuple[Tensor, float]:
        clean = capture(adapter, batch.clean, stop=not metric.reference)
        batch = batch.with_reference(clean.logits) if metric.reference else batch
        corrupted = capture_corrupted(adapter, batch, stop=True) if experiment.ablation.corrupted else None
        delta = clean.writers.minus(experiment.ablated(clean, corrupted))
        inputs, base = batch.clean, clean
        if not experiment.setting.noising:
            assert corrupted is not None, "denoising is checked to interchange"
            inputs, base = batch.corrupted, corrupted
        found, sizes = [], []
        for run, gradients, values in dropped(adapter, inputs, base, batch, metric):
            found.append(node_effects(adapter, delta, run, gradients).sum(-1))
            sizes.append(float(values.abs().max()))
        return mean_magnitude(torch.stack(found), layers).sum(-1), max(sizes)

    parts, sizes = zip(*(part for _, part in experiment.in_batches(one, "node scores")), strict=True)
    total = torch.stack(parts).sum(0) / len(experiment)
    check_not_flat(metric, total, max(sizes))
    return total


def score(experiment: Experiment, request: Request) -> Scored:
    """Nodes, or places: queries and keys by the QK fix, too."""
    check_layers(experiment.graph)
    if request.level == "node":
        return node_magnitudes(experiment)
    changes = query_key_changes if request.what in KINDS else None
    return place_effects(experiment, METHOD, request, Estimate(_passes, changes, mean_magnitude))


def _passes(experiment: Experiment, base: Base, effects: Effects) -> Iterator[tuple[Tensor, float]]:
    for run, gradients, values in dropped(experiment.adapter, base.inputs, base.run, base.batch, experiment.metric):
        found = effects(experiment.adapter, base.run.writers, run, gradients)
        yield found, float(values.abs().max())


METHOD = Method(
    "atp-star",
    "attribution patching of nodes, each layer's gradient dropped",
    "Kramár et al. 2024",
    "2 forward, and 1 forward and backward a layer",
    ("node", "place"),
    score=score,
    sign=lambda level, options: SIGN,
    at_clean=True,
    spellings=("atp*", "atpstar", "graddrop"),
)
