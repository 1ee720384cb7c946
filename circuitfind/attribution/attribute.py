"""`attribute`: score every edge, node or place of a sweep with an attribution method."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from functools import partial
from os import PathLike
from typing import Unpack

import numpy as np
from torch import Tensor

from circuitfind.attribution.components import place_effects
from circuitfind.attribution.gradients import check_slope, mean_edge_effects, mean_effects
from circuitfind.attribution.method import Method, Request, Scored, as_array
from circuitfind.attribution.methods import method_of, request_of
from circuitfind.calls import model_call
from circuitfind.engine.capture import Run
from circuitfind.engine.experiment import Experiment
from circuitfind.engine.memory_plan import BY_EXAMPLE
from circuitfind.engine.reader_gradients import ReaderGradients
from circuitfind.engine.stream_effects import node_effects
from circuitfind.engine.writers import Writers
from circuitfind.errors import ScoreError
from circuitfind.graph import Graph
from circuitfind.models.adapter import Adapter
from circuitfind.models.load import Model
from circuitfind.patching.spans import Spans, spans_of
from circuitfind.patching.sweep import Sweep
from circuitfind.placed_scores import PLACE, PlacedScores
from circuitfind.scores import NodeScores, Scores
from circuitfind.setting import Keywords
from circuitfind.tasks.task import BoundTask, Task


class ScoreKeywords(Keywords, total=False):
    """The keywords of a run, and the options of the built-in methods (a method of your own may have others). `steps`:
    the number of points of integrated gradients (default 5). `rule`: for "eap-ig-inputs", where the points lie: "left"
    (default), "midpoint" or "right". `normalise`: for "hisp", divide scores by the L2 norm of their layer's."""

    steps: int | None
    rule: str | None
    normalise: bool


@model_call
def attribute(
    model: Model,
    task: Task | BoundTask,
    method: str | Method | None = None,
    *,
    level: str = "edge",
    what: str | None = None,
    by_position: bool | None = None,
    by_span: bool = False,
    layers: int | Iterable[int] | None = None,
    checkpoint: str | PathLike[str] | None = None,
    ungrouped: bool = False,
    **asked: Unpack[ScoreKeywords],
) -> Scores | PlacedScores | NodeScores | Sweep:
    """Score every edge, every node, or every place of a sweep, of a model on a task.

    Args:
        method: a name (`circuitfind.methods()` lists them), a `Method` of your own, or "package.module:name" of one. By
            default "eap-ig-inputs". For queries and keys the default is "atp", and so it is for nodes and places under
            an ablation other than "corrupted", which "eap-ig-inputs" needs; `record.method` says which method was used.
            Some methods' scores are not effects; `record.sign` says what they are.
        level: "edge" or "node".
        what: at level "node", score the places of a sweep in place of nodes: "resid", "resid-mid", "attn", "mlp",
            "attn-out", "mlp-out", "heads", "q", "k", "v", "pattern" or "neurons", as in `circuitfind.patch`, which
            measures their effects.
        by_position: score edges, nodes or places at each position separately; prompts must have the same length.
            Default: for `what`, the default of `circuitfind.patch`; False for edges and nodes.
        by_span: score edges, or the places of `what`, at each named span of the prompts, as in `circuitfind.patch`.
        layers: with `what`, a layer or several; required for "neurons". Default: all.
        checkpoint: for "exact", a file that an interrupted run leaves and the same call continues from.
        ungrouped: in a grouped-query model, score each query head's keys and values separately (`a5.h3<k>` in place of
            `a5.kv1<k>`). This is the graph of EAP-IG's and MIB's files (`model.graph.ungrouped()`). Estimates for the
            heads of a group add up to the group's estimate; exact effects do not.
        asked: metric, ablation, direction, batch_size, seed (`circuitfind.setting.Keywords`), and options of the method
            (`ScoreKeywords`).

    Returns:
        `Scores` (by position or span, `PlacedScores`), `NodeScores` or, with `what`, a `Sweep`; in units of the metric,
        positive = supports the behaviour. Scores that are not effects only rank: higher comes first.

    Raises:
        ScoreError: the method cannot score what is asked (for example because the metric is flat at the clean run, the
            gradient vanishes, or an effect is NaN), or has no such option.
        TaskError: the task does not fit the model or the ablation.
    """
    chosen = method_of(method, level, what, asked.get("ablation"))
    ways = {"by_position": by_position, "by_span": by_span, "layers": layers, "checkpoint": checkpoint}
    request, setting = request_of(chosen, level, what, asked, ungrouped=ungrouped, **ways)
    return score(Experiment.of(model, task, setting), chosen, request)


def score(experiment: Experiment, method: Method, request: Request) -> Scores | PlacedScores | NodeScores | Sweep:
    """Score an experiment with a method: `attribute` after its arguments have been checked."""
    experiment = experiment.ungrouped() if request.ungrouped else experiment
    batch, graph = experiment.batch, experiment.graph
    if request.by_position and request.level == "node" and (batch.clean.padded or batch.corrupted.padded):
        raise ScoreError("by_position=True needs prompts of one length, so that positions correspond")
    check_slope(experiment, method)
    spans = None if request.level == "place" else spans_of(experiment.bound, bool(request.by_position), request.by_span)
    if request.level == "edge" and spans is not None:
        _check_room(len(spans.labels), graph)
    found = (method.score or partial(_by_points, method=method, spans=spans))(experiment, request)
    if isinstance(found, (Scores, NodeScores, Sweep)):
        return found
    values = as_array(found)
    record = experiment.record(method.name, level=request.level, **request.options)
    record = replace(record, sign=method.sign(request.level, request.options))
    if request.level == "node":
        return NodeScores(graph, values, record, spans and spans.labels)
    values = np.where(graph.real, values, np.float32(0))
    if spans is None:
        return Scores(graph, values, record)
    return PlacedScores(graph, values, record.with_settings(**{PLACE: f"each {spans.by}"}), spans.labels)


def _check_room(places: int, graph: Graph) -> None:
    """Raise ScoreError if edge scores at this number of positions or spans would not fit in memory."""
    size = places * graph.real.size * 4
    if size > BY_EXAMPLE:
        raise ScoreError(
            f"scores of {graph.n_edges:,} edges at {places:,} positions take {size / 2**30:.0f} GiB: divide the prompts"
            " by named spans (by_span=True, --by-span), or score edges at all tokens together"
        )


def _by_points(experiment: Experiment, request: Request, method: Method, spans: Spans | None) -> Scored:
    """Return first-order scores from the gradients at the method's points."""
    assert method.points is not None, "a method without score= has points="
    if request.level == "place":
        return place_effects(experiment, method, request)
    points = method.points(experiment.setting.direction, experiment.graph.n_layers, request.options)
    if request.level == "edge":
        return mean_edge_effects(experiment, points, spans)

    def effects(adapter: Adapter, delta: Writers, run: Run, gradients: ReaderGradients) -> Tensor:
        found = node_effects(adapter, delta, run, gradients).sum(1)  # writers pos
        return found if request.by_position else found.sum(-1)

    return mean_effects(experiment, points, effects, "node scores", divided=not request.by_position)
