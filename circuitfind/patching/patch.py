"""Activation-patching sweeps: each place of a model is replaced by its value in another run, one place at a time.

1. Noising (the default): the clean run with one place carrying its ablated value;
   effect = metric(clean) - metric(patched). Denoising: the corrupted run with one place carrying its clean value;
   effect = metric(patched) - metric(corrupted). In both, positive = the place supports the task.
2. The base run is captured once. A patched run restarts at the first layer that the patch changes
   (`engine/restart.py`), several patches run side by side in one batch, and logits are computed at the metric's
   positions only.

Denoising is the causal tracing of Meng et al. 2022, with clean and corrupted prompts as in Wang et al. 2023.
Heimersheim and Nanda 2024 discuss which question each direction answers.

`planned` checks the arguments and returns the places of a sweep. Estimates of the same places use it, too.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import cached_property, partial
from itertools import pairwise
from numbers import Integral
from os import PathLike
from typing import Any, NamedTuple, Unpack

import numpy as np
from torch import Tensor

from circuitfind.batch import Batch
from circuitfind.calls import model_call
from circuitfind.engine.capture import Run, moved
from circuitfind.engine.experiment import Experiment
from circuitfind.engine.measure import Group, Measured, Started, measure
from circuitfind.engine.prepare import capture_empty
from circuitfind.engine.restart import Restart
from circuitfind.engine.sites import Values, capture_site, site_means
from circuitfind.errors import ScoreError, warn
from circuitfind.models.adapter import Adapter
from circuitfind.models.load import Model
from circuitfind.patching.places import Kind, Patcher, Place, kind_of
from circuitfind.patching.spans import Spans, common, spans_of, unequal
from circuitfind.patching.sweep import Axis, Sweep
from circuitfind.setting import Keywords
from circuitfind.tasks.bound import BoundTask
from circuitfind.tasks.task import Task

COSTLY = 10**7  # tokens in all runs of a sweep
SIGNS = {
    "noising": "metric(clean) - metric(clean with the place carrying its ablated value)",
    "denoising": "metric(corrupted with the place carrying its clean value) - metric(corrupted)",
}


@model_call
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
    """Patch every place of one kind, one at a time, and measure the effect on the metric.

    Args:
        what: "resid" (the residual stream entering each block), "resid-mid" (the stream between a block's attention and
            MLP), "attn", "mlp" (the output that a layer's attention or MLP adds to the stream, like a node's: after a
            post-norm, without the output bias, which is not patched), "attn-out", "mlp-out" (the module's output before
            a post-norm, with bias), "heads" (a head's output before the output projection), "q", "k", "v" (a head's
            projected queries, keys or values; with grouped-query attention, keys and values of the model's key/value
            heads), "pattern" (a head's attention pattern), "neurons" (activations of MLP neurons before the output
            projection), or a registered kind of your own (`circuitfind.register`).
        by_position: patch each position separately, for prompts of one length. By default True for "resid",
            "resid-mid", "attn", "mlp", "attn-out" and "mlp-out" (if prompts differ in length and every pair names some
            spans, by span instead), and False for the others: all positions are patched together.
        by_span: patch each named span of the prompts (`Task.spans`) separately, at its own positions in each pair. The
            last read position ("end") and all other tokens ("rest") are two further spans. See
            `circuitfind.patching.spans`.
        layers: one layer or several; by default all. "neurons" needs it.
        checkpoint: a file from which the same call continues after it was stopped. Deleted at the end.
        asked: metric, ablation, direction, batch_size, seed; see `circuitfind.setting.Keywords`.

    Returns:
        A `Sweep`: effects in units of the metric along named axes, also per example; positive = supports the task.

    Raises:
        ScoreError: the kind of place, a layer or the direction is unknown; prompts differ in length or name no spans
            and cannot be swept this way; or the metric is NaN or infinite.
        TaskError: the task does not fit the model or the ablation.
        FileError: the checkpoint belongs to another sweep.
        ModelError: the model has no such places (neurons of a mixture of experts, patterns that it does not return,
            "resid-mid" in parallel blocks).
    """
    return swept(Experiment.of(model, task, asked), Where(what, by_position, by_span, layers), checkpoint)


class Where(NamedTuple):
    """The arguments of `patch` that name the places."""

    what: str = "heads"
    by_position: bool | None = None
    by_span: bool = False
    layers: int | Iterable[int] | None = None


class Sides(NamedTuple):
    """Both runs of a batch.

    batch: the pairs, with the clean run's logits as reference.
    corrupted: for noising under interchange, its logits only (unless `capture(whole=True)`).
    own, other: the site's clean and ablated values.
    full, empty: logits `[batch, reads, vocab]` with nothing and with everything ablated.
    """

    batch: Batch
    clean: Run
    corrupted: Run
    own: Values
    other: Values
    full: Tensor
    empty: Tensor


@dataclass(frozen=True, eq=False)
class SweepPlan:
    """The places of a sweep. `spans`: the prompts' spans, which are patched separately; None: all positions together.
    `axes`: those of the result."""

    experiment: Experiment
    kind: Kind
    layers: list[int]
    spans: Spans | None
    axes: tuple[Axis, ...]

    @property
    def what(self) -> str:
        return self.kind.name

    @property
    def shape(self) -> list[int]:
        return [len(axis.labels) for axis in self.axes]

    @property
    def units(self) -> int:
        """The number of units in each layer."""
        return len(self.axes[1].labels) if self.kind.unit else 1

    @property
    def settings(self) -> dict[str, object]:
        by = None if self.spans is None else self.spans.by
        return {"what": self.what, "by_position": by == "position", "by_span": by == "span", "layers": self.layers}

    @cached_property
    def places(self) -> list[Place]:
        """The places in one layer."""
        spans = [None] if self.spans is None else range(len(self.spans.labels))
        return [Place(unit, span) for unit in range(self.units) for span in spans]

    @property
    def sign(self) -> str:
        return f"effect: {SIGNS[self.experiment.setting.direction]}; positive = the place supports the behaviour"

    def numbers(self, rows: slice, batch: Batch) -> Tensor | None:
        """Return the span of each position, `[batch, pos]`, for the batch with these rows of all pairs."""
        return None if self.spans is None else self.spans.numbers[rows, : batch.clean.ids.shape[1]]

    def name(self, place: int) -> str:
        """Return the name of a place, given its number in the whole sweep."""
        layer, at = divmod(place, len(self.places))
        return f"{self.what} in layer {self.layers[layer]}, unit {self.places[at].unit}"

    @cached_property
    def means(self) -> Values | None:
        """The site's means, for the mean ablations; None for other ablations."""
        return site_means(self.experiment, self.kind.site, self.layers) if self.experiment.ablation.mean else None

    def capture(self, batch: Batch, whole: bool = False) -> Sides:
        """Run both sides of a batch. `whole`: record the whole corrupted run, even if no patched run starts from it."""
        experiment, site = self.experiment, self.kind.site
        clean, own = capture_site(experiment.adapter, batch.clean, site, self.layers)
        whole = whole or not (experiment.setting.noising and experiment.ablation.interchange)
        corrupted, twin = capture_site(experiment.adapter, batch.corrupted, site, self.layers, whole)
        batch, means, carried = batch.with_reference(clean.logits), self.means or {}, experiment.ablation.carried
        other = {at: carried(own[at], moved(value, batch), means.get(at)) for at, value in twin.items()}
        empty = corrupted.logits
        if not experiment.ablation.interchange:
            empty = capture_empty(experiment.adapter, batch.clean, experiment.ablated(clean, corrupted)).logits
        return Sides(batch, clean, corrupted, own, other, clean.logits, empty)


