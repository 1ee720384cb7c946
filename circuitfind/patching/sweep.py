"""The result of an activation-patching sweep: an effect for every place, along named axes.

Positive = the patched place supports the task, in both directions. `normalised` effects are divided by the total
effect, metric(full) - metric(empty): 1 = patching this place alone removes (noising) or restores (denoising) all of it.
"""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from itertools import product
from os import PathLike
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from circuitfind.errors import FileError, ScoreError
from circuitfind.export import html
from circuitfind.export.files import check_file, plain, write_bytes
from circuitfind.graph import Graph
from circuitfind.patching.places import KINDS
from circuitfind.record import Record
from circuitfind.result import Result, as_json, strongest
from circuitfind.statistics import mean_intervals, standard_error

FORMAT, VERSION = "circuitfind.sweep", "1"


class Axis(NamedTuple):
    """An axis of a sweep: its name, and a label for each entry."""

    name: str
    labels: tuple[str, ...]


class EffectTable(Result, ABC):
    """Base class of results with effects `per_example [..., examples]`, float64, in units of the metric; NaN where an
    effect does not exist."""

    per_example: np.ndarray
    record: Record

    @property
    def effects(self) -> np.ndarray:
        """Mean effects over examples, `[...]`, in units of the metric."""
        return np.asarray(self.per_example.mean(axis=-1))

    def rows(self) -> tuple[Any, ...]:
        """Return every effect with its name and 95% interval over examples, in the order of `effects.ravel()`."""
        return self._rows(np.flatnonzero(~np.isnan(self.effects.ravel())))

    def top(self, n: int, by: str = "absolute") -> list[Any]:
        """Return the rows of the n effects that are largest in magnitude or (by="signed") most positive, largest first.
        ScoreError for another `by`."""
        return list(self._rows(strongest(self.effects.ravel(), n, by)))

    def _rows(self, chosen: np.ndarray) -> tuple[Any, ...]:
        effects = self.effects.ravel()
        ends = self.intervals_of(self.per_example.reshape(len(effects), -1)[chosen]).tolist()
        return tuple(self._row(at, float(effects[at]), *pair) for at, pair in zip(chosen.tolist(), ends, strict=True))

    def intervals_of(self, values: np.ndarray, level: float = 0.95) -> np.ndarray:
        """Return the intervals `[..., 2]` of the means of `values [..., examples]` over examples."""
        return mean_intervals(values, self.record.copies, level)

    @abstractmethod
    def _row(self, at: int, effect: float, low: float, high: float) -> Any:
        """Return the row of entry `at` of `effects.ravel()`."""


class PatchedEffects(EffectTable):
    """Base class of effects of patching. `full`, `empty`: the metric with nothing and with everything ablated,
    `[examples]`."""

    full: np.ndarray
    empty: np.ndarray

    @property
    def metric_full(self) -> float:
        """Mean of `full` over examples."""
        return float(self.full.mean())

    @property
    def metric_empty(self) -> float:
        """Mean of `empty` over examples."""
        return float(self.empty.mean())

    def _check(self, *shape: int) -> None:
        """Raise a ScoreError if the arrays do not have the shape of the names."""
        if self.per_example.shape != (*shape, len(self.full)) or len(self.empty) != len(self.full):
            raise ScoreError(
                f"per_example has shape {list(self.per_example.shape)}, but its names and the {len(self.full)} examples"
                f" need {[*shape, len(self.full)]}"
            )


class PlaceEffect(NamedTuple):
    """The effect of one place of a sweep, with its 95% interval over examples. `position`: label of the position or
    span, empty if all positions are patched together."""

    place: str
    position: str
    effect: float
    low: float
    high: float

    @property
    def name(self) -> str:
        return self.place


