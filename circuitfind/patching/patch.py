"""Activation-patching sweeps: each place of a model replaced, on its own, by its value in another run.

1. Noising (the default, as everywhere): the clean run with one place carrying its ablated value;
   effect = metric(clean) - metric(patched). Denoising: the corrupted run with one place carrying its clean value;
   effect = metric(patched) - metric(corrupted). Positive = the place supports the behaviour, in both.
2. The base run is captured once. A patch restarts where it first changes anything (`engine/restart.py`), several
   patches run as rows of one batch, and logits are computed at the metric's positions only.

Denoising is the causal tracing of Meng et al. 2022, with clean and corrupted prompts as in Wang et al. 2023; which of
the two directions answers which question: Heimersheim and Nanda 2024.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from os import PathLike
from typing import Unpack

from circuitfind.batch import Batch
from circuitfind.engine.experiment import Experiment
from circuitfind.engine.measure import Started, measure
from circuitfind.engine.restart import Restart
from circuitfind.models.load import Model
from circuitfind.patching.places import Patcher
from circuitfind.patching.plan import SweepPlan, Where, planned
from circuitfind.patching.sweep import Sweep
from circuitfind.remote.call import remotable
from circuitfind.setting import Keywords
from circuitfind.tasks.bound import BoundTask
from circuitfind.tasks.task import Task

SIGNS = {
    "noising": "metric(clean) - metric(clean with the place carrying its ablated value)",
    "denoising": "metric(corrupted with the place carrying its clean value) - metric(corrupted)",
}


@remotable
def patch(
    model: Model,
    task: Task | BoundTask,
    what: str = "heads",
    *,
    by_position: bool | None = None,
    by_span: bool = False,
    layers: int | Iterable[int] | None = None,
    checkpoint: str | PathLike[str] | None = None,
    **asked: Unpack[Keywords],
) -> Sweep:
    """Patches every place of one kind, one at a time, and measures the metric.

    Args:
        what: "resid" (the residual stream entering each block), "resid-mid" (the stream between a block's attention and
            its MLP), "attn", "mlp" (what a layer's attention or MLP puts out), "heads" (a head's output before the
            output projection), "q", "k", "v" (a head's queries, keys or values as they are projected; the model's own
            key/value heads where they are grouped), "pattern" (a head's attention pattern), "neurons" (of some layers'
            MLPs, as their output projection reads them).
        by_position: each position is a place of its own, for prompts of one length. Default: yes for "resid",
            "resid-mid", "attn" and "mlp"; no for the others, whose places are then patched at all positions together.
        by_span: instead, each named stretch of the prompts (`Task.spans`) is a place of its own, wherever it stands in
            each pair; the last read position ("end") and all other tokens ("rest") are two more.
            `circuitfind.patching.stretches` has the details.
        layers: a layer or several; "neurons" needs it. Default: all.
        checkpoint: a file that a stopped sweep leaves and the same call continues from; removed at the end.
        asked: metric, ablation, direction, batch_size, seed; see `circuitfind.setting.Keywords`.

    Returns:
        A `Sweep`: effects in units of the metric along named axes, positive = supports, per example too.

    Raises:
        ScoreError: an unknown kind of place, layer or direction; prompts whose positions do not correspond, or without
            spans to go by; NaN or infinity.
        TaskError: the task does not fit the model or the ablation.
        FileError: the checkpoint belongs to another sweep.
        ModelError: the model has no such places (neurons of a mixture of experts, patterns that it does not show, a
            stream between attention and MLP where both read the same).
    """
    return swept(Experiment.of(model, task, asked), Where(what, by_position, by_span, layers), checkpoint)


def swept(experiment: Experiment, where: Where, checkpoint: str | PathLike[str] | None = None) -> Sweep:
    """`patch` of an experiment."""
    plan = planned(experiment, where)
    numbers = None if plan.stretches is None else plan.stretches.numbers.cpu().numpy()
    key = (numbers, plan.what, plan.layers, plan.units)
    count = len(plan.layers) * len(plan.places)
    found = measure(
        experiment, lambda part, rows: _started(plan, part, rows), count, plan.name, "patches", checkpoint, key
    )
    assert found.full is not None and found.empty is not None, "a sweep runs both ends"
    direction = experiment.setting.direction
    record = replace(
        experiment.record("patch", **plan.settings),
        sign=f"effect: {SIGNS[direction]}; positive = the place supports the behaviour",
    )
    effects = found.effects.reshape(*plan.shape, -1)
    return Sweep(plan.what, experiment.graph, plan.axes, effects, found.full, found.empty, record)


def _started(plan: SweepPlan, part: Batch, rows: slice) -> Started:
    """A batch of a sweep, ready to be patched."""
    experiment = plan.experiment
    batch, clean, corrupted, own, other, full, empty = plan.capture(part)
    inputs, base = batch.clean, clean
    if not experiment.setting.noising:
        inputs, base, own, other = batch.corrupted, corrupted, other, own
    patcher = Patcher(plan.what, Restart(experiment.adapter, inputs, base), own, other, plan.numbers(rows, batch))
    places, at_once = plan.places, patcher.restart.at_once
    groups = []
    for index, layer in enumerate(plan.layers):
        for start in range(0, len(places), at_once):
            some = places[start : start + at_once]
            first = index * len(places) + start
            groups.append((slice(first, first + len(some)), (layer, some)))
    return Started(batch, full, empty, groups, lambda group: patcher.logits(*group))
