"""`attribute`: scores of every edge or node by a method's name."""

from __future__ import annotations

from functools import partial
from os import PathLike
from typing import Any

import numpy as np
import torch
from torch import Tensor

from circuitfind.attribution import clean_corrupted, eap, eap_ig_inputs
from circuitfind.attribution.exact import exact_effects
from circuitfind.attribution.gradients import Pairs, Point, check_direction
from circuitfind.attribution.record import make_record
from circuitfind.engine.capture import ReaderGradients, Run, Writers
from circuitfind.engine.contract import edge_effects
from circuitfind.engine.node_effects import node_effects
from circuitfind.errors import ScoreError
from circuitfind.loading import bind
from circuitfind.metrics import Function, Metric
from circuitfind.models.adapter import Adapter
from circuitfind.models.load import Model
from circuitfind.scores import NodeScores, Scores
from circuitfind.tasks.task import BoundTask, Task

EDGE_METHODS = ("eap", "eap-ig-inputs", "clean-corrupted", "exact")
NODE_METHODS = ("atp", "eap-ig-inputs", "clean-corrupted")
AVERAGED = ("eap-ig-inputs", "clean-corrupted")


def attribute(
    model: Model,
    task: Task | BoundTask,
    method: str | None = None,
    *,
    level: str = "edge",
    steps: int = 5,
    rule: str = "left",
    metric: str | Metric | Function | None = None,
    ablation: str = "corrupted",
    direction: str = "noising",
    by_position: bool = False,
    batch_size: int | None = None,
    seed: int = 0,
    checkpoint: str | PathLike[str] | None = None,
) -> Scores | NodeScores:
    """Scores every edge, or every node, of a model on a task.

    Args:
        method: edges: "eap", "eap-ig-inputs" (the default), "clean-corrupted", "exact"; nodes: "atp" (the default),
            "eap-ig-inputs", "clean-corrupted".
        level: "edge" or "node".
        steps, rule: of integrated gradients.
        metric: overrides the task's.
        ablation: what an ablated edge carries: "corrupted", "zero", "mean", "mean-position" or "resample".
        direction: "noising" or "denoising".
        by_position: node scores by position; prompts of one length only.
        batch_size: pairs at a time; by default as many as a memory budget allows.
        seed: of the "resample" ablation.
        checkpoint: for "exact": a file that a stopped run leaves and the same call continues from.

    Returns:
        `Scores` or `NodeScores`, in units of the metric, positive = supports the behaviour.

    Raises:
        ScoreError: the method cannot score this (a metric flat at the clean run, a vanishing gradient, NaN).
        TaskError: the task does not fit the model or the ablation.
    """
    method = method or ("eap-ig-inputs" if level == "edge" else "atp")
    _check_method(method, level, ablation, direction, by_position)
    bound = bind(model, task).with_metric(metric)
    if by_position and (bound.batch.clean.padded or bound.batch.corrupted.padded):
        raise ScoreError(
            "by_position=True needs prompts of one length, these differ: their positions do not correspond"
        )
    if bound.metric.flat_at_clean and method in ("eap", "atp") and direction == "noising":
        raise ScoreError(
            f"metric '{bound.metric.name}' is flat at the clean run (its gradient is zero there), so '{method}' would"
            " return noise: use method='eap-ig-inputs' or 'clean-corrupted', or direction='denoising'"
        )
    pairs = Pairs.of(model.adapter, bound.batch, bound.metric, ablation, seed, batch_size)
    settings: dict[str, Any] = {"level": level}
    if method == "eap-ig-inputs":
        settings |= {"steps": steps, "rule": rule}
    record = make_record(model, bound, method, ablation, direction, seed, **settings)
    if method == "exact":
        values = exact_effects(pairs, model.graph.real, direction, batch_size, checkpoint).matrix(
            model.graph.real.shape
        )
        return Scores(model.graph, np.where(model.graph.real, values, 0), record)
    points = _points(method, steps, rule, direction)
    if level == "edge":
        return Scores(model.graph, _numpy(pairs.mean_effects(points, edge_effects, batch_size, "edge scores")), record)
    kernel = partial(_summed_node_effects, by_position=by_position)
    return NodeScores(model.graph, _numpy(pairs.mean_effects(points, kernel, batch_size, "node scores")), record)


def _points(method: str, steps: int, rule: str, direction: str) -> list[Point]:
    if method == "eap-ig-inputs":
        return eap_ig_inputs.points(steps, rule)
    return clean_corrupted.points() if method == "clean-corrupted" else eap.points(direction)


def _check_method(method: str, level: str, ablation: str, direction: str, by_position: bool) -> None:
    if level not in ("edge", "node"):
        raise ScoreError(f"level '{level}' is unknown: use 'edge' or 'node'")
    known = EDGE_METHODS if level == "edge" else NODE_METHODS
    if method not in known:
        raise ScoreError(f"method '{method}' does not score {level}s: use one of {', '.join(known)}")
    check_direction(direction, ablation)
    if ablation != "corrupted" and method in AVERAGED:
        raise ScoreError(
            f"method '{method}' goes between the clean and the corrupted run: it needs ablation='corrupted'"
        )
    if by_position and level == "edge":
        raise ScoreError("by_position=True scores nodes: use level='node'")


def _summed_node_effects(
    adapter: Adapter, delta: Writers, run: Run, gradients: ReaderGradients, by_position: bool
) -> Tensor:
    """`[writers]`, or `[writers, pos]`."""
    effects = node_effects(adapter, delta, run, gradients).sum(1)
    return effects if by_position else effects.sum(-1)


def _numpy(values: Tensor) -> np.ndarray:
    return values.to(torch.float32).cpu().numpy()
