"""Gradients averaged over points between the corrupted and the clean embedding: shared by EAP and what builds on it.

    effect(u -> v) ~ (u's clean value - u's ablated value) . mean over points of the gradient at v's input

A method is a list of `Point`s: where on the line `corrupted + alpha (clean - corrupted)` a gradient is taken, and its
weight. The line is that of the residual entering layer 0, or of one component's output. EAP is the clean point alone.
Where prompts are aligned, the line's corrupted end is the clean prompt with the corrupted embedding at its positions
(`engine/capture.py`).

The contraction with the gradients (`engine/stream_effects.py`) differs for edges, nodes and places.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import nullcontext

import torch
from torch import Tensor

from circuitfind.attribution.method import Method, Point
from circuitfind.batch import Batch
from circuitfind.engine.capture import ReaderGradients, Run, capture, capture_corrupted, capture_gradients
from circuitfind.engine.experiment import Experiment
from circuitfind.engine.relevance import relevance_rules
from circuitfind.engine.writers import Writers
from circuitfind.errors import ScoreError
from circuitfind.metrics import Metric
from circuitfind.models.adapter import Adapter

SMALLEST = 1e-6  # scores below this part of the metric are rounding noise around a vanishing gradient

Effects = Callable[[Adapter, Writers, Run, ReaderGradients], Tensor]


def mean_over(experiment: Experiment, one: Callable[[Batch, slice], Tensor], label: str) -> Tensor:
    """The mean over examples of what is summed over each batch of them."""
    parts = [part for _, part in experiment.in_batches(one, label)]
    return torch.stack(parts).sum(0) / len(experiment)


def mean_effects(experiment: Experiment, points: list[Point], effects: Effects, label: str) -> Tensor:
    """Weighted sum of effects over points, mean over examples.

    Args:
        effects: `edge_effects`, `node_effects` or the like: sums over a batch's examples.

    Raises:
        ScoreError: the gradient vanishes.
    """
    sizes: list[float] = []

    def one(batch: Batch, _: slice) -> Tensor:
        total = None
        for found, largest in point_effects(experiment, batch, points, effects):
            total = found if total is None else total + found
            sizes.append(largest)
        assert total is not None, "a method has a point"
        return total

    total = mean_over(experiment, one, label)
    check_not_flat(experiment.metric, total, max(sizes))
    return total


def point_effects(
    experiment: Experiment, batch: Batch, points: list[Point], effects: Effects
) -> Iterator[tuple[Tensor, float]]:
    """One gradient pass a point: its weighted effects, and the metric's largest magnitude there."""
    metric, adapter, clean, corrupted = experiment.metric, experiment.adapter, None, None
    if metric.reference or any(point.alpha != 1 or point.component for point in points):
        clean = capture(adapter, batch.clean, stop=not metric.reference)
        batch = batch.with_reference(clean.logits) if metric.reference else batch
    if experiment.ablation.corrupted:
        corrupted = capture_corrupted(adapter, batch, stop=True)
    for weight, alpha, component, relevance in points:
        embed, outputs = None, None
        if clean is not None and corrupted is not None:
            if component is not None:
                site, layer = component
                low, high = getattr(corrupted, site)[layer], getattr(clean, site)[layer]
                outputs = {component: low + alpha * (high - low)}
            elif 0 < alpha < 1 or (alpha == 0 and batch.alignment is not None):
                embed = corrupted.resid[0] + alpha * (clean.resid[0] - corrupted.resid[0])
        at_corrupted = alpha == 0 and component is None and batch.alignment is None
        inputs = batch.corrupted if at_corrupted else batch.clean
        with relevance_rules(adapter) if relevance else nullcontext(adapter) as ruled:
            run, gradients, values = capture_gradients(
                adapter, inputs, lambda logits: metric(logits, batch), embed, outputs
            )
        clean = run if clean is None else clean  # then the first point is the clean one
        delta = clean.writers.minus(experiment.ablated(clean, corrupted))
        with torch.no_grad():
            found = weight * effects(ruled, delta, run, gradients)
        del run, gradients, delta  # the next point needs the room
        yield found, float(values.abs().max())


def check_slope(experiment: Experiment, method: Method) -> None:
    """Raises ScoreError for one gradient at the clean run where that of the metric is zero by definition."""
    if experiment.metric.flat_at_clean and method.at_clean and experiment.setting.noising:
        raise ScoreError(
            f"metric '{experiment.metric.name}' is flat at the clean run (its gradient is zero there), so"
            f" '{method.name}' would return noise: use method='eap-ig-inputs' or 'clean-corrupted', or"
            " direction='denoising'"
        )


def check_not_flat(metric: Metric, total: Tensor, largest: float) -> None:
    """Raises ScoreError where the scores `total` are noise: `largest` is the metric's size at the gradients."""
    size = float(total.abs().max())
    if size <= SMALLEST * largest or size == 0:
        raise ScoreError(
            f"the gradient of metric '{metric.name}' vanishes: the largest score is {size:.1g} where the metric itself"
            f" is {largest:.3g}. Scores would be rounding noise: use method='eap-ig-inputs', 'clean-corrupted' or"
            " 'exact', or another metric"
        )
