"""Edge scores of every example, from which any weighted mean over examples is one matrix product.

A score is a mean over examples of `sum over points of weight * contraction(example)`, and examples are
independent. So the gradients are taken in batches as for `attribute`, and only the contraction keeps them apart:

    scores of a resample with counts w  =  (w / sum w) @ effects,        effects [examples, edges]

What the "mean" ablations put in place of a writer, and the pairing of "resample", are those of all examples: a weighted
mean keeps them, where `attribute` on a part of the pairs would compute them of that part.
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
    """Raises ScoreError, naming other methods, where scores are not means over examples."""
    if not method.by_example:
        known = ", ".join(name for name, one in METHODS.items() if one.by_example)
        raise ScoreError(
            f"method '{method.name}' does not score edges example by example: use one of {known}, or give search=, a"
            " function from a task to its circuit"
        )


def example_effects(experiment: Experiment, method: Method, request: Request) -> np.ndarray:
    """`[examples, edges]` float32 in units of the metric, positive = supports; edges as `Scores.to_dict` orders them.
    ScoreError where the metric is flat, the gradient vanishes on all examples, or the result would not fit in
    memory."""
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
