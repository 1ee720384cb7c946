"""What a sweep goes over: its places, checked against model and pairs, and both sides of a batch at their site."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from numbers import Integral
from typing import Any, NamedTuple

from torch import Tensor

from circuitfind.batch import Batch
from circuitfind.engine.capture import Run, moved, refuse_aligned
from circuitfind.engine.experiment import Experiment
from circuitfind.engine.prepare import capture_empty
from circuitfind.engine.sites import Values, capture_site, input_rows, site_means
from circuitfind.errors import ModelError, ScoreError
from circuitfind.models.adapter import Adapter
from circuitfind.patching.places import KINDS, Place
from circuitfind.patching.stretches import Stretches, stretches
from circuitfind.patching.sweep import Axis


class Where(NamedTuple):
    """The places of a sweep, as `circuitfind.patch` is asked for them."""

    what: str = "heads"
    by_position: bool | None = None
    by_span: bool = False
    layers: int | Iterable[int] | None = None


class Sides(NamedTuple):
    """A batch (with the clean run's logits for reference), its two runs, what the site holds in the clean run and when
    it is ablated, and logits `[batch, reads, vocab]` with nothing and with everything ablated."""

    batch: Batch
    clean: Run
    corrupted: Run
    own: Values
    other: Values
    full: Tensor
    empty: Tensor


@dataclass(frozen=True, eq=False)
class SweepPlan:
    """What is patched.

    Attributes:
        units: of each layer.
        stretches: of the prompts, each patched on its own; None patches all positions together.
        axes: of the result.
    """

    experiment: Experiment
    what: str
    layers: list[int]
    units: int
    stretches: Stretches | None
    axes: tuple[Axis, ...]

    @property
    def shape(self) -> list[int]:
        """How many entries each axis has."""
        return [len(axis.labels) for axis in self.axes]

    @property
    def settings(self) -> dict[str, object]:
        """For the record."""
        axis = None if self.stretches is None else self.stretches.axis.name
        by = {"by_position": axis == "position", "by_span": axis == "span"}
        return {"what": self.what, **by, "layers": self.layers}

    @cached_property
    def places(self) -> list[Place]:
        """Of one layer."""
        stretches = [None] if self.stretches is None else range(len(self.stretches.axis.labels))
        return [Place(unit, stretch) for unit in range(self.units) for stretch in stretches]

    def numbers(self, rows: slice, batch: Batch) -> Tensor | None:
        """`[batch, pos]` which stretch each position belongs to, of a batch made of these rows of all pairs."""
        return None if self.stretches is None else self.stretches.numbers[rows, : batch.clean.ids.shape[1]]

    def name(self, place: int) -> str:
        """Of a place by its number in the whole sweep, for errors."""
        layer, at = divmod(place, len(self.places))
        return f"{self.what} in layer {self.layers[layer]}, unit {self.places[at].unit}"

    @cached_property
    def means(self) -> Values | None:
        """What mean ablation puts at the site; None for the others."""
        return (
            site_means(self.experiment, KINDS[self.what].site, self.layers) if self.experiment.ablation.mean else None
        )

    def capture(self, batch: Batch) -> Sides:
        """Runs both sides of a batch."""
        experiment, site = self.experiment, KINDS[self.what].site
        clean, own = capture_site(experiment.adapter, batch.clean, site, self.layers)
        corrupted, twin = capture_site(experiment.adapter, batch.corrupted, site, self.layers)
        batch = batch.with_reference(clean.logits)
        other = {
            layer: experiment.ablation.carried(
                own[layer], moved(value, batch), None if self.means is None else self.means[layer]
            )
            for layer, value in twin.items()
        }
        empty = corrupted.logits
        if not experiment.ablation.interchange:
            empty = capture_empty(experiment.adapter, batch.clean, experiment.ablated(clean, corrupted)).logits
        return Sides(batch, clean, corrupted, own, other, clean.logits, empty)


def planned(experiment: Experiment, where: Where) -> SweepPlan:
    """What a sweep goes over, its arguments checked.

    Raises:
        ScoreError: an unknown kind of place or layer; prompts whose positions do not correspond, or without spans to go
            by.
        ModelError: the model has no such places.
    """
    what, by_position, by_span, layers = where
    adapter, bound = experiment.adapter, experiment.bound
    if not isinstance(what, str) or what not in KINDS:
        raise ScoreError(f"what={what!r} is unknown: use one of {', '.join(KINDS)}")
    for name, given in (("by_position", by_position), ("by_span", by_span)):
        if given not in (None, True, False):
            raise ScoreError(f"{name}={given!r}: give True or False")
    if by_span and by_position is not None:
        raise ScoreError("by_span=True and by_position= divide the positions in two ways: give one of them")
    chosen = _chosen(layers, what, adapter)
    if what == "pattern":
        refuse_aligned(bound.batch, "a corrupted attention pattern", "patch 'q', 'k' or 'v' instead")
    if what == "pattern" and experiment.ablation.mean == "all":
        raise ScoreError("a pattern has no mean over positions: use ablation='mean-position' or 'corrupted'")
    if what == "resid-mid" and adapter.graph.parallel:
        raise ModelError(
            "what='resid-mid': in this model attention and MLP of a block read the same stream (parallel blocks), and"
            " there is none between them: use 'resid', 'attn' or 'mlp'"
        )
    by_position = KINDS[what].by_position if by_position is None else by_position
    parts = stretches(bound, by_position, by_span)
    axes = (Axis("layer", tuple(map(str, chosen))), *_unit_axis(what, chosen, adapter))
    units = len(axes[1].labels) if KINDS[what].unit else 1
    return SweepPlan(experiment, what, chosen, units, parts, (*axes, *((parts.axis,) if parts else ())))


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


def _unit_axis(what: str, layers: list[int], adapter: Adapter) -> tuple[Axis, ...]:
    """The axis of a layer's units, where it has more than one."""
    graph, unit = adapter.graph, KINDS[what].unit
    if unit is None:
        return ()
    if unit == "neuron":
        return (Axis(unit, tuple(map(str, range(len(input_rows(adapter, "hidden", layers[0])))))),)
    count = graph.n_kv_heads if what in ("k", "v") else graph.n_heads
    return (Axis("key/value head" if count < graph.n_heads else "head", tuple(map(str, range(count)))),)