def planned(experiment: Experiment, where: Where) -> SweepPlan:
    """Check the arguments of a sweep, and return its places. Errors as for `patch`."""
    kind, adapter = kind_of(where.what), experiment.adapter
    for name, given in (("by_position", where.by_position), ("by_span", where.by_span)):
        if given not in (None, True, False):
            raise ScoreError(f"{name}={given!r}: give True or False")
    if where.by_span and where.by_position is not None:
        raise ScoreError("by_span=True and by_position= exclude each other: give one of them")
    layers = _chosen(where.layers, kind, adapter)
    kind.check(experiment)
    by_position, by_span = where.by_position, where.by_span
    if by_position is None and kind.by_position and not by_span:
        by_span = unequal(experiment.bound) and bool(common(experiment.bound))
        by_position = not by_span
    spans = spans_of(experiment.bound, bool(by_position), by_span)
    axes = [Axis("layer", tuple(map(str, layers)))]
    if (units := kind.units(adapter, layers[0])) is not None:
        axes.append(Axis(units[0], tuple(units[1])))
    if spans is not None:
        axes.append(Axis(spans.by, spans.labels))
    return SweepPlan(experiment, kind, layers, spans, tuple(axes))


def _chosen(layers: int | Iterable[int] | None, kind: Kind, adapter: Adapter) -> list[int]:
    n_layers, mixers = adapter.graph.n_layers, set(adapter.graph.mixers) if kind.unit == "head" else set()
    if layers is None and kind.name_layers:
        each = f"each of the {n_layers} layers has {kind.count(adapter, 0):,} {kind.name}"
        raise ScoreError(f"{each}: name a layer, such as layers=0 (--layers 0)")
    if layers is None:
        return [layer for layer in range(n_layers) if layer not in mixers]
    given: Any = layers.tolist() if hasattr(layers, "tolist") else layers  # of numpy or torch
    chosen = list(given) if isinstance(given, Iterable) else [given]
    whole = all(isinstance(layer, Integral) and not isinstance(layer, bool) for layer in chosen)
    if not chosen or not whole or not set(chosen) <= set(range(n_layers)) or len(set(chosen)) < len(chosen):
        raise ScoreError(f"layers={layers!r}: give layers of this model, 0 to {n_layers - 1}, each only once")
    if unheaded := sorted(mixers & set(chosen)):
        those = ", ".join(map(str, unheaded))
        raise ScoreError(f"layers={layers!r}: no heads but a mixer in layers {those}: patch what='attn' there")
    return [int(layer) for layer in chosen]


