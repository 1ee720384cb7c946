"""`attribute`: scores of every edge, node or place of a sweep by a method's name."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from functools import partial
from os import PathLike
from typing import Any

import numpy as np
import torch
from torch import Tensor

from circuitfind.attribution import (
    activation,
    clean_corrupted,
    eap,
    eap_ig_activations,
    eap_ig_inputs,
    grad_drop,
    hisp,
    ifr,
    random_scores,
    relp,
    weights,
)
from circuitfind.attribution.components import component_effects
from circuitfind.attribution.direct import direct_effects
from circuitfind.attribution.exact import exact_effects
from circuitfind.attribution.exact_nodes import exact_node_effects
from circuitfind.attribution.gradients import Pairs, Point
from circuitfind.attribution.methods import ONE_GRADIENT, check_method
from circuitfind.engine.capture import ReaderGradients, Run, Writers
from circuitfind.engine.contract import edge_effects
from circuitfind.engine.node_effects import node_effects
from circuitfind.errors import ScoreError
from circuitfind.loading import bind
from circuitfind.metrics import Function, Metric
from circuitfind.models.adapter import Adapter
from circuitfind.models.load import Model
from circuitfind.patching.patch import patch
from circuitfind.patching.stretches import stretches
from circuitfind.patching.sweep import Sweep
from circuitfind.record import SIGN
from circuitfind.remote.call import remotable
from circuitfind.scores import NodeScores, Scores
from circuitfind.tasks.bound import check_seed
from circuitfind.tasks.task import BoundTask, Task


@remotable
def attribute(
    model: Model,
    task: Task | BoundTask,
    method: str | None = None,
    *,
    level: str = "edge",
    what: str | None = None,
    steps: int = 5,
    rule: str = "left",
    normalise: bool = False,
    metric: str | Metric | Function | None = None,
    ablation: str = "corrupted",
    direction: str = "noising",
    by_position: bool | None = None,
    by_span: bool = False,
    layers: int | Iterable[int] | None = None,
    batch_size: int | None = None,
    seed: int = 0,
    checkpoint: str | PathLike[str] | None = None,
) -> Scores | NodeScores | Sweep:
    """Scores every edge, every node, or every place of a sweep, of a model on a task.

    Args:
        method: edges: "eap", "eap-ig-inputs" (the default), "eap-ig-activations", "clean-corrupted", "relp",
            "exact"; nodes: "atp" (the default), the same others; places of a sweep: "atp" (the default), the same
            others but for "eap-ig-activations", and "atp-qk" for "q" and "k". Baselines and others whose scores are no
            effects (`record.sign` says what they are): edges: "ifr", "activation", "weights", "random"; nodes:
            "atp-star" (places of a sweep, too), "direct" (`circuitfind.direct_effects`), "hisp", "activation",
            "random".
        level: "edge" or "node".
        what: at level "node", the places of a sweep instead of the writers: "resid", "resid-mid", "attn", "mlp",
            "heads", "q", "k", "v", "pattern" or "neurons", as for `circuitfind.patch`, which measures them.
        steps: of integrated gradients; rule: of "eap-ig-inputs".
        normalise: "hisp" by layer.
        metric: overrides the task's.
        ablation: what an ablated edge carries: "corrupted", "zero", "mean", "mean-position" or "resample".
        direction: "noising" or "denoising".
        by_position: node scores by position; prompts of one length only. Default: as `circuitfind.patch` does for
            `what`, else no.
        by_span: of `what`: by named spans of the prompts, as for `circuitfind.patch`.
        layers: of `what`: a layer or several; "neurons" needs it. Default: all.
        batch_size: pairs at a time; by default as many as a memory budget allows.
        seed: of the "resample" ablation and of the "random" method.
        checkpoint: for "exact": a file that a stopped run leaves and the same call continues from.

    Returns:
        `Scores`, `NodeScores` or (with `what`) a `Sweep`, in units of the metric, positive = supports the behaviour
        (baselines: higher = ranked first).

    Raises:
        ScoreError: the method cannot score this (a metric flat at the clean run, a vanishing gradient, NaN).
        TaskError: the task does not fit the model or the ablation.
    """
    method = check_method(method, level, what, ablation, direction, by_position, normalise)
    check_seed(seed)
    for name, given in (("layers=", layers is not None), ("by_span=True", by_span)):
        if given and what is None:
            raise ScoreError(f"{name} belongs to the places of a sweep: give what=, such as what='resid'")
    bound = bind(model, task).with_metric(metric)
    if by_position and what is None and (bound.batch.clean.padded or bound.batch.corrupted.padded):
        raise ScoreError(
            "by_position=True needs prompts of one length, these differ: their positions do not correspond"
        )
    if bound.metric.flat_at_clean and method in ONE_GRADIENT and direction == "noising":
        raise ScoreError(
            f"metric '{bound.metric.name}' is flat at the clean run (its gradient is zero there), so '{method}' would"
            " return noise: use method='eap-ig-inputs' or 'clean-corrupted', or direction='denoising'"
        )
    settings: dict[str, Any] = {}
    if method.startswith("eap-ig"):
        settings["steps"] = steps
    if method == "eap-ig-inputs":
        settings["rule"] = rule
    if method == "hisp":
        settings["normalise"] = normalise
    points = _points(method, steps, rule, direction, model.graph.n_layers)
    if what is not None:
        common: dict[str, Any] = {"by_position": by_position, "by_span": by_span, "layers": layers}
        common |= {"ablation": ablation, "direction": direction, "batch_size": batch_size, "seed": seed}
        if method == "exact":
            return patch(model, bound, what, checkpoint=checkpoint, **common)
        return component_effects(model, bound, what, method, points, **common, **settings)
    if method == "direct":
        return direct_effects(model, bound, batch_size=batch_size).scores
    by_position = bool(by_position)
    pairs = Pairs.of(model.adapter, bound.batch, bound.metric, ablation, seed, batch_size)
    pairs.check_direction(direction)
    record = bound.record(method, ablation, direction, seed, level=level, **settings)
    record = replace(record, sign=_sign(method, level, normalise))
    if level == "edge":
        real = model.graph.real
        if method == "exact":
            values = exact_effects(pairs, real, direction, batch_size, checkpoint).matrix(real.shape)
        elif method == "ifr":
            values = _numpy(ifr.flow_shares(model.adapter, bound.batch, batch_size))
        elif method == "activation":
            values = _numpy(activation.edge_norms(pairs, batch_size))
        elif method == "weights":
            values = _numpy(weights.composition_scores(model.adapter))
        elif method == "random":
            values = random_scores.uniform(real.shape, seed)
        else:
            values = _numpy(pairs.mean_effects(points, edge_effects, batch_size, "edge scores"))
        return Scores(model.graph, np.where(real, values, np.float32(0)), record)
    if method == "hisp":
        values = _numpy(pairs.mean_effects(points, hisp.magnitudes, batch_size, "node scores"))
        values = hisp.normalised(model.graph, values) if normalise else values
    elif method == "exact":
        values = exact_node_effects(pairs, direction, by_position, batch_size, checkpoint).mean(-1).astype(np.float32)
    elif method == "atp-star":
        values = _numpy(grad_drop.node_magnitudes(pairs, direction, batch_size))
    elif method == "activation":
        values = _numpy(activation.node_norms(pairs, by_position, batch_size))
    elif method == "random":
        values = random_scores.uniform((model.graph.n_writers,), seed)
    else:
        kernel = partial(_summed_node_effects, by_position=by_position)
        values = _numpy(pairs.mean_effects(points, kernel, batch_size, "node scores"))
    positions = stretches(bound, by_position, by_span=False)
    return NodeScores(model.graph, values, record, positions and positions.axis.labels)


def _points(method: str, steps: int, rule: str, direction: str, n_layers: int) -> list[Point]:
    if method == "eap-ig-inputs":
        return eap_ig_inputs.points(steps, rule)
    if method == "eap-ig-activations":
        return eap_ig_activations.points(steps, n_layers)
    if method == "relp":
        return relp.points(direction)
    return clean_corrupted.points() if method == "clean-corrupted" else eap.points(direction)


def _sign(method: str, level: str, normalise: bool) -> str:
    """What the scores are."""
    if method == "hisp":
        return hisp.NORMALISED if normalise else hisp.SIGN
    if method == "activation":
        return activation.EDGE_SIGN if level == "edge" else activation.NODE_SIGN
    signs = {"atp-star": grad_drop.SIGN, "ifr": ifr.SIGN, "weights": weights.SIGN, "random": random_scores.SIGN}
    return signs.get(method, SIGN)


def _summed_node_effects(
    adapter: Adapter, delta: Writers, run: Run, gradients: ReaderGradients, by_position: bool
) -> Tensor:
    """`[writers]`, or `[writers, pos]`."""
    effects = node_effects(adapter, delta, run, gradients).sum(1)
    return effects if by_position else effects.sum(-1)


def _numpy(values: Tensor) -> np.ndarray:
    return values.to(torch.float32).cpu().numpy()