@dataclass(frozen=True, eq=False, repr=False)
class Sweep(PatchedEffects):
    """Effects of patching each place of a model, one at a time.

    Attributes:
        what: a key of `circuitfind.patching.places.KINDS`.
        axes: the layer, then the unit (head, key/value head or neuron; no axis if a layer is one unit), then the
            position or span if swept by either. Labels of layers and units are their numbers.
        per_example: effects `[*axes, examples]`, float64, in units of the metric.
        full, empty: the metric with nothing ablated (the clean run) and with everything ablated (under the default
            ablation the corrupted run), `[examples]`.
    """

    FORMAT = FORMAT
    SHOWN = ("what", "shape", "metric_full", "metric_empty")

    what: str
    graph: Graph
    axes: tuple[Axis, ...]
    per_example: np.ndarray
    full: np.ndarray
    empty: np.ndarray
    record: Record = field(default_factory=Record)

    def __post_init__(self) -> None:
        self._check(*(len(axis.labels) for axis in self.axes))

    @property
    def normalised(self) -> np.ndarray:
        """Effects `[*axes]` divided by metric(full) - metric(empty). ScoreError if these two do not differ beyond
        noise."""
        difference = self.full - self.empty
        error = standard_error(difference, self.record.copies)
        if abs(difference.mean()) <= 2 * error:
            raise ScoreError(
                f"a normalised effect is undefined: the metric is {self.full.mean():.4g} on the whole model and"
                f" {self.empty.mean():.4g} with everything ablated, which is within noise (standard error {error:.2g},"
                f" {len(difference)} examples). Use the raw effects"
            )
        return np.asarray(self.effects / difference.mean())

    @property
    def shape(self) -> str:
        """The axes in words, such as "4 layers x 8 heads"."""
        return " x ".join(f"{len(axis.labels)} {axis.name}s" for axis in self.axes)

    @property
    def by_position(self) -> bool:
        return self.axes[-1].name == "position"

    @property
    def by_span(self) -> bool:
        return self.axes[-1].name == "span"

    @property
    def positions(self) -> tuple[str, ...]:
        """Labels of the positions or spans; one empty label if all positions are patched together."""
        return self.axes[-1].labels if self.by_position or self.by_span else ("",)

    def intervals(self, *, level: float = 0.95) -> np.ndarray:
        """Return the effects' intervals over examples, `[*axes, 2]` (`circuitfind.statistics`); NaN for a single
        example."""
        return self.intervals_of(self.per_example, level)

    def names(self) -> list[str]:
        """Return the name of each place, the same at all its positions or spans, in the order of `effects.ravel()`."""
        kv = "kv" if self.graph.group > 1 else "h"
        by_unit = len(self.axes) - (self.by_position or self.by_span) > 1
        known = KINDS.get(self.what)  # a file may have a kind that is not registered here
        label = known.label if known else f"{self.what}{{layer}}.{{unit}}" if by_unit else f"{self.what}{{layer}}"
        units = self.axes[1].labels if by_unit else ("",)
        cells = product(self.axes[0].labels, units, self.positions)
        mixers = set(map(str, self.graph.mixers))
        return [
            label.format(layer=layer, unit=unit, kv=kv, attn="s" if layer in mixers else "a")
            for layer, unit, _ in cells
        ]

    @cached_property
    def _names(self) -> list[str]:
        return self.names()

    def _row(self, at: int, effect: float, low: float, high: float) -> PlaceEffect:
        return PlaceEffect(self._names[at], self.positions[at % len(self.positions)], effect, low, high)

    def to_dict(self) -> dict[str, Any]:
        """Return the sweep as JSON values, without effects per example; `normalised` is None if undefined."""
        try:
            normalised = self.normalised.tolist()
        except ScoreError:
            normalised = None
        return {
            "what": self.what,
            "axes": as_json(self.axes),
            "effects": self.effects.tolist(),
            "normalised": normalised,
            "metric_full": self.metric_full,
            "metric_empty": self.metric_empty,
            "record": asdict(self.record),
        }

    def _repr_html_(self) -> str:
        best = html.table(PlaceEffect._fields, self.top(10), "strongest places")
        rows: Sequence[str] = self.axes[0].labels
        values = self.effects.reshape(len(rows), -1)
        columns: Sequence[str] = self.axes[-1].labels if len(self.axes) > 1 else ("effect",)
        if len(self.axes) == 3:  # the places with the largest effects, at every position
            rows, values = self.names()[:: len(columns)], self.effects.reshape(-1, len(columns))
            kept = np.sort(strongest(np.abs(values).max(axis=1), html.MOST_ROWS // 2))
            rows, values = [rows[at] for at in kept], values[kept]
        return html.block(repr(self), html.heat(values, rows, columns, "effects"), best)

    def save(self, path: str | PathLike[str]) -> Path:  # type: ignore[override]
        """Write a safetensors file, with axes, graph and record in the header; return its path."""
        header = {"format": FORMAT, "version": VERSION, "what": self.what}
        parts = {"axes": self.axes, "graph": self.graph.as_dict(), "record": asdict(self.record)}
        header |= {name: json.dumps(plain(part)) for name, part in parts.items()}
        tensors = {"per_example": self.per_example, "full": self.full, "empty": self.empty}
        return write_bytes(path, save({k: np.ascontiguousarray(v) for k, v in tensors.items()}, metadata=header))

    @classmethod
    def open(cls, path: str | PathLike[str]) -> Sweep:
        """Read the file that `save` wrote. Needs no model. FileError if the file is missing, or is not a sweep of this
        version."""
        check_file(path)
        try:
            with safe_open(str(path), framework="numpy") as file:
                header = file.metadata() or {}
                if header.get("format") != FORMAT or header.get("version") != VERSION:
                    found = f"{header.get('format', 'another format')}, version {header.get('version', '?')}"
                    raise FileError(f"{path}: expected {FORMAT}, version {VERSION}, but this file holds {found}")
                tensors = {name: file.get_tensor(name) for name in ("per_example", "full", "empty")}
            axes = tuple(Axis(name, tuple(labels)) for name, labels in json.loads(header["axes"]))
            graph, record = Graph(**json.loads(header["graph"])), Record(**json.loads(header["record"]))
            return cls(header["what"], graph, axes, record=record, **tensors)
        except SafetensorError as error:
            raise FileError(f"{path}: not a sweep that Sweep.save wrote: {error}") from None
        except (KeyError, TypeError, ValueError) as error:
            raise FileError(f"{path}: its header cannot be read ({error}): save the sweep again") from None
