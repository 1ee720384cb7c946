"""ACDC, automatic circuit discovery (Conmy et al. 2023): the same decisions, with far fewer operations.

1. Start from the full graph. Go through the edges in a given order (`acdc_rule.py`).
2. Remove the edge on trial: its reader gets the writer's ablated value. Let `r = metric(current) - metric(after
   removal)`; with `kl`, r is the increase of the KL divergence. If `r < threshold`, strictly, the edge is removed for
   good, and the next edge is compared with the circuit without it. Otherwise the edge is put back.
3. The edges that are left are the circuit. Nothing is pruned afterwards.

The optimisations change no decision: a trial computes only the modules that the removal affects (`engine/revision.py`),
edges without effect are decided without a run, and a few edges are tried side by side (`acdc_pruning.py`). Decisions so
close to the threshold that rounding could reverse them on another machine are listed (`evaluation/rounding.py`).

`acdc_scores` scores edges by one run at each threshold of a grid, as in auto-circuit (Miller et al. 2024).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import replace
from itertools import pairwise
from numbers import Real
from os import PathLike, fspath
from typing import Any, Unpack

import numpy as np

from circuitfind.attribution.attribute import score
from circuitfind.attribution.methods import method_of, request_of
from circuitfind.calls import model_call
from circuitfind.circuit import Circuit
from circuitfind.engine.experiment import Experiment
from circuitfind.engine.memory_plan import obtainable
from circuitfind.engine.revision import held_bytes
from circuitfind.errors import ScoreError, TaskError, warn
from circuitfind.evaluation.faithfulness import Evaluator
from circuitfind.evaluation.rounding import of_mean
from circuitfind.models.load import Model
from circuitfind.record import NO_EFFECT
from circuitfind.scores import Scores
from circuitfind.search.acdc_pruning import Pruning
from circuitfind.search.acdc_rule import TESTED, Rule, SkipCheck, edges_in_order, screened
from circuitfind.setting import JudgeKeywords
from circuitfind.tasks.task import BoundTask, Task

GRID = tuple(float(np.float32(10 ** (exponent / 2))) for exponent in range(-8, 1))  # 0.0001 to 1, two a decade
SIGN = f"{NO_EFFECT}the smallest threshold of a grid at which ACDC removes the edge"


@model_call
def acdc(
    model: Model,
    task: Task | BoundTask,
    threshold: float = 0.05,
    *,
    order: str | Sequence[str] = "reverse-topological",
    scores: Scores | None = None,
    absolute: bool = False,
    remove_dangling: str | None = None,
    screen: float | None = None,
    side_by_side: int | None = None,
    checkpoint: str | PathLike[str] | None = None,
    **asked: Unpack[JudgeKeywords],
) -> Circuit:
    """Prune the full graph edge by edge with ACDC.

    Args:
        threshold: an edge is removed if its removal lowers the metric by less than this (units of the metric).
        order: a name of `circuitfind.search.acdc_rule.ORDERS`, or a list of edge names (other edges then stay).
        scores: edge scores, for order="scores" and for `screen` ("eap-ig-inputs" scores are computed for `screen` if
            none are given).
        absolute: compare |r| with the threshold, so that edges that oppose the behaviour also stay.
        remove_dangling: whether a node that has lost its last input loses its outgoing edges, too, and so on down the
            graph: None (no), "untested" (all of them), or "tested" (each by the rule). Under interchange ("corrupted",
            "resample") such a node carries its ablated value, so its edges have no effect and need no run. Under other
            ablations, or with aligned pairs, its edges have effects, and "untested" raises an error.
        screen: remove edges with |score| < screen * threshold without a test. Up to 100 of them, drawn with the seed,
            are then measured in the circuits from which they were removed (`acdc_rule.py`). None tests every edge.
        side_by_side: trials in one batch; by default as many as make the device faster.
        checkpoint: a file from which the same call continues after it was stopped, with the same result; about
            128 trials are repeated. Deleted at the end.
        asked: metric ("kl" by default; None: the task's own), ablation, batch_size, seed (also of the shuffled orders
            and of the check of screening); see `circuitfind.setting`.

    Returns:
        The circuit, unpruned. `exact`: each edge's effect at its last decision (NaN: not measured). `facts`: how many
        trials were run; how many edges were decided without one, by reason; the close calls; the check of screening.

    Raises:
        ScoreError: the order is unknown, the metric is NaN or infinite, or two options exclude each other.
        FileError: the checkpoint belongs to another run.
        TaskError: the pairs do not fit in memory.
    """
    Rule(threshold, absolute)  # an invalid threshold raises before anything runs
    evaluator = _evaluator(model, task, asked)
    if scores is None and screen is not None:
        scores = _default_scores(evaluator.experiment)
    mask = None if screen is None else screened(scores, screen, threshold, evaluator)
    rule = Rule(threshold, absolute, _dangling(remove_dangling, evaluator), mask)
    pruning = Pruning(evaluator, rule, edges_in_order(model.graph, order, evaluator.seed, scores), side_by_side)
    file = pruning.run(checkpoint)
    settings = {"threshold": threshold, "absolute": absolute, "remove_dangling": remove_dangling, "screen": screen}
    settings["order"] = order if isinstance(order, str) else "given"
    exact, facts = np.full(model.graph.real.shape, np.nan, dtype=np.float32), _facts(pruning)
    for edge, effect, _, _ in pruning.decisions:
        exact[edge] = effect
    if screen is not None:
        checked = SkipCheck.of(pruning.evaluator, rule, pruning.decisions)
        for edge, effect in checked.effects.items():
            exact[edge] = effect
        facts["screening"] = {"runs": pruning.screening_runs, **checked.facts(model.graph)}
    file.finish()
    if not pruning.mask.any():
        warn(f"ACDC removed every edge at threshold={threshold!r}, so the circuit is empty: give a lower threshold")
    record = evaluator.experiment.record("acdc", **settings)
    return Circuit(model.graph, pruning.mask, exact=exact, record=record, facts=facts)


def _default_scores(experiment: Experiment) -> Scores:
    """Return effects estimated by the default method, for screening."""
    method = method_of(None)
    request, _ = request_of(method, "edge", None, {"ablation": experiment.setting.ablation})
    found = score(experiment, method, request)
    assert isinstance(found, Scores), "edges are scored"
    return found


@model_call
def acdc_scores(
    model: Model,
    task: Task | BoundTask,
    thresholds: Iterable[float] | None = None,
    *,
    order: str | Sequence[str] = "reverse-topological",
    scores: Scores | None = None,
    absolute: bool = False,
    remove_dangling: str | None = None,
    side_by_side: int | None = None,
    checkpoint: str | PathLike[str] | None = None,
    **asked: Unpack[JudgeKeywords],
) -> Scores:
    """Score every edge by the smallest threshold at which ACDC removes it: one whole run at each threshold of a grid.

    A run at one threshold may keep edges that a run at a lower threshold removes, so the edges with scores above t are
    not always the edges that the run at t keeps. For each threshold, `record.settings` holds how many edges the run
    `kept`, and in how many edges it and the scores `differ`.

    Args:
        thresholds: positive and ascending; by default nine from 0.0001 to 1, two per decade. Rounded to float32.
        order, scores, absolute, remove_dangling, side_by_side, asked: as for `acdc`.
        checkpoint: as for `acdc`; one file per threshold, with the threshold's index appended to the name.

    Returns:
        Scores in units of the metric, all positive; not effects. An edge that no threshold removes gets a value beyond
        the grid (`settings["beyond"]`). `scores.threshold(the threshold after t, prune=False)` has the edges that no
        threshold up to t removes.

    Raises:
        ScoreError: the thresholds are not positive and ascending; otherwise as `acdc`.
    """
    grid = _grid(GRID if thresholds is None else thresholds)
    evaluator = _evaluator(model, task, asked)
    edges = edges_in_order(model.graph, order, evaluator.seed, scores)
    dangling, masks, trials, files = _dangling(remove_dangling, evaluator), [], 0, []
    for number, threshold in enumerate(grid[:-1]):
        pruning = Pruning(evaluator, Rule(threshold, absolute, dangling), edges, side_by_side)
        path = None if checkpoint is None else f"{fspath(checkpoint)}.{number}"
        files.append(pruning.run(path, f"ACDC at {threshold:.3g}"))
        masks.append(pruning.mask)
        trials += sum(decision.how == TESTED for decision in pruning.decisions)
        evaluator = pruning.evaluator  # of smaller batches, if memory ran out
    values = np.full(model.graph.real.shape, grid[-1], dtype=np.float32)
    for threshold, mask in zip(grid[-2::-1], masks[::-1], strict=True):
        values[~mask] = threshold
    values[~model.graph.real] = 0
    settings: dict[str, Any] = {"level": "edge", "absolute": absolute, "remove_dangling": remove_dangling}
    settings["order"] = order if isinstance(order, str) else "given"
    settings |= {"thresholds": grid[:-1], "beyond": grid[-1], "trials_run": trials}
    settings["kept"] = [int(mask.sum()) for mask in masks]
    settings["differ"] = [int((mask != (values > t)).sum()) for t, mask in zip(grid, masks, strict=False)]
    record = evaluator.experiment.record("acdc", **settings)
    for file in files:
        file.finish()
    return Scores(model.graph, values, replace(record, sign=SIGN))


def _evaluator(model: Model, task: Task | BoundTask, asked: JudgeKeywords) -> Evaluator:
    """Return the evaluator of the pairs. The metric is "kl" unless the call names one.

    Raises:
        TaskError: the runs of all pairs, which ACDC holds at once, do not fit in memory.
    """
    own = "metric" in asked and asked["metric"] is None  # None asks for the task's own
    experiment = Experiment.of(model, task, asked, metric=None if own else "kl", direction=False)
    needed, there = held_bytes(model.adapter, experiment.batch.clean.ids.numel()), obtainable(model.device)
    if there is not None and needed > there:
        raise TaskError(
            f"ACDC holds the runs of all {len(experiment)} pairs, about {needed / 2**30:.0f} GiB, and"
            f" {model.device} has {there / 2**30:.0f} GiB: give fewer or shorter pairs"
        )
    return Evaluator(experiment)


def _dangling(remove: str | None, evaluator: Evaluator) -> str | None:
    """Return `remove_dangling`; ScoreError if it is unknown, or not valid under the ablation."""
    if remove not in (None, "tested", "untested"):
        raise ScoreError(f"remove_dangling={remove!r} is unknown: use None, 'tested' or 'untested'")
    ablation = evaluator.experiment.ablation
    if remove == "untested" and not evaluator.experiment.interchange:
        raise ScoreError(
            f"with ablation '{ablation.name}'{' of aligned pairs' * ablation.interchange} a node without"
            " inputs does not carry its ablated value, so its edges have effects: use remove_dangling='tested'"
        )
    return remove


def _grid(thresholds: Iterable[float]) -> list[float]:
    """Return the thresholds as float32 values, followed by a value beyond them, for edges that are never removed."""
    if not isinstance(thresholds, Iterable):
        raise ScoreError(f"thresholds={thresholds!r} are not a grid: give several, or run acdc(threshold=...) once")
    thresholds = list(thresholds)
    grid = [float(np.float32(t)) if isinstance(t, Real) else float("nan") for t in thresholds]
    if not grid or not all(0 < t < float("inf") for t in grid) or any(b <= a for a, b in pairwise(grid)):
        raise ScoreError(f"thresholds={thresholds} are not a grid: give positive numbers in ascending order")
    return [*grid, float(np.float32(grid[-1] * (grid[-1] / grid[-2] if len(grid) > 1 else 10)))]


def _facts(pruning: Pruning) -> dict[str, Any]:
    """Return the circuit's facts, as JSON values."""
    graph, decisions, counts = pruning.evaluator.graph, pruning.decisions, Counter(d.how for d in pruning.decisions)
    rounding = max(of_mean(pruning.evaluator.rounding(mask)) for mask in (graph.real, pruning.mask))
    close = [d for d in decisions if pruning.rule.close(d.effect, rounding)]
    without = {how: number for how, number in counts.items() if how != TESTED}
    return {
        "n_edges": int(pruning.mask.sum()),
        "trials_run": counts[TESTED],
        "decided_without_a_run": sum(without.values()),
        "without_a_run": without,
        "close_calls": [{"edge": graph.edge_name(*d.edge), "effect": d.effect} for d in close],
        "metric_full": float(pruning.evaluator.full.mean()),
        "metric": pruning.current,
    }
