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
from numbers import Integral
from os import PathLike
from typing import Any

from circuitfind.engine.ablation import check_ablation, check_direction, resampled
from circuitfind.engine.aligned import refuse_aligned
from circuitfind.engine.site_values import input_rows
from circuitfind.errors import ModelError, ScoreError
from circuitfind.loading import bind
from circuitfind.metrics import Function, Metric
from circuitfind.models.adapter import Adapter
from circuitfind.models.load import Model
from circuitfind.patching.measure import Plan, measure
from circuitfind.patching.places import KINDS
from circuitfind.patching.stretches import stretches
from circuitfind.patching.sweep import Axis, Sweep
from circuitfind.remote.call import remotable
from circuitfind.tasks.bound import BoundTask, check_seed
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
    metric: str | Metric | Function | None = None,
    ablation: str = "corrupted",
    direction: str = "noising",
    batch_size: int | None = None,
    seed: int = 0,
    checkpoint: str | PathLike[str] | None = None,
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
        metric: overrides the task's.
        ablation: what a place carries in noising: "corrupted", "zero", "mean", "mean-position" or "resample".
        direction: "noising" (clean runs with one place corrupted) or "denoising" (corrupted runs with one restored).
        batch_size: pairs at a time; by default as many as a memory budget allows.
        seed: of the "resample" ablation.
        checkpoint: a file that a stopped sweep leaves and the same call continues from; removed at the end.

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
    bound = bind(model, task).with_metric(metric)
    check_seed(seed)
    plan, axes = planned(model.adapter, bound, what, by_position, by_span, layers, ablation, direction)
    batch = resampled(bound.batch, seed) if ablation == "resample" else bound.batch
    found = measure(model.adapter, batch, plan, bound.metric, batch_size, checkpoint)
    made = bound.record("patch", ablation, direction, seed, **plan.settings)
    record = replace(made, sign=f"effect: {SIGNS[direction]}; positive = the place supports the behaviour")
    return Sweep(what, model.graph, axes, found.effects.reshape(*shape_of(axes), -1), found.full, found.empty, record)


def planned(
    adapter: Adapter,
    bound: BoundTask,
    what: str,
    by_position: bool | None,
    by_span: bool,
    layers: int | Iterable[int] | None,
    ablation: str,
    direction: str,
) -> tuple[Plan, tuple[Axis, ...]]:
    """What a sweep goes over, its arguments checked, and the axes of its result.

    Raises:
        ScoreError: an unknown kind of place, layer or direction; prompts whose positions do not correspond, or without
            spans to go by.
        TaskError: the task does not allow the ablation.
        ModelError: the model has no such places.
    """
    if not isinstance(what, str) or what not in KINDS:
        raise ScoreError(f"what={what!r} is unknown: use one of {', '.join(KINDS)}")
    for name, given in (("by_position", by_position), ("by_span", by_span)):
        if given not in (None, True, False):
            raise ScoreError(f"{name}={given!r}: give True or False")
    if by_span and by_position is not None:
        raise ScoreError("by_span=True and by_position= divide the positions in two ways: give one of them")
    chosen = _chosen(layers, what, adapter)
    _check(what, ablation, direction, bound)
    if what == "resid-mid" and adapter.graph.parallel:
        raise ModelError(
            "what='resid-mid': in this model attention and MLP of a block read the same stream (parallel blocks), and"
            " there is none between them: use 'resid', 'attn' or 'mlp'"
        )
    by_position = KINDS[what].by_position if by_position is None else by_position
    parts = stretches(bound, by_position, by_span)
    axes = (Axis("layer", tuple(map(str, chosen))), *_unit_axis(what, chosen, adapter))
    units = len(axes[1].labels) if KINDS[what].unit else 1
    return Plan(what, chosen, units, parts, ablation, direction), (*axes, *((parts.axis,) if parts else ()))


def shape_of(axes: tuple[Axis, ...]) -> list[int]:
    """How many entries each axis has."""
    return [len(axis.labels) for axis in axes]


def _chosen(layers: int | Iterable[int] | None, what: str, adapter: Adapter) -> list[int]:
    n_layers = adapter.graph.n_layers
    if layers is None and what == "neurons":
        width = len(input_rows(adapter, "hidden", 0))
        raise ScoreError(
            f"each of the {n_layers} layers has {width:,} neurons: name a layer, such as layers=0 (--layers 0)"
        )
    if layers is None:
        return list(range(n_layers))
    given: Any = layers.tolist() if hasattr(layers, "tolist") else layers  # of numpy or torch
    chosen = list(given) if isinstance(given, Iterable) else [given]
    known = all(_is_whole(layer) and 0 <= layer < n_layers for layer in chosen)
    if not chosen or not known or len(set(chosen)) < len(chosen):
        raise ScoreError(f"layers={layers!r}: give layers of this model, 0 to {n_layers - 1}, each of them once")
    return [int(layer) for layer in chosen]


def _is_whole(value: object) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool)


def _check(what: str, ablation: str, direction: str, bound: BoundTask) -> None:
    check_ablation(ablation, bound.batch)
    check_direction(direction, ablation, bound.batch)
    if what == "pattern":
        refuse_aligned(bound.batch, "a corrupted attention pattern", "patch 'q', 'k' or 'v' instead")
    if what == "pattern" and ablation == "mean":
        raise ScoreError("a pattern has no mean over positions: use ablation='mean-position' or 'corrupted'")


def _unit_axis(what: str, layers: list[int], adapter: Adapter) -> tuple[Axis, ...]:
    """The axis of a layer's units, where it has more than one."""
    graph, unit = adapter.graph, KINDS[what].unit
    if unit is None:
        return ()
    if unit == "neuron":
        return (Axis(unit, tuple(map(str, range(len(input_rows(adapter, "hidden", layers[0])))))),)
    count = graph.n_kv_heads if what in ("k", "v") else graph.n_heads
    return (Axis("key/value head" if count < graph.n_heads else "head", tuple(map(str, range(count)))),)
