"""Edge scores on every example, from which any weighted mean over examples is one matrix product.

An edge's score is the mean over examples of its effect on each example. Gradients are taken in batches, as in
`attribute`, but the effects are not summed over examples:

    scores of a bootstrap resample with counts w  =  (w / sum w) @ effects,        effects [examples, edges]

The means of the "mean" ablations, and the pairing of "resample", are over all examples. A weighted mean of effects
keeps them, whereas `attribute` on a subset of the pairs would take them over the subset.
"""

from __future__ import annotations

import numpy as np
import torch

from circuitfind.attribution.gradients import check_not_flat, check_slope, edges_of
from circuitfind.attribution.method import Method, Request
from circuitfind.attribution.methods import METHODS
from circuitfind.batch import Batch
from circuitfind.engine.experiment import Experiment
from circuitfind.engine.memory_plan import BY_EXAMPLE
from circuitfind.errors import ScoreError


def check_by_example(method: Method) -> None:
    """Raise ScoreError, naming other methods, if a method cannot score edges on every example."""
    if not method.by_example:
        known = ", ".join(name for name, one in METHODS.items() if one.by_example)
        raise ScoreError(
            f"method '{method.name}' does not score edges example by example: use one of {known}, or give search=, a"
            " function from a task to its circuit"
        )


def example_effects(experiment: Experiment, method: Method, request: Request) -> np.ndarray:
    """Return the effects `[examples, edges]` as float32, in units of the metric, positive = supports; edges in the
    order of `Scores.to_dict`. ScoreError if the metric is flat at the clean run, the mean effects vanish, or the result
    would not fit in memory."""
    graph = experiment.graph
    check_slope(experiment, method)
    size = len(experiment) * graph.n_edges * 4
    if size > BY_EXAMPLE:
        raise ScoreError(
            f"scores of {len(experiment)} pairs x {graph.n_edges:,} edges take {size / 2**30:.0f} GiB: give at most"
            f" {BY_EXAMPLE // (graph.n_edges * 4)} pairs, task.on(model).subset(range(...)), or search="
        )
    if method.examples is not None:
        return method.examples(experiment).T.astype(np.float32)
    assert method.points is not None, "checked by check_by_example"
    cells = torch.from_numpy(graph.real.T)
    points = method.points(experiment.setting.direction, graph.n_layers, request.options)

    def one(batch: Batch, _: slice) -> tuple[np.ndarray, float]:
        example = torch.arange(len(batch), device=batch.clean.ids.device)[:, None].expand_as(batch.clean.ids)
        effects, largest = edges_of(experiment, batch, points, example, len(batch))
        return effects.transpose(1, 2)[:, cells.to(effects.device)].float().cpu().numpy(), largest

    found = experiment.in_batches(one, "edge scores by example")
    parts, sizes = zip(*(part for _, part in found), strict=True)
    effects = np.concatenate(parts)
    check_not_flat(experiment.metric, torch.from_numpy(effects.mean(0)), max(sizes))
    return effects