def swept(experiment: Experiment, where: Where, checkpoint: str | PathLike[str] | None = None) -> Sweep:
    """Do what `patch` does, for an experiment."""
    plan = planned(experiment, where)
    _warn_of_cost(plan)
    effects, full, empty = measured(plan, np.arange(len(plan.layers) * len(plan.places)), checkpoint)
    assert full is not None and empty is not None, "a sweep runs both ends"
    record = replace(experiment.record("patch", **plan.settings), sign=plan.sign)
    return Sweep(plan.what, experiment.graph, plan.axes, effects.reshape(*plan.shape, -1), full, empty, record)


def _warn_of_cost(plan: SweepPlan) -> None:
    """Warn of a sweep by position over long prompts: its cost grows with the square of their length."""
    runs, length = len(plan.layers) * len(plan.places), plan.experiment.batch.clean.ids.shape[1]
    if plan.spans is not None and plan.spans.by == "position" and runs * length > COSTLY:
        warn(
            f"this sweep runs every pair {runs:,} times, once for each of {len(plan.spans.labels):,} positions in each"
            f" of {len(plan.layers)} layers, at half a forward pass of {length:,} tokens per run on average: patch"
            " named spans instead (by_span=True, --by-span), or fewer layers (layers=, --layers)"
        )


def measured(plan: SweepPlan, chosen: np.ndarray, checkpoint: str | PathLike[str] | None = None) -> Measured:
    """Measure the exact effects of some places, given by their numbers in the whole sweep, in ascending order.
    `checkpoint`: as for `patch`."""
    numbers = None if plan.spans is None else plan.spans.numbers.cpu().numpy()
    _ = plan.means  # computed here, because all processes compute the means together
    key, start = (numbers, plan.what, plan.layers, plan.units), partial(_started, plan, chosen)

    def name(place: int) -> str:
        return plan.name(int(chosen[place]))

    return measure(plan.experiment, start, len(chosen), name, "patches", checkpoint, key)


def runs_of(keys: np.ndarray, at_once: int) -> list[slice]:
    """Return slices of consecutive equal keys, each of at most `at_once`."""
    starts = np.flatnonzero(np.diff(keys, prepend=keys[:1] - 1)).tolist()
    spans = pairwise([*starts, len(keys)])
    return [slice(at, min(at + at_once, stop)) for start, stop in spans for at in range(start, stop, at_once)]


def _started(plan: SweepPlan, chosen: np.ndarray, part: Batch, rows: slice) -> Started:
    """Run both sides of a batch, and return its patched runs, yet to be made, at the chosen places."""
    experiment = plan.experiment
    batch, clean, corrupted, own, other, full, empty = plan.capture(part)
    inputs, base = batch.clean, clean
    if not experiment.setting.noising:
        inputs, base, own, other = batch.corrupted, corrupted, other, own
    patcher = Patcher(plan.kind, Restart(experiment.adapter, inputs, base), own, other, plan.numbers(rows, batch))
    layers, places = np.divmod(chosen, len(plan.places))
    groups = []
    for run in runs_of(layers, patcher.restart.at_once):
        layer = plan.layers[layers[run.start]]
        groups.append(Group(run, layer, (layer, [plan.places[at] for at in places[run]])))
    return Started(batch, full, empty, groups, lambda group: patcher.logits(*group))
